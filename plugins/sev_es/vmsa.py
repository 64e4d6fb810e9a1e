"""The VMSA: the page in which the hardware keeps a guest's register state encrypted.

Field names are those of the Linux kernel's structure where it has the field, with each segment slot as its four parts.
Source: 24593, appendix B (table B-4); Linux arch/x86/include/asm/svm.h (sev_es_save_area); coconut-svsm
cpuarch/src/vmsa.rs (from 0x670 on).
"""

from __future__ import annotations

from struct import Struct

from sevlab.core.cpu import Segment
from sevlab.core.layout import Layout, array, flag, raw_bytes, u8, u16, u32, u64

B4 = "24593, table B-4"
SVSM = "coconut-svsm cpuarch/src/vmsa.rs"

SEGMENT = Struct("<HHIQ")
"""Selector, attributes, limit, base: one 16-byte slot."""


class Vmsa(Layout, size=4096):
    """Encrypted save area of one vCPU (and of one VMPL)."""

    es = raw_bytes(0x000, 16, doc="selector u16, attributes u16, limit u32, base u64; so every segment", source=B4)
    cs = raw_bytes(0x010, 16, source=B4)
    ss = raw_bytes(0x020, 16, source=B4)
    ds = raw_bytes(0x030, 16, source=B4)
    fs = raw_bytes(0x040, 16, source=B4)
    gs = raw_bytes(0x050, 16, source=B4)
    gdtr = raw_bytes(0x060, 16, source=B4)
    ldtr = raw_bytes(0x070, 16, source=B4)
    idtr = raw_bytes(0x080, 16, source=B4)
    tr = raw_bytes(0x090, 16, source=B4)
    pl0_ssp = u64(0x0A0, source=B4)
    pl1_ssp = u64(0x0A8, source=B4)
    pl2_ssp = u64(0x0B0, source=B4)
    pl3_ssp = u64(0x0B8, source=B4)
    u_cet = u64(0x0C0, source=B4)
    vmpl = u8(0x0CA, source=B4)
    cpl = u8(0x0CB, values=range(4), source=B4)
    efer = u64(0x0D0, source=B4)
    xss = u64(0x140, source=B4)
    cr4 = u64(0x148, source=B4)
    cr3 = u64(0x150, source=B4)
    cr0 = u64(0x158, source=B4)
    dr7 = u64(0x160, source=B4)
    dr6 = u64(0x168, source=B4)
    rflags = u64(0x170, source=B4)
    rip = u64(0x178, source=B4)
    dr0 = u64(0x180, source=B4)
    dr1 = u64(0x188, source=B4)
    dr2 = u64(0x190, source=B4)
    dr3 = u64(0x198, source=B4)
    dr0_addr_mask = u64(0x1A0, source=B4)
    dr1_addr_mask = u64(0x1A8, source=B4)
    dr2_addr_mask = u64(0x1B0, source=B4)
    dr3_addr_mask = u64(0x1B8, source=B4)
    rsp = u64(0x1D8, source=B4)
    s_cet = u64(0x1E0, source=B4)
    ssp = u64(0x1E8, source=B4)
    isst_addr = u64(0x1F0, source=B4)
    rax = u64(0x1F8, source=B4)
    star = u64(0x200, source=B4)
    lstar = u64(0x208, source=B4)
    cstar = u64(0x210, source=B4)
    sfmask = u64(0x218, source=B4)
    kernel_gs_base = u64(0x220, source=B4)
    sysenter_cs = u64(0x228, source=B4)
    sysenter_esp = u64(0x230, source=B4)
    sysenter_eip = u64(0x238, source=B4)
    cr2 = u64(0x240, source=B4)
    g_pat = u64(0x268, source=B4)
    dbgctl = u64(0x270, source=B4)
    br_from = u64(0x278, source=B4)
    br_to = u64(0x280, source=B4)
    last_excp_from = u64(0x288, source=B4)
    last_excp_to = u64(0x290, source=B4)
    spec_ctrl = u64(0x2E0, source="openvmm vm/x86/x86defs/src/snp.rs")
    pkru = u32(0x2E8, source=B4)
    tsc_aux = u32(0x2EC, source=B4)
    tsc_scale = u64(0x2F0, source=B4)
    tsc_offset = u64(0x2F8, source=B4)
    reg_prot_nonce = u64(0x300, source=SVSM)
    rcx = u64(0x308, source=B4)
    rdx = u64(0x310, source=B4)
    rbx = u64(0x318, source=B4)
    secure_avic_control = u64(
        0x320, doc="reserved without Secure AVIC", source="Linux arch/x86/include/asm/msr-index.h"
    )
    rbp = u64(0x328, source=B4)
    rsi = u64(0x330, source=B4)
    rdi = u64(0x338, source=B4)
    r8 = u64(0x340, source=B4)
    r9 = u64(0x348, source=B4)
    r10 = u64(0x350, source=B4)
    r11 = u64(0x358, source=B4)
    r12 = u64(0x360, source=B4)
    r13 = u64(0x368, source=B4)
    r14 = u64(0x370, source=B4)
    r15 = u64(0x378, source=B4)
    guest_exit_info_1 = u64(0x390, source=B4)
    guest_exit_info_2 = u64(0x398, source=B4)
    guest_exit_int_info = u64(0x3A0, source=B4)
    guest_nrip = u64(0x3A8, source=B4)
    sev_features = u64(0x3B0, doc="see SevFeatures", source=B4)
    vintr_ctrl = u64(0x3B8, source=B4)
    guest_exit_code = u64(0x3C0, source=B4)
    virtual_tom = u64(0x3C8, source=B4)
    tlb_id = u64(0x3D0, source=B4)
    pcpu_id = u64(0x3D8, doc="0 forces a TLB flush", source=B4)
    event_inj = u64(0x3E0, source=B4)
    xcr0 = u64(0x3E8, source=B4)
    x87_dp = u64(0x400, source=B4)
    mxcsr = u32(0x408, source=B4)
    x87_ftw = u16(0x40C, source=B4)
    x87_fsw = u16(0x40E, source=B4)
    x87_fcw = u16(0x410, source=B4)
    x87_fop = u16(0x412, source=B4)
    x87_ds = u16(0x414, source=B4)
    x87_cs = u16(0x416, source=B4)
    x87_rip = u64(0x418, source=B4)
    fpreg_x87 = raw_bytes(0x420, 80, doc="8 x 8 low bytes, then 8 x 2 high bytes", source=B4)
    fpreg_xmm = raw_bytes(0x470, 256, source=B4)
    fpreg_ymm = raw_bytes(0x570, 256, doc="high halves", source=B4)
    lbr_stack = array(0x670, 32, u64, doc="16 pairs from, to", source=SVSM)
    lbr_select = u64(0x770, source=SVSM)
    ibs_fetch_ctl = u64(0x778, source=SVSM)
    ibs_fetch_linaddr = u64(0x780, source=SVSM)
    ibs_op_ctl = u64(0x788, source=SVSM)
    ibs_op_rip = u64(0x790, source=SVSM)
    ibs_op_data = u64(0x798, source=SVSM)
    ibs_op_data2 = u64(0x7A0, source=SVSM)
    ibs_op_data3 = u64(0x7A8, source=SVSM)
    ibs_dc_linaddr = u64(0x7B0, source=SVSM)
    bp_ibstgt_rip = u64(0x7B8, source=SVSM)
    ic_ibs_extd_ctl = u64(0x7C0, source=SVSM)


class SevFeatures(Layout, size=8):
    """SEV_FEATURES, at 3B0h of the VMSA; bit n is bit n + 2 of the SEV_STATUS MSR."""

    snp_active = flag(0, u64, 0, source=B4)
    vtom = flag(0, u64, 1, source=B4)
    reflect_vc = flag(0, u64, 2, source=B4)
    restricted_injection = flag(0, u64, 3, source=B4)
    alternate_injection = flag(0, u64, 4, source=B4)
    debug_swap = flag(0, u64, 5, source=B4)
    prevent_host_ibs = flag(0, u64, 6, source=B4)
    btb_isolation = flag(0, u64, 7, source=B4)
    vmpl_sss = flag(0, u64, 8, source=B4)
    secure_tsc = flag(0, u64, 9, source=B4)
    vmgexit_parameter = flag(0, u64, 10, source=B4)
    pmc_virtualization = flag(0, u64, 11, source="edk2 MdePkg/Include/Register/Amd/SevSnpMsr.h")
    ibs_virtualization = flag(0, u64, 12, source=B4)
    guest_intercept_control = flag(0, u64, 13, source="coconut-svsm cpuarch/src/sev_status.rs")
    vmsa_register_protection = flag(0, u64, 14, source=B4)
    smt_protection = flag(0, u64, 15, source=B4)
    secure_avic = flag(0, u64, 16, source="Linux arch/x86/include/asm/msr-index.h")
    ibpb_on_entry = flag(0, u64, 21, source="coconut-svsm cpuarch/src/sev_status.rs")


def segment_bytes(segment: Segment) -> bytes:
    """The 16 bytes of a segment slot from (selector, attributes, limit, base)."""
    return SEGMENT.pack(*segment)


def segment_of(slot: bytes) -> Segment:
    """(selector, attributes, limit, base) of a segment slot's 16 bytes."""
    selector, attributes, limit, base = SEGMENT.unpack(slot)
    return selector, attributes, limit, base
