"""SNP_GUEST_REQUEST: open the guest's message, answer it, seal the answer with the next sequence number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.units import MASK64, PAGE_BYTES, PAGE_MASK
from sevlab.plugins.sev import Request, Status, transfers
from sevlab.plugins.snp.attestation import make_report, selected_key
from sevlab.plugins.snp.buffers import SnpGuestRequest, SnpHvReportRequest
from sevlab.plugins.snp.context import VMPCKS, SnpGuest
from sevlab.plugins.snp.handlers.answers import ANSWERS
from sevlab.plugins.snp.handlers.common import (
    find_guest,
    guest_allows,
    page_entry,
    platform_of,
    range_status,
    writable_status,
)
from sevlab.plugins.snp.handlers.updates import knows_mitigations
from sevlab.plugins.snp.messages import (
    HEADER_BYTES,
    Message,
    MessageHeader,
    ReportResponse,
    header_is_legal,
    open_message,
    seal,
)
from sevlab.plugins.snp.report import AttestationReport
from sevlab.plugins.snp.states import PageState

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

HYPERVISOR_VMPL = 0xFFFF_FFFF
"""VMPL of a report that the hypervisor asked for. UNVERIFIED."""


def guest_request(machine: Machine, request: Request[SnpGuestRequest]) -> Status:
    """Answer a guest message. What is wrong with the guest's wish is in the answer's payload, not in the status.

    A failure of the command itself advances no counter and writes no response. Order: context, response page, page
    sizes, guest state, then the message. Source: 56860, SNP_GUEST_REQUEST; AMD-ASPFW sev_uapp/src/sev_channel.c.
    """
    buffer = request.buffer
    guest = find_guest(machine, buffer.gctx_spa)
    if isinstance(guest, Status):
        return guest
    status = _pages_status(machine, buffer)
    if status:
        return status
    if not guest_allows(guest, request.command):
        return Status.INVALID_GUEST_STATE
    message = receive(machine, guest, buffer.request_spa)
    if isinstance(message, Status):
        return message
    answer = ANSWERS.get(message.header.msg_type)
    version = message.header.msg_version
    if answer is None or version not in answer.versions:
        return Status.INVALID_PARAM
    if version > 1 and not knows_mitigations(platform_of(machine)):
        return Status.INVALID_PARAM
    if answer.request_bytes and len(message.payload) < answer.request_bytes:
        return Status.INVALID_PARAM
    number, seqno = message.header.msg_vmpck, message.header.msg_seqno + 1
    key = guest.vmpcks[number]  # that of the request, even where the answer is a new context with other keys
    payload = answer.run(machine, guest, message)
    response = seal(
        key,
        payload,
        seqno=seqno,
        kind=message.header.msg_type + 1,
        vmpck=number,
        version=version,
    )
    if guest.vmpcks[number] == key:
        counts = list(guest.message_counts)
        counts[number] = max(seqno, counts[number])
        guest.message_counts = tuple(counts)
    transfers.write(machine, buffer.response_spa, response.ljust(PAGE_BYTES, b"\0"))
    return Status.SUCCESS


def _pages_status(machine: Machine, buffer: SnpGuestRequest) -> Status:
    status = range_status(machine, buffer.request_spa, HEADER_BYTES) or range_status(
        machine, buffer.response_spa, PAGE_BYTES
    )
    if status:
        return status
    response = page_entry(machine, buffer.response_spa)
    if response is None or response.state is not PageState.FIRMWARE:
        return Status.INVALID_PAGE_STATE
    source = page_entry(machine, buffer.request_spa)
    if response.huge or (source is not None and source.huge):
        return Status.INVALID_PAGE_SIZE
    return Status.SUCCESS


def receive(machine: Machine, guest: SnpGuest, address: int) -> Message | Status:
    """The guest's message, if it is genuine and the next in its sequence; the page is read once.

    Order: header, length, VMPCK, tag, sequence number: a forged message with a wrong number is BAD_MEASUREMENT, a
    genuine one that comes again AEAD_OFLOW. Source: AMD-ASPFW sev_uapp/src/sev_channel.c.
    """
    room = PAGE_BYTES - (address & PAGE_MASK)
    raw = transfers.read(machine, address, room)
    if raw is None:
        return Status.INVALID_ADDRESS
    if room < HEADER_BYTES:
        return Status.INVALID_PARAM
    header = MessageHeader.from_bytes(raw[:HEADER_BYTES])
    if not header_is_legal(header) or HEADER_BYTES + header.msg_size > room or header.msg_vmpck >= VMPCKS:
        return Status.INVALID_PARAM
    message = open_message(guest.vmpcks[header.msg_vmpck], raw)
    if message is None:
        return Status.BAD_MEASUREMENT
    count = guest.message_counts[header.msg_vmpck]
    if header.msg_seqno != count + 1 or count + 2 > MASK64:
        return Status.AEAD_OFLOW
    return message


def hv_report_request(machine: Machine, request: Request[SnpHvReportRequest]) -> Status:
    """A report of a running guest that the hypervisor asks for: a MSG_REPORT_RSP in the clear.

    UNVERIFIED beyond the buffer. Source: patches on the kernel's list (SNP_HV_REPORT_REQ).
    """
    buffer = request.buffer
    if buffer.length != SnpHvReportRequest.SIZE:
        return Status.INVALID_PARAM
    guest = find_guest(machine, buffer.gctx_spa)
    if isinstance(guest, Status):
        return guest
    status = range_status(machine, buffer.report_spa, PAGE_BYTES) or writable_status(machine, buffer.report_spa)
    if status:
        return status
    if not guest_allows(guest, request.command):
        return Status.INVALID_GUEST_STATE
    key = selected_key(platform_of(machine), guest, buffer.key_sel)
    if key is None:
        return Status.INVALID_KEY
    report = make_report(machine, guest, report_data=bytes(64), vmpl=HYPERVISOR_VMPL, signing_key=key)
    transfers.write(machine, buffer.report_spa, ReportResponse.build(report_size=AttestationReport.SIZE, report=report))
    return Status.SUCCESS
