"""Command buffers of the SNP commands, and the structures that they point to.

`..._spa` fields may carry the C-bit, and of a page they have the low 12 bits zero: those are reserved.
Source for all: Linux include/linux/psp-sev.h and include/uapi/linux/psp-sev.h; AMD-ASPFW sev_uapp/src/sev_mcmd.h.
"""

from __future__ import annotations

from sevlab.core.layout import Layout, bits, flag, raw_bytes, u8, u16, u32, u64

_LX = "psp-sev.h"
_FW = "sev_mcmd.h"
_MITIGATION = "patches on the kernel's list, struct sev_data_snp_verify_mitigation"
PAGE_LOW_BITS = 0xFFF


class OnePage(Layout, size=0x08):
    """SNP_PLATFORM_STATUS, SNP_DECOMMISSION, SNP_GCTX_CREATE: one page."""

    page_spa = u64(0x00, reserved=PAGE_LOW_BITS, source=_LX)


class SnpPlatformStatus(Layout, size=0x20):
    """What SNP_PLATFORM_STATUS writes."""

    api_major = u8(0x00, source=_LX)
    api_minor = u8(0x01, source=_LX)
    state = u8(0x02, source=_LX)
    is_rmp_initialized = flag(0x03, u8, 0, source=_LX)
    alias_check_complete = flag(0x03, u8, 1, source=_LX)
    is_tio_en = flag(0x03, u8, 3, source=_LX)
    build_id = u32(0x04, source=_LX)
    mask_chip_id = flag(0x08, u32, 0, source=_LX)
    mask_chip_key = flag(0x08, u32, 1, source=_LX)
    vlek_en = flag(0x08, u32, 2, doc="a VLEK is loaded", source=_LX)
    feature_info = flag(0x08, u32, 3, doc="SNP_FEATURE_INFO exists", source=_LX)
    rapl_dis = flag(0x08, u32, 4, source=_LX)
    ciphertext_hiding_cap = flag(0x08, u32, 5, source=_LX)
    ciphertext_hiding_en = flag(0x08, u32, 6, source=_LX)
    guest_count = u32(0x0C, source=_LX)
    current_tcb = u64(0x10, source=_LX)
    reported_tcb = u64(0x18, source=_LX)


class SnpInitEx(Layout, size=0x40):
    """SNP_INIT_EX."""

    init_rmp = flag(0x00, u32, 0, source=_LX)
    list_paddr_en = flag(0x00, u32, 1, source=_LX)
    rapl_dis = flag(0x00, u32, 2, source=_LX)
    ciphertext_hiding_en = flag(0x00, u32, 3, source=_LX)
    tio_en = flag(0x00, u32, 4, source=_LX)
    reserved_flags = bits(0x00, u32, 31, 5, must_be_zero=True, source=_FW)
    reserved_4 = u32(0x04, reserved=0xFFFF_FFFF, source=_FW)
    list_spa = u64(0x08, doc="RangeList: pages that become HV-Fixed", source=_LX)
    max_snp_asid = u16(0x10, doc="with ciphertext hiding", source=_LX)
    reserved_12 = raw_bytes(0x12, 46, must_be_zero=True, source=_FW)


class RangeListHeader(Layout, size=0x08):
    """Head of the list of ranges; at most one page with its entries."""

    count = u32(0x00, source=_LX)
    reserved_4 = u32(0x04, reserved=0xFFFF_FFFF, source=_LX)


class RangeListEntry(Layout, size=0x10):
    """One range of the list."""

    base = u64(0x00, aligned=4096, source=_LX)
    page_count = u32(0x08, source=_LX)
    reserved_c = u32(0x0C, reserved=0xFFFF_FFFF, source=_LX)


class SnpShutdownEx(Layout, size=0x08):
    """SNP_SHUTDOWN_EX."""

    length = u32(0x00, source=_LX)
    iommu_snp_shutdown = flag(0x04, u32, 0, source=_LX)
    x86_snp_shutdown = flag(0x04, u32, 1, source=_LX)
    reserved_flags = bits(0x04, u32, 31, 2, must_be_zero=True, source=_FW)


class SnpConfig(Layout, size=0x40):
    """SNP_CONFIG."""

    reported_tcb = u64(0x00, doc="0: the committed one", source=_LX)
    mask_chip_id = flag(0x08, u32, 0, source=_LX)
    mask_chip_key = flag(0x08, u32, 1, source=_LX)
    reserved_flags = bits(0x08, u32, 31, 2, must_be_zero=True, source=_LX)
    reserved_c = raw_bytes(0x0C, 52, must_be_zero=True, source=_LX)


class SnpDownloadFirmwareEx(Layout, size=0x18):
    """SNP_DOWNLOAD_FIRMWARE_EX."""

    length = u32(0x00, source=_LX)
    reserved_4 = u32(0x04, reserved=0xFFFF_FFFF, source=_LX)
    firmware_spa = u64(0x08, source=_LX)
    firmware_bytes = u32(0x10, source=_LX)
    commit = flag(0x14, u32, 0, source=_LX)
    reserved_flags = bits(0x14, u32, 31, 1, must_be_zero=True, source=_FW)


class SnpVerifyMitigation(Layout, size=0x40):
    """SNP_VERIFY_MITIGATION."""

    length = u32(0x00, source=_MITIGATION)
    subcommand = u16(0x04, doc="0 status, 1 verify", source=_MITIGATION)
    reserved_6 = u16(0x06, reserved=0xFFFF, source=_MITIGATION)
    vector = u64(0x08, source=_MITIGATION)
    dst_en = flag(0x10, u32, 0, source=_MITIGATION)
    src_en = flag(0x10, u32, 1, source=_MITIGATION)
    reserved_flags = bits(0x10, u32, 31, 2, must_be_zero=True, source=_MITIGATION)
    reserved_14 = u32(0x14, reserved=0xFFFF_FFFF, source=_MITIGATION)
    src_spa = u64(0x18, source=_MITIGATION)
    dst_spa = u64(0x20, source=_MITIGATION)
    reserved_28 = raw_bytes(0x28, 24, must_be_zero=True, source=_MITIGATION)


class MitigationResult(Layout, size=0x14):
    """What SNP_VERIFY_MITIGATION writes."""

    verified = u64(0x00, source=_MITIGATION)
    supported = u64(0x08, source=_MITIGATION)
    failure_status = u32(0x10, source=_MITIGATION)


class SnpCommit(Layout, size=0x04):
    """SNP_COMMIT."""

    length = u32(0x00, source=_LX)


class SnpVlekLoad(Layout, size=0x10):
    """SNP_VLEK_LOAD."""

    length = u32(0x00, source=_LX)
    wrapped_version = u8(0x04, source=_LX)
    reserved_5 = raw_bytes(0x05, 3, must_be_zero=True, source=_LX)
    wrapped_spa = u64(0x08, source=_LX)


class WrappedVlek(Layout, size=0x1B0):
    """A VLEK hash-stick, wrapped for the chip with AES-256-GCM; TCB and the reserved word are authenticated."""

    iv = raw_bytes(0x00, 12, source=_LX)
    reserved_c = u32(0x0C, source=_LX)
    wrapped = raw_bytes(0x10, 0x180, source=_LX)
    vlek_tcb = u64(0x190, source=_LX)
    reserved_198 = u64(0x198, source=_LX)
    tag = raw_bytes(0x1A0, 16, source=_LX)


class SnpFeatureInfo(Layout, size=0x10):
    """SNP_FEATURE_INFO."""

    length = u32(0x00, source=_LX)
    ecx_in = u32(0x04, doc="function", source=_LX)
    feature_info_spa = u64(0x08, source=_LX)


class FeatureInfoOutput(Layout, size=0x10):
    """What SNP_FEATURE_INFO writes: the registers of a CPUID-like function."""

    eax = u32(0x00, source=_LX)
    ebx = u32(0x04, source=_LX)
    ecx = u32(0x08, source=_LX)
    edx = u32(0x0C, source=_LX)


class SnpActivate(Layout, size=0x0C):
    """SNP_ACTIVATE."""

    gctx_spa = u64(0x00, reserved=PAGE_LOW_BITS, source=_LX)
    asid = u32(0x08, source=_LX)


class SnpActivateEx(Layout, size=0x20):
    """SNP_ACTIVATE_EX."""

    length = u32(0x00, source=_LX)
    reserved_4 = u32(0x04, reserved=0xFFFF_FFFF, source=_FW)
    gctx_spa = u64(0x08, reserved=PAGE_LOW_BITS, source=_LX)
    asid = u32(0x10, source=_LX)
    id_count = u32(0x14, doc="APIC ids", source=_LX)
    ids_spa = u64(0x18, source=_LX)


class SnpGuestStatusCommand(Layout, size=0x10):
    """SNP_GUEST_STATUS."""

    gctx_spa = u64(0x00, reserved=PAGE_LOW_BITS, source=_LX)
    page_spa = u64(0x08, reserved=PAGE_LOW_BITS, source=_LX)


class SnpGuestStatus(Layout, size=0x20):
    """What SNP_GUEST_STATUS writes."""

    policy = u64(0x00, source=_LX)
    asid = u32(0x08, source=_LX)
    state = u8(0x0C, source=_LX)
    vcek_dis = flag(0x10, u32, 0, source=_LX)


class SnpGuestRequest(Layout, size=0x18):
    """SNP_GUEST_REQUEST; the request may lie anywhere in its page."""

    gctx_spa = u64(0x00, reserved=PAGE_LOW_BITS, source=_LX)
    request_spa = u64(0x08, source=_LX)
    response_spa = u64(0x10, reserved=PAGE_LOW_BITS, source=_LX)


class SnpHvReportRequest(Layout, size=0x18):
    """SNP_HV_REPORT_REQ."""

    length = u32(0x00, source="kernel list patches")
    key_sel = bits(0x04, u32, 1, 0, source="kernel list patches")
    reserved_flags = bits(0x04, u32, 31, 2, must_be_zero=True, source="kernel list patches")
    gctx_spa = u64(0x08, reserved=PAGE_LOW_BITS, source="kernel list patches")
    report_spa = u64(0x10, reserved=PAGE_LOW_BITS, source="kernel list patches")


class SnpLaunchStart(Layout, size=0x30):
    """SNP_LAUNCH_START."""

    gctx_spa = u64(0x00, reserved=PAGE_LOW_BITS, source=_LX)
    policy = u64(0x08, doc="see GuestPolicy", source=_LX)
    ma_gctx_spa = u64(0x10, reserved=PAGE_LOW_BITS, doc="of the migration agent", source=_LX)
    ma_en = flag(0x18, u32, 0, source=_LX)
    imi_en = flag(0x18, u32, 1, source=_LX)
    reserved_flags = bits(0x18, u32, 31, 2, must_be_zero=True, source=_FW)
    desired_tsc_khz = u32(0x1C, doc="for Secure TSC", source=_LX)
    gosvw = raw_bytes(0x20, 16, doc="guest OS visible workarounds", source=_LX)


class SnpLaunchUpdate(Layout, size=0x20):
    """SNP_LAUNCH_UPDATE."""

    gctx_spa = u64(0x00, reserved=PAGE_LOW_BITS, source=_LX)
    page_size = flag(0x08, u32, 0, doc="1: 2 MiB", source=_LX)
    page_type = bits(0x08, u32, 3, 1, source=_LX)
    imi_page = flag(0x08, u32, 4, source=_LX)
    reserved_flags = bits(0x08, u32, 31, 5, must_be_zero=True, source=_FW)
    reserved_c = u32(0x0C, reserved=0xFFFF_FFFF, source=_FW)
    page_spa = u64(0x10, reserved=PAGE_LOW_BITS, source=_LX)
    reserved_18 = bits(0x18, u32, 7, 0, must_be_zero=True, source=_FW)
    vmpl1_perms = bits(0x18, u32, 15, 8, source=_LX)
    vmpl2_perms = bits(0x18, u32, 23, 16, source=_LX)
    vmpl3_perms = bits(0x18, u32, 31, 24, source=_LX)
    reserved_1c = u32(0x1C, reserved=0xFFFF_FFFF, source=_FW)


class SnpLaunchFinish(Layout, size=0x40):
    """SNP_LAUNCH_FINISH."""

    gctx_spa = u64(0x00, reserved=PAGE_LOW_BITS, source=_LX)
    id_block_spa = u64(0x08, source=_LX)
    id_auth_spa = u64(0x10, source=_LX)
    id_block_en = flag(0x18, u64, 0, source=_LX)
    auth_key_en = flag(0x18, u64, 1, source=_LX)
    vcek_dis = flag(0x18, u64, 2, source=_LX)
    reserved_flags = bits(0x18, u64, 63, 3, must_be_zero=True, source=_FW)
    host_data = raw_bytes(0x20, 32, source=_LX)


class SnpDebug(Layout, size=0x18):
    """SNP_DBG_DECRYPT and SNP_DBG_ENCRYPT."""

    gctx_spa = u64(0x00, reserved=PAGE_LOW_BITS, source=_LX)
    source_spa = u64(0x08, reserved=PAGE_LOW_BITS, source=_LX)
    destination_spa = u64(0x10, reserved=PAGE_LOW_BITS, source=_LX)


class SnpPageSwapOut(Layout, size=0x30):
    """SNP_PAGE_SWAP_OUT."""

    gctx_spa = u64(0x00, reserved=PAGE_LOW_BITS, source=_FW)
    source_spa = u64(0x08, reserved=PAGE_LOW_BITS, source=_FW)
    destination_spa = u64(0x10, reserved=PAGE_LOW_BITS, source=_FW)
    mdata_spa = u64(0x18, reserved=0x3F, doc="metadata entry", source=_FW)
    software_data = u64(0x20, doc="kept in the entry", source=_FW)
    page_size = flag(0x28, u64, 0, doc="1: 2 MiB", source=_FW)
    page_type = bits(0x28, u64, 2, 1, doc="0 data, 1 metadata, 2 VMSA", source=_FW)
    reserved_3 = bits(0x28, u64, 3, 3, must_be_zero=True, source=_FW)
    root_mdata_en = flag(0x28, u64, 4, doc="the entry is the root entry in the context", source=_FW)
    reserved_flags = bits(0x28, u64, 63, 5, must_be_zero=True, source=_FW)


class SnpPageSwapIn(Layout, size=0x30):
    """SNP_PAGE_SWAP_IN."""

    gctx_spa = u64(0x00, reserved=PAGE_LOW_BITS, source=_FW)
    source_spa = u64(0x08, reserved=PAGE_LOW_BITS, source=_FW)
    destination_spa = u64(0x10, reserved=PAGE_LOW_BITS, source=_FW)
    mdata_spa = u64(0x18, reserved=0x3F, doc="metadata entry", source=_FW)
    reserved_20 = u64(0x20, reserved=0xFFFF_FFFF_FFFF_FFFF, source=_FW)
    page_size = flag(0x28, u64, 0, doc="1: 2 MiB", source=_FW)
    page_type = bits(0x28, u64, 2, 1, doc="0 data, 1 metadata, 2 VMSA", source=_FW)
    swap_in_place = flag(0x28, u64, 3, source=_FW)
    root_mdata_en = flag(0x28, u64, 4, source=_FW)
    reserved_flags = bits(0x28, u64, 63, 5, must_be_zero=True, source=_FW)


class SnpPageMove(Layout, size=0x20):
    """SNP_PAGE_MOVE."""

    gctx_spa = u64(0x00, reserved=PAGE_LOW_BITS, source=_FW)
    page_size = flag(0x08, u32, 0, doc="1: 2 MiB", source=_FW)
    reserved_flags = bits(0x08, u32, 31, 1, must_be_zero=True, source=_FW)
    reserved_c = u32(0x0C, reserved=0xFFFF_FFFF, source=_FW)
    source_spa = u64(0x10, reserved=PAGE_LOW_BITS, source=_FW)
    destination_spa = u64(0x18, reserved=PAGE_LOW_BITS, source=_FW)


class SnpMdInit(Layout, size=0x10):
    """SNP_PAGE_MD_INIT."""

    gctx_spa = u64(0x00, reserved=PAGE_LOW_BITS, source=_FW)
    page_spa = u64(0x08, reserved=PAGE_LOW_BITS, source=_FW)


class SnpPageSetState(Layout, size=0x10):
    """SNP_PAGE_SET_STATE."""

    length = u32(0x00, source=_LX)
    reserved_4 = u32(0x04, reserved=0xFFFF_FFFF, source=_LX)
    list_spa = u64(0x08, source=_LX)


class SnpPageReclaim(Layout, size=0x08):
    """SNP_PAGE_RECLAIM."""

    page_size = flag(0x00, u64, 0, doc="1: 2 MiB", source=_LX)
    reserved_1 = bits(0x00, u64, 11, 1, must_be_zero=True, source=_LX)
    page = bits(0x00, u64, 63, 12, doc="page number", source=_LX)


class SnpPageUnsmash(Layout, size=0x08):
    """SNP_PAGE_UNSMASH."""

    page_spa = u64(0x00, reserved=0x1F_FFFF, doc="a multiple of 2 MiB", source=_FW)


class MetadataEntry(Layout, size=0x40):
    """What remembers a page that was swapped out."""

    software_data = u64(0x00, source=_FW)
    iv = u64(0x08, source=_FW)
    tag = raw_bytes(0x10, 16, source=_FW)
    valid = flag(0x20, u64, 0, source=_FW)
    page_validated = flag(0x20, u64, 1, source=_FW)
    vmsa = flag(0x20, u64, 2, source=_FW)
    metadata = flag(0x20, u64, 3, source=_FW)
    page_size = flag(0x20, u64, 4, source=_FW)
    gpa_page = bits(0x20, u64, 63, 12, source=_FW)
    vmpl0 = u8(0x28, source=_FW)
    vmpl1 = u8(0x29, source=_FW)
    vmpl2 = u8(0x2A, source=_FW)
    vmpl3 = u8(0x2B, source=_FW)
