"""Command buffers of the legacy commands, packed and little-endian; `..._spa` fields may carry the C-bit.

Reserved bytes are not named unless the firmware looks at them. Source for all: Linux include/linux/psp-sev.h;
sev-tool src/sevapi.h; AMD-ASPFW sev_uapp/src/sev_mcmd.h.
"""

from __future__ import annotations

from sevlab.core.layout import Layout, bits, flag, raw_bytes, u8, u16, u32, u64

_SOURCE = "psp-sev.h"


class Init(Layout, size=0x14):
    """INIT."""

    es = flag(0x00, u32, 0, doc="SEV-ES on, needs a TMR", source=_SOURCE)
    reserved_flags = bits(0x00, u32, 31, 1, must_be_zero=True, source="sev_mcmd.c, init_cmd_buf_valid")
    reserved = u32(0x04, reserved=0xFFFF_FFFF, source="sev_mcmd.c, init_cmd_buf_valid")
    tmr_spa = u64(0x08, doc="trusted memory region", source=_SOURCE)
    tmr_bytes = u32(0x10, source=_SOURCE)


class InitEx(Layout, size=0x24):
    """INIT_EX."""

    length = u32(0x00, doc="of this buffer: 24h", source=_SOURCE)
    es = flag(0x04, u32, 0, doc="SEV-ES on, needs a TMR", source=_SOURCE)
    reserved_flags = bits(0x04, u32, 31, 1, must_be_zero=True, source="sev_mcmd.c, init_ex_cmd_buf_valid")
    tmr_spa = u64(0x08, doc="trusted memory region", source=_SOURCE)
    tmr_bytes = u32(0x10, source=_SOURCE)
    reserved = u32(0x14, reserved=0xFFFF_FFFF, source="sev_mcmd.c, init_ex_cmd_buf_valid")
    nv_spa = u64(0x18, doc="non-volatile area; 0: the SPI flash", source=_SOURCE)
    nv_bytes = u32(0x20, doc="8000h", source=_SOURCE)


class PlatformStatus(Layout, size=0x0C):
    """PLATFORM_STATUS."""

    api_major = u8(0x00, source=_SOURCE)
    api_minor = u8(0x01, source=_SOURCE)
    state = u8(0x02, source=_SOURCE)
    owner = u8(0x03, doc="1: external", source=_SOURCE)
    config = u16(0x04, doc="bit 0: SEV-ES", source=_SOURCE)
    build_id = u8(0x07, source=_SOURCE)
    guest_count = u32(0x08, source=_SOURCE)


class OneBlob(Layout, size=0x0C):
    """PEK_CSR, GET_ID, DOWNLOAD_FIRMWARE: an address and a length."""

    spa = u64(0x00, source=_SOURCE)
    length = u32(0x08, doc="in: room; out: bytes needed or written", source=_SOURCE)


class PekCertImport(Layout, size=0x1C):
    """PEK_CERT_IMPORT."""

    pek_spa = u64(0x00, source=_SOURCE)
    pek_bytes = u32(0x08, source=_SOURCE)
    oca_spa = u64(0x10, source=_SOURCE)
    oca_bytes = u32(0x18, source=_SOURCE)


class PdhCertExport(Layout, size=0x1C):
    """PDH_CERT_EXPORT."""

    pdh_spa = u64(0x00, source=_SOURCE)
    pdh_bytes = u32(0x08, doc="in: room; out: 824h", source=_SOURCE)
    chain_spa = u64(0x10, doc="PEK, OCA, CEK", source=_SOURCE)
    chain_bytes = u32(0x18, doc="in: room; out: 186Ch", source=_SOURCE)


class RingBuffer(Layout, size=0x28):
    """RING_BUFFER."""

    low_commands_spa = u64(0x00, source="sev_mcmd.h, sev_mcmd_ring_buffer_t")
    low_statuses_spa = u64(0x08, source="sev_mcmd.h, sev_mcmd_ring_buffer_t")
    high_commands_spa = u64(0x10, source="sev_mcmd.h, sev_mcmd_ring_buffer_t")
    high_statuses_spa = u64(0x18, source="sev_mcmd.h, sev_mcmd_ring_buffer_t")
    low_pages = u8(0x20, doc="1", source="sev_mcmd.h, sev_mcmd_ring_buffer_t")
    high_pages = u8(0x21, doc="0 or 1", source="sev_mcmd.h, sev_mcmd_ring_buffer_t")
    low_threshold = u16(0x22, source="sev_mcmd.h, sev_mcmd_ring_buffer_t")
    high_threshold = u16(0x24, source="sev_mcmd.h, sev_mcmd_ring_buffer_t")
    interrupt_on_empty = flag(0x26, u16, 0, source="sev_mcmd.h, sev_mcmd_ring_buffer_t")


class HandleOnly(Layout, size=0x04):
    """DECOMMISSION, DEACTIVATE, LAUNCH_FINISH, SEND_FINISH, SEND_CANCEL, RECEIVE_FINISH."""

    handle = u32(0x00, source=_SOURCE)


class Activate(Layout, size=0x08):
    """ACTIVATE."""

    handle = u32(0x00, source=_SOURCE)
    asid = u32(0x04, source=_SOURCE)


class ActivateEx(Layout, size=0x18):
    """ACTIVATE_EX."""

    length = u32(0x00, doc="of this buffer: 18h", source="sev-tool sevapi.h")
    handle = u32(0x04, source="sev-tool sevapi.h")
    asid = u32(0x08, source="sev-tool sevapi.h")
    id_count = u32(0x0C, doc="1 to 1024", source="sev-tool sevapi.h")
    ids_spa = u64(0x10, doc="APIC ids, 32 bits each", source="sev-tool sevapi.h")


class GuestStatus(Layout, size=0x0D):
    """GUEST_STATUS."""

    handle = u32(0x00, source=_SOURCE)
    policy = u32(0x04, source=_SOURCE)
    asid = u32(0x08, source=_SOURCE)
    state = u8(0x0C, source=_SOURCE)


class Copy(Layout, size=0x18):
    """COPY."""

    handle = u32(0x00, source="sev-tool sevapi.h")
    length = u32(0x04, doc="multiple of 4096", source="sev-tool sevapi.h")
    source_spa = u64(0x08, source="sev-tool sevapi.h")
    destination_spa = u64(0x10, source="sev-tool sevapi.h")


class Debug(Layout, size=0x1C):
    """DBG_DECRYPT and DBG_ENCRYPT."""

    handle = u32(0x00, source=_SOURCE)
    source_spa = u64(0x08, source=_SOURCE)
    destination_spa = u64(0x10, source=_SOURCE)
    length = u32(0x18, source=_SOURCE)


class SwapOut(Layout, size=0x28):
    """SWAP_OUT."""

    handle = u32(0x00, source="sev-tool sevapi.h")
    large = flag(0x04, u32, 0, doc="a page of 2 MiB", source="sev-tool sevapi.h")
    page_type = bits(0x04, u32, 2, 1, doc="0 data, 2 VMSA", source="sev-tool sevapi.h")
    source_spa = u64(0x08, source="sev-tool sevapi.h")
    destination_spa = u64(0x10, source="sev-tool sevapi.h")
    mdata_spa = u64(0x18, source="sev-tool sevapi.h")
    software_data = u64(0x20, source="sev-tool sevapi.h")


class SwapIn(Layout, size=0x20):
    """SWAP_IN."""

    handle = u32(0x00, source="sev-tool sevapi.h")
    large = flag(0x04, u32, 0, doc="a page of 2 MiB", source="sev-tool sevapi.h")
    page_type = bits(0x04, u32, 2, 1, doc="0 data, 2 VMSA", source="sev-tool sevapi.h")
    in_place = flag(0x04, u32, 3, source="sev-tool sevapi.h")
    source_spa = u64(0x08, source="sev-tool sevapi.h")
    destination_spa = u64(0x10, source="sev-tool sevapi.h")
    mdata_spa = u64(0x18, source="sev-tool sevapi.h")


class LaunchStart(Layout, size=0x24):
    """LAUNCH_START and RECEIVE_START."""

    handle = u32(0x00, doc="in: 0, or a guest to share the key with; out: the new guest", source=_SOURCE)
    policy = u32(0x04, source=_SOURCE)
    dh_spa = u64(0x08, doc="certificate of the other side's ECDH key; 0: no session", source=_SOURCE)
    dh_bytes = u32(0x10, doc="824h", source=_SOURCE)
    session_spa = u64(0x18, source=_SOURCE)
    session_bytes = u32(0x20, doc="80h", source=_SOURCE)


class LaunchUpdate(Layout, size=0x14):
    """LAUNCH_UPDATE_DATA and LAUNCH_UPDATE_VMSA."""

    handle = u32(0x00, source=_SOURCE)
    spa = u64(0x08, doc="multiple of 16", source=_SOURCE)
    length = u32(0x10, doc="multiple of 16; of a VMSA 4096", source=_SOURCE)


class LaunchMeasure(Layout, size=0x14):
    """LAUNCH_MEASURE."""

    handle = u32(0x00, source=_SOURCE)
    spa = u64(0x08, source=_SOURCE)
    length = u32(0x10, doc="in: room; out: 30h", source=_SOURCE)


class Attestation(Layout, size=0x24):
    """ATTESTATION."""

    handle = u32(0x00, source=_SOURCE)
    spa = u64(0x08, source=_SOURCE)
    mnonce = raw_bytes(0x10, 16, source=_SOURCE)
    length = u32(0x20, doc="in: room; out: D0h", source=_SOURCE)


class Transport(Layout, size=0x34):
    """LAUNCH_SECRET, SEND_UPDATE_DATA, SEND_UPDATE_VMSA, RECEIVE_UPDATE_DATA, RECEIVE_UPDATE_VMSA."""

    handle = u32(0x00, source=_SOURCE)
    header_spa = u64(0x08, source=_SOURCE)
    header_bytes = u32(0x10, doc="34h", source=_SOURCE)
    guest_spa = u64(0x18, doc="multiple of 16", source=_SOURCE)
    guest_bytes = u32(0x20, doc="multiple of 16", source=_SOURCE)
    transport_spa = u64(0x28, source=_SOURCE)
    transport_bytes = u32(0x30, source=_SOURCE)


class SendStart(Layout, size=0x44):
    """SEND_START."""

    handle = u32(0x00, source=_SOURCE)
    policy = u32(0x04, doc="out", source=_SOURCE)
    pdh_spa = u64(0x08, doc="the receiver's PDH certificate", source=_SOURCE)
    pdh_bytes = u32(0x10, source=_SOURCE)
    platform_spa = u64(0x18, doc="the receiver's PEK, OCA, CEK", source=_SOURCE)
    platform_bytes = u32(0x20, source=_SOURCE)
    amd_spa = u64(0x28, doc="ASK, ARK", source=_SOURCE)
    amd_bytes = u32(0x30, source=_SOURCE)
    session_spa = u64(0x38, source=_SOURCE)
    session_bytes = u32(0x40, doc="80h", source=_SOURCE)
