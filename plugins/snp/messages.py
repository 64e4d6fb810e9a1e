"""Guest messages: what an SNP guest and the firmware say to each other through the hypervisor's hands.

AES-256-GCM under a VMPCK. The nonce is the sequence number, which is not among the authenticated header bytes: a
message can be moved to another number only by breaking the tag, because the nonce is another one.

Source: 56860, guest messages; Linux drivers/virt/coco/sev-guest and arch/x86/coco/sev; AMD-ASPFW
sev_uapp/src/sev_channel.c.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from sevlab.core.layout import Layout, bits, flag, raw_bytes, u8, u16, u32, u64
from sevlab.core.units import MASK64, PAGE_BYTES

_HEADER = "56860, table MSG header; Linux include/linux/sev-guest.h"
_MESSAGE = "56860, guest messages; Linux include/uapi/linux/sev-guest.h"
_FW = "AMD-ASPFW sev_uapp/src/sev_channel.h"

HEADER_BYTES = 0x60
AAD = slice(0x30, 0x60)
"""The authenticated part of the header; tag, sequence number and the word behind it are not."""
TAG_BYTES = 16
ALGORITHM_AES_256_GCM = 1
HEADER_VERSION = 1
MESSAGE_VERSION = 1
MAX_PAYLOAD_BYTES = PAGE_BYTES - HEADER_BYTES
EXPORT_BYTES = 0x300
EXPORT_VERSION = 3


class MessageType(IntEnum):
    """Message types: a request is odd, its response one more. Source: Linux include/linux/sev-guest.h."""

    CPUID_REQ = 1
    CPUID_RSP = 2
    KEY_REQ = 3
    KEY_RSP = 4
    REPORT_REQ = 5
    REPORT_RSP = 6
    EXPORT_REQ = 7
    EXPORT_RSP = 8
    IMPORT_REQ = 9
    IMPORT_RSP = 10
    ABSORB_REQ = 11
    ABSORB_RSP = 12
    VMRK_REQ = 13
    VMRK_RSP = 14
    ABSORB_NOMA_REQ = 15
    ABSORB_NOMA_RSP = 16
    TSC_INFO_REQ = 17
    TSC_INFO_RSP = 18


class MessageHeader(Layout, size=HEADER_BYTES):
    """Header of a guest message."""

    authtag = raw_bytes(0x00, 32, doc="the first 16 bytes are the tag", source=_HEADER)
    msg_seqno = u64(0x20, source=_HEADER)
    algo = u8(0x30, values=(ALGORITHM_AES_256_GCM,), source=_HEADER)
    hdr_version = u8(0x31, values=(HEADER_VERSION,), source=_HEADER)
    hdr_size = u16(0x32, values=(HEADER_BYTES,), source=_HEADER)
    msg_type = u8(0x34, source=_HEADER)
    msg_version = u8(0x35, source=_HEADER)
    msg_size = u16(0x36, source=_HEADER)
    msg_vmpck = u8(0x3C, values=range(4), source=_HEADER)


class ReportRequest(Layout, size=0x60):
    """MSG_REPORT_REQ."""

    report_data = raw_bytes(0x00, 64, source=_MESSAGE)
    vmpl = u32(0x40, source=_MESSAGE)
    key_sel = bits(0x44, u32, 1, 0, doc="0 VLEK if loaded, else VCEK; 1 VCEK; 2 VLEK", source=_MESSAGE)
    reserved_44 = bits(0x44, u32, 31, 2, must_be_zero=True, source=_MESSAGE)
    reserved_48 = raw_bytes(0x48, 24, must_be_zero=True, source=_MESSAGE)


class ReportResponse(Layout, size=0x4C0):
    """MSG_REPORT_RSP."""

    status = u32(0x00, source=_MESSAGE)
    report_size = u32(0x04, source=_MESSAGE)
    report = raw_bytes(0x20, 0x4A0, source=_MESSAGE)


class KeyRequest(Layout, size=0x20):
    """MSG_KEY_REQ; all of version 1."""

    root_key_select = flag(0x00, u32, 0, doc="0 VCEK or VLEK, 1 VMRK", source=_MESSAGE)
    key_sel = bits(0x00, u32, 2, 1, doc="0 VLEK if loaded, else VCEK; 1 VCEK; 2 VLEK", source=_MESSAGE)
    reserved_0 = bits(0x00, u32, 31, 3, must_be_zero=True, source=_MESSAGE)
    reserved_4 = u32(0x04, reserved=0xFFFF_FFFF, source=_MESSAGE)
    guest_field_select = u64(0x08, source=_MESSAGE)
    vmpl = u32(0x10, source=_MESSAGE)
    guest_svn = u32(0x14, source=_MESSAGE)
    tcb_version = u64(0x18, source=_MESSAGE)


class KeyRequestTail(Layout, size=0x08):
    """What version 2 of MSG_KEY_REQ adds at its end."""

    launch_mit_vector = u64(0x00, source="virtee/sev src/firmware/guest/types/snp.rs, DerivedKey")


class KeyResponse(Layout, size=0x40):
    """MSG_KEY_RSP."""

    status = u32(0x00, source=_MESSAGE)
    key = raw_bytes(0x20, 32, source=_MESSAGE)


class ExportRequest(Layout, size=0x10):
    """MSG_EXPORT_REQ."""

    gctx_spa = u64(0x00, source=_FW)
    imi_en = flag(0x08, u32, 0, source=_FW)
    reserved_8 = bits(0x08, u32, 31, 1, must_be_zero=True, source=_FW)
    reserved_c = u32(0x0C, reserved=0xFFFF_FFFF, source=_FW)


class ExportResponse(Layout, size=0x20 + EXPORT_BYTES):
    """MSG_EXPORT_RSP."""

    status = u32(0x00, source=_FW)
    gctx_size = u32(0x04, source=_FW)
    gctx_version = u32(0x08, source=_FW)
    context = raw_bytes(0x20, EXPORT_BYTES, source=_FW)


class ImportRequest(Layout, size=0x20 + EXPORT_BYTES):
    """MSG_IMPORT_REQ, MSG_ABSORB_REQ, MSG_ABSORB_NOMA_REQ (whose first word is reserved)."""

    gctx_spa = u64(0x00, source=_FW)
    gctx_size = u32(0x08, source=_FW)
    gctx_version = u32(0x0C, source=_FW)
    reserved_10 = raw_bytes(0x10, 16, must_be_zero=True, source=_FW)
    context = raw_bytes(0x20, EXPORT_BYTES, source=_FW)


class StatusResponse(Layout, size=0x10):
    """Responses that carry nothing but a status."""

    status = u32(0x00, source=_FW)


class VmrkRequest(Layout, size=0x40):
    """MSG_VMRK_REQ."""

    gctx_spa = u64(0x00, source=_FW)
    reserved_8 = raw_bytes(0x08, 24, must_be_zero=True, source=_FW)
    vmrk = raw_bytes(0x20, 32, source=_FW)


class TscInfoRequest(Layout, size=0x80):
    """MSG_TSC_INFO_REQ."""

    reserved_0 = raw_bytes(0x00, 0x80, must_be_zero=True, source="Linux arch/x86/include/asm/sev.h")


class TscInfoResponse(Layout, size=0x80):
    """MSG_TSC_INFO_RSP."""

    status = u32(0x00, source="Linux arch/x86/include/asm/sev.h")
    tsc_scale = u64(0x08, source="Linux arch/x86/include/asm/sev.h")
    tsc_offset = u64(0x10, source="Linux arch/x86/include/asm/sev.h")
    tsc_factor = u32(0x18, source="Linux arch/x86/include/asm/sev.h")


class ExportContext(Layout, size=EXPORT_BYTES):
    """A guest's context as a migration agent gets it."""

    launch_digest = raw_bytes(0x000, 48, source=_FW)
    oek = raw_bytes(0x030, 32, source=_FW)
    vmpck0 = raw_bytes(0x050, 32, source=_FW)
    vmpck1 = raw_bytes(0x070, 32, source=_FW)
    vmpck2 = raw_bytes(0x090, 32, source=_FW)
    vmpck3 = raw_bytes(0x0B0, 32, source=_FW)
    vmrk = raw_bytes(0x0D0, 32, source=_FW)
    host_data = raw_bytes(0x0F0, 32, source=_FW)
    id_key_digest = raw_bytes(0x110, 48, source=_FW)
    author_key_digest = raw_bytes(0x140, 48, source=_FW)
    report_id = raw_bytes(0x170, 32, source=_FW)
    imi_digest = raw_bytes(0x190, 48, source=_FW)
    message_count0 = u64(0x1C0, source=_FW)
    message_count1 = u64(0x1C8, source=_FW)
    message_count2 = u64(0x1D0, source=_FW)
    message_count3 = u64(0x1D8, source=_FW)
    root_md_entry = raw_bytes(0x1E0, 64, source=_FW)
    author_key_en = flag(0x220, u64, 0, source=_FW)
    id_block_en = flag(0x220, u64, 1, source=_FW)
    vcek_dis = flag(0x220, u64, 2, source=_FW)
    policy = u64(0x228, source=_FW)
    state = u8(0x230, source=_FW)
    oek_iv_count = u64(0x238, source=_FW)
    id_block = raw_bytes(0x240, 0x60, source=_FW)
    gosvw = raw_bytes(0x2A0, 16, source=_FW)
    desired_tsc_khz = u32(0x2B0, source=_FW)
    tsc_offset = u64(0x2B8, source=_FW)
    launch_tcb = u64(0x2C0, source=_FW)


MESSAGE_LAYOUTS: tuple[type[Layout], ...] = (
    MessageHeader,
    ReportRequest,
    ReportResponse,
    KeyRequest,
    KeyRequestTail,
    KeyResponse,
    ExportRequest,
    ExportResponse,
    ImportRequest,
    StatusResponse,
    VmrkRequest,
    TscInfoRequest,
    TscInfoResponse,
    ExportContext,
)


class Message(NamedTuple):
    """An opened message."""

    header: MessageHeader
    payload: bytes


def nonce(seqno: int) -> bytes:
    """The GCM nonce of a sequence number."""
    return seqno.to_bytes(8, "little") + bytes(4)


def seal(key: bytes, payload: bytes, *, seqno: int, kind: int, vmpck: int, version: int = MESSAGE_VERSION) -> bytes:
    """The bytes of a message: header and encrypted payload (1 to 4000 bytes). Nobody may seal a number twice."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    header = MessageHeader.build(
        msg_seqno=seqno,
        algo=ALGORITHM_AES_256_GCM,
        hdr_version=HEADER_VERSION,
        hdr_size=HEADER_BYTES,
        msg_type=kind,
        msg_version=version,
        msg_size=len(payload),
        msg_vmpck=vmpck,
    )
    sealed = AESGCM(key).encrypt(nonce(seqno), payload, header[AAD])
    return sealed[-TAG_BYTES:] + header[TAG_BYTES:] + sealed[:-TAG_BYTES]


def header_is_legal(header: MessageHeader) -> bool:
    """Whether the fields that say how to read the message are right; the tag comes later.

    Source: AMD-ASPFW sev_uapp/src/sev_channel.c.
    """
    return (
        header.hdr_version == HEADER_VERSION
        and header.hdr_size == HEADER_BYTES
        and header.algo == ALGORITHM_AES_256_GCM
        and bool(header.msg_size)
        and not header.msg_size & 0xF
    )


def open_message(key: bytes, message: bytes) -> Message | None:
    """The message with its payload in the clear; None when the tag is wrong.

    `message` has at least its header and `msg_size` bytes, and a legal header.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    header = MessageHeader.from_bytes(message[:HEADER_BYTES])
    sealed = message[HEADER_BYTES : HEADER_BYTES + header.msg_size] + header.authtag[:TAG_BYTES]
    try:
        payload = AESGCM(key).decrypt(nonce(header.msg_seqno), sealed, message[AAD])
    except InvalidTag:
        return None
    return Message(header, payload)


LAST_SEQNO = MASK64
