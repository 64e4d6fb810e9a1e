"""Registers of SME."""

from __future__ import annotations

from sevlab.core.layout import Layout, bits, flag, u32, u64

SYSCFG = 0xC001_0010
CPUID_ENCRYPTION = 0x8000_001F

MEM_ENCRYPTION_MOD_EN = 1 << 23


class SysCfg(Layout, size=8):
    """MSR C001_0010h, SYSCFG."""

    mtrr_fix_dram_en = flag(0, u64, 18, source="24593, 7.9.2")
    mtrr_fix_dram_mod_en = flag(0, u64, 19, source="24593, 7.9.2")
    mtrr_var_dram_en = flag(0, u64, 20, source="24593, 7.9.2")
    mtrr_tom2_en = flag(0, u64, 21, source="24593, 7.9.4")
    tom2_force_mem_type_wb = flag(0, u64, 22, source="24593, 7.9.4")
    mem_encryption_mod_en = flag(
        0, u64, 23, doc="1: the C-bit means encryption; stays set until reset", source="24593, 7.10.2"
    )
    snp_en = flag(0, u64, 24, doc="SEV-SNP", source="24593, 15.36.2")
    vmpl_en = flag(0, u64, 25, doc="VMPLs", source="24593, 15.36.7")


class SmeCpuid(Layout, size=16):
    """CPUID Fn8000_001F: EAX, EBX, ECX, EDX."""

    sme = flag(0, u32, 0, source="24593, 7.10.1")
    sev = flag(0, u32, 1, source="24593, 15.34.1")
    page_flush_msr = flag(0, u32, 2, source="24593, 15.34.9")
    sev_es = flag(0, u32, 3, source="24593, 15.35.1")
    sev_snp = flag(0, u32, 4, source="24593, 15.36.1")
    coherent = flag(0, u32, 10, doc="no flush is needed when the C-bit of a page changes", source="24593, 7.10.6")
    c_bit_position = bits(4, u32, 5, 0, source="24593, 7.10.1")
    lost_physical_bits = bits(4, u32, 11, 6, source="24593, 7.10.1")
    vmpl_count = bits(4, u32, 15, 12, source="24593, 15.36.1")
    max_encrypted_guests = bits(8, u32, 31, 0, source="24593, 15.34.1")
    min_sev_no_es_asid = bits(12, u32, 31, 0, source="24593, 15.35.1")
