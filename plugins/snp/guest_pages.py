"""The pages that an SNP guest finds in its memory: secrets, CPUID, SVSM calling area, #HV doorbell.

Source: 56860, secrets page and CPUID page; Linux arch/x86/include/asm/sev.h; coconut-svsm kernel/src; edk2
OvmfPkg/Include/Guid/ConfidentialComputingSevSnpBlob.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.layout import Layout, array, flag, raw_bytes, u8, u16, u32, u64

if TYPE_CHECKING:
    from sevlab.plugins.snp.context import SnpGuest

_SECRETS = "Linux arch/x86/include/asm/sev.h, snp_secrets_page; AMD-ASPFW sev_uapp/src"
_CPUID = "Linux arch/x86/include/asm/cpuid, snp_cpuid_table"
_CAA = "Linux arch/x86/include/asm/sev.h, svsm_ca; coconut-svsm kernel/src"
_DOORBELL = "56421, #HV doorbell page; coconut-svsm kernel/src/sev/hv_doorbell.rs"

SECRETS_VERSION = 3
TSC_FACTOR = 200
"""What the published Genoa firmware writes. Source: AMD-ASPFW sev_uapp/src."""

CPUID_ENTRIES_MAX = 64


class SecretsPage(Layout, size=0x1000):
    """The secrets page: communication keys, and what the guest's firmware hands on."""

    format_version = u32(0x000, source=_SECRETS)
    imi_en = flag(0x004, u32, 0, source=_SECRETS)
    fms = u32(0x008, doc="family, model, stepping", source=_SECRETS)
    gosvw = raw_bytes(0x010, 16, source=_SECRETS)
    vmpck0 = raw_bytes(0x020, 32, source=_SECRETS)
    vmpck1 = raw_bytes(0x040, 32, source=_SECRETS)
    vmpck2 = raw_bytes(0x060, 32, source=_SECRETS)
    vmpck3 = raw_bytes(0x080, 32, source=_SECRETS)
    message_seqno_low = array(0x0A0, 4, u32, doc="by VMPCK; the guest keeps them", source=_SECRETS)
    ap_jump_table_gpa = u64(0x0B0, source=_SECRETS)
    message_seqno_high = array(0x0B8, 4, u32, source=_SECRETS)
    os_area_version = u16(0x0DE, source=_SECRETS)
    guest_usage = raw_bytes(0x0E0, 32, source=_SECRETS)
    vmsa_tweak_bitmap = raw_bytes(0x100, 64, source=_SECRETS)
    svsm_base = u64(0x140, source=_SECRETS)
    svsm_size = u64(0x148, source=_SECRETS)
    svsm_caa = u64(0x150, source=_SECRETS)
    svsm_max_version = u32(0x158, source=_SECRETS)
    svsm_guest_vmpl = u8(0x15C, source=_SECRETS)
    tsc_factor = u32(0x160, source=_SECRETS)
    launch_mit_vector = u64(0x168, source="project-oak/oak")


class CpuidHeader(Layout, size=0x10):
    """Head of the CPUID page and of the CPUID messages."""

    count = u32(0x00, source=_CPUID)
    reserved_4 = u32(0x04, reserved=0xFFFF_FFFF, source=_CPUID)
    reserved_8 = u64(0x08, reserved=0xFFFF_FFFF_FFFF_FFFF, source=_CPUID)


class CpuidEntry(Layout, size=0x30):
    """One function of the CPUID page."""

    eax_in = u32(0x00, source=_CPUID)
    ecx_in = u32(0x04, source=_CPUID)
    xcr0_in = u64(0x08, source=_CPUID)
    xss_in = u64(0x10, source=_CPUID)
    eax = u32(0x18, source=_CPUID)
    ebx = u32(0x1C, source=_CPUID)
    ecx = u32(0x20, source=_CPUID)
    edx = u32(0x24, source=_CPUID)
    reserved_28 = u64(0x28, reserved=0xFFFF_FFFF_FFFF_FFFF, source=_CPUID)


class SvsmCallingArea(Layout, size=0x1000):
    """Where a guest above VMPL0 calls its SVSM."""

    call_pending = u8(0x00, source=_CAA)
    memory_available = u8(0x01, source=_CAA)
    no_eoi_required = u8(0x02, source=_CAA)
    call_buffer = raw_bytes(0x08, 4088, source=_CAA)


class HvDoorbell(Layout, size=0x40):
    """Head of the #HV doorbell page, shared with the hypervisor."""

    pending_vector = u8(0x00, source=_DOORBELL)
    nmi_pending = flag(0x01, u8, 0, source=_DOORBELL)
    mc_pending = flag(0x01, u8, 1, source=_DOORBELL)
    no_further_signal = flag(0x01, u8, 7, doc="set: the hypervisor has posted something", source=_DOORBELL)
    no_eoi_required = u8(0x02, source=_DOORBELL)
    per_vmpl_events = u8(0x03, source=_DOORBELL)


GUEST_PAGE_LAYOUTS: tuple[type[Layout], ...] = (SecretsPage, CpuidHeader, CpuidEntry, SvsmCallingArea, HvDoorbell)


def secrets_page(guest: SnpGuest, *, fms: int, launch_mit_vector: int = 0) -> bytes:
    """What the firmware writes into the page of type SECRETS. Source: AMD-ASPFW sev_uapp/src/sev_mcmd.c."""
    keys = {f"vmpck{number}": key for number, key in enumerate(guest.vmpcks)}
    return SecretsPage.build(
        format_version=SECRETS_VERSION,
        imi_en=int(guest.imi_en),
        fms=fms,
        gosvw=guest.gosvw,
        tsc_factor=TSC_FACTOR,
        launch_mit_vector=launch_mit_vector,
        **keys,
    )
