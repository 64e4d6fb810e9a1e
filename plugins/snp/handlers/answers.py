"""What the firmware answers to each guest message; errors of the guest's wish are in the payload's status.

Source: 56860, guest messages; AMD-ASPFW sev_uapp/src/sev_channel.c (order of checks).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from sevlab.plugins.sev import Status
from sevlab.plugins.snp import keys
from sevlab.plugins.snp.attestation import (
    KEY_SEL_RESERVED,
    KNOWN_FIELDS,
    VLEK,
    GuestField,
    derive_key,
    id_block_of,
    make_report,
    selected_key,
)
from sevlab.plugins.snp.cpuid_table import corrected_table
from sevlab.plugins.snp.guest_pages import TSC_FACTOR, CpuidHeader
from sevlab.plugins.snp.handlers.common import platform_of
from sevlab.plugins.snp.handlers.launch import tsc_scale
from sevlab.plugins.snp.handlers.migration import absorb, absorb_noma, export, import_, vmrk
from sevlab.plugins.snp.handlers.platform import tcb_at_most
from sevlab.plugins.snp.messages import (
    ExportRequest,
    ImportRequest,
    KeyRequest,
    KeyRequestTail,
    KeyResponse,
    Message,
    MessageType,
    ReportRequest,
    ReportResponse,
    TscInfoRequest,
    TscInfoResponse,
    VmrkRequest,
)
from sevlab.plugins.snp.report import AttestationReport, SigningKey

if TYPE_CHECKING:
    from sevlab.core.machine import Machine
    from sevlab.plugins.snp.context import SnpGuest

TCB_RESERVED = {"turin": 0x00FF_FFFF_0000_0000}
TCB_RESERVED_OLD = 0x0000_FFFF_FFFF_0000
"""Bytes of a TCB version that are reserved. Source: 56860, TCB_VERSION."""


class Answer(NamedTuple):
    """How one message type is answered; `request_bytes` is the least length of its payload.

    Versions above 1 are those of firmware that knows mitigations.
    """

    request_bytes: int
    run: Callable[[Machine, SnpGuest, Message], bytes]
    versions: tuple[int, ...] = (1,)


def cpuid(machine: Machine, _guest: SnpGuest, message: Message) -> bytes:
    """MSG_CPUID: check a table as the firmware checks the CPUID page; wrong values come back corrected.

    The response's layout is the request's, with the status in front. UNVERIFIED. Source: 56860, MSG_CPUID_REQ.
    """
    table = corrected_table(machine, message.payload)
    if table is None:
        return (Status.INVALID_PARAM.to_bytes(4, "little") + message.payload[4:]).ljust(CpuidHeader.SIZE, b"\0")
    status = Status.SUCCESS if table == message.payload else Status.INVALID_PARAM
    return status.to_bytes(4, "little") + table[:4] + bytes(8) + table[CpuidHeader.SIZE :]


def report(machine: Machine, guest: SnpGuest, message: Message) -> bytes:
    """MSG_REPORT: a signed report; `report_size` is filled even with an error.

    Order: reserved bits, key, VMPL. Source: AMD-ASPFW sev_uapp/src/sev_channel.c.
    """
    wish = ReportRequest.from_bytes(message.payload[: ReportRequest.SIZE])
    platform = platform_of(machine)
    key = selected_key(platform, guest, wish.key_sel)
    status = Status.SUCCESS
    if wish.reserved_44 or any(wish.reserved_48):
        status = Status.INVALID_PARAM
    elif key is None:
        status = Status.INVALID_KEY
    elif wish.vmpl < message.header.msg_vmpck:
        status = Status.INVALID_PARAM
    if status or key is None:
        return ReportResponse.build(status=status, report_size=AttestationReport.SIZE)
    signed = make_report(machine, guest, report_data=wish.report_data, vmpl=wish.vmpl, signing_key=key)
    return ReportResponse.build(report_size=AttestationReport.SIZE, report=signed)


def derived_key(machine: Machine, guest: SnpGuest, message: Message) -> bytes:
    """MSG_KEY: a key from the chip's or the guest's root. Source: 56860, MSG_KEY_REQ; AMD-ASPFW sev_channel.c."""
    wish = KeyRequest.from_bytes(message.payload[: KeyRequest.SIZE])
    vector = 0
    if message.header.msg_version > 1:
        tail = message.payload[KeyRequest.SIZE :][: KeyRequestTail.SIZE].ljust(KeyRequestTail.SIZE, b"\0")
        vector = KeyRequestTail.from_bytes(tail).launch_mit_vector
    status = key_status(machine, guest, message, wish) or vector_status(guest, wish, vector)
    if status:
        return KeyResponse.build(status=status)
    platform, fields = platform_of(machine), wish.guest_field_select
    root = guest.vmrk
    if not wish.root_key_select:
        tcb = wish.tcb_version if fields & GuestField.TCB_VERSION else platform.reported_tcb
        vlek = selected_key(platform, guest, wish.key_sel) is SigningKey.VLEK
        root = platform.vlek if vlek else keys.vcek_stick(machine, tcb)
    key = derive_key(
        machine,
        guest,
        root=root,
        vmrk=bool(wish.root_key_select),
        fields=fields,
        vmpl=wish.vmpl,
        guest_svn=wish.guest_svn,
        tcb_version=wish.tcb_version,
        launch_mit_vector=vector,
    )
    return KeyResponse.build(key=key)


def vector_status(guest: SnpGuest, wish: KeyRequest, vector: int) -> Status:
    """A key may name mitigations that were verified when the guest was launched, and no others. UNVERIFIED."""
    chosen = wish.guest_field_select & GuestField.LAUNCH_MIT_VECTOR
    return Status.INVALID_PARAM if chosen and vector & ~guest.launch_mit_vector else Status.SUCCESS


def key_status(machine: Machine, guest: SnpGuest, message: Message, wish: KeyRequest) -> Status:
    """Why a key is refused. Order as in AMD-ASPFW sev_uapp/src/sev_channel.c."""
    platform, fields = platform_of(machine), wish.guest_field_select
    if wish.reserved_0 or wish.reserved_4:
        return Status.INVALID_PARAM
    if not wish.root_key_select and (
        platform.mask_chip_key
        or wish.key_sel == KEY_SEL_RESERVED
        or (wish.key_sel == VLEK and not platform.vlek)
        or selected_key(platform, guest, wish.key_sel) is None
    ):
        return Status.INVALID_KEY
    if wish.vmpl < message.header.msg_vmpck or fields & ~KNOWN_FIELDS[message.header.msg_version]:
        return Status.INVALID_PARAM
    if fields & GuestField.TCB_VERSION:
        reserved = TCB_RESERVED.get(machine.config.part.name, TCB_RESERVED_OLD)
        if wish.tcb_version & reserved or not tcb_at_most(wish.tcb_version, platform.committed_tcb):
            return Status.INVALID_PARAM
    if fields & GuestField.GUEST_SVN and wish.guest_svn > id_block_of(guest).guest_svn:
        return Status.INVALID_PARAM
    return Status.SUCCESS


def tsc_info(_machine: Machine, guest: SnpGuest, message: Message) -> bytes:
    """MSG_TSC_INFO: what Secure TSC runs on. Source: Linux arch/x86/coco/sev/core.c, snp_secure_tsc_prepare."""
    if any(message.payload[: TscInfoRequest.SIZE]):
        return TscInfoResponse.build(status=Status.INVALID_PARAM)
    return TscInfoResponse.build(
        tsc_scale=tsc_scale(guest.desired_tsc_khz), tsc_offset=guest.tsc_offset, tsc_factor=TSC_FACTOR
    )


ANSWERS: dict[int, Answer] = {
    MessageType.CPUID_REQ: Answer(CpuidHeader.SIZE, cpuid),
    MessageType.KEY_REQ: Answer(KeyRequest.SIZE, derived_key, (1, 2)),
    MessageType.REPORT_REQ: Answer(ReportRequest.SIZE, report),
    MessageType.EXPORT_REQ: Answer(ExportRequest.SIZE, export),
    MessageType.IMPORT_REQ: Answer(ImportRequest.SIZE, import_),
    MessageType.ABSORB_REQ: Answer(ImportRequest.SIZE, absorb),
    MessageType.VMRK_REQ: Answer(VmrkRequest.SIZE, vmrk),
    MessageType.ABSORB_NOMA_REQ: Answer(ImportRequest.SIZE, absorb_noma),
    MessageType.TSC_INFO_REQ: Answer(TscInfoRequest.SIZE, tsc_info),
}
"""By message type."""
