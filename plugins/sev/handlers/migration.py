"""Migration: SEND_START, _UPDATE_DATA, _UPDATE_VMSA, _FINISH, _CANCEL, and RECEIVE_ likewise."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sevlab.plugins.sev import crypto, transfers, vmsa_slots
from sevlab.plugins.sev.buffers import HandleOnly, LaunchStart, SendStart, Transport
from sevlab.plugins.sev.certificates import SevCertificate
from sevlab.plugins.sev.command import Request
from sevlab.plugins.sev.context import Gctx, sev_state
from sevlab.plugins.sev.handlers.common import active_guest_of, aligned16, allowed, guest_of, live_guest, move_guest
from sevlab.plugins.sev.handlers.launch import SCRATCH_BYTES, close_channel, run_guest, start_with_session
from sevlab.plugins.sev.layout import CERTIFICATE_BYTES, CHAIN_BYTES, KEY_BYTES, PacketHeader, Session
from sevlab.plugins.sev.numbers import Policy, Status, policy_api
from sevlab.plugins.sev.session import agreement_key, new_session
from sevlab.plugins.sev.validation import AMD_CHAIN_BYTES, amd_chain, validate

if TYPE_CHECKING:
    from sevlab.core.machine import Machine


class Receiver(NamedTuple):
    """The certificates of the platform that a guest goes to."""

    pdh: SevCertificate
    pek: SevCertificate
    oca: SevCertificate
    cek: SevCertificate


def send_start(machine: Machine, request: Request[SendStart]) -> Status:
    """Make transport keys for the receiver, whose certificates the policy may demand.

    Source: 55766, SEND_START; AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_send_start (order of checks).
    """
    buffer = request.buffer
    guest = live_guest(machine, buffer.handle)
    if guest is None:
        return Status.INVALID_GUEST
    if buffer.session_bytes != Session.SIZE:
        request.answer(session_bytes=Session.SIZE)
        return Status.INVALID_LENGTH
    if not allowed(guest, request.command):
        return Status.INVALID_GUEST_STATE
    if guest.policy & Policy.NOSEND:
        return Status.POLICY_FAILURE
    pdh = _receiver_pdh(machine, guest, buffer)
    if isinstance(pdh, Status):
        return pdh
    point = agreement_key(pdh)
    if point is None:
        return Status.INVALID_CERTIFICATE
    if not transfers.valid_range(machine, buffer.session_spa, Session.SIZE):
        return Status.INVALID_ADDRESS
    channel, session = new_session(machine, point, guest.policy)
    transfers.write(machine, buffer.session_spa, session)
    guest.keys, guest.nonce = channel
    move_guest(guest, request.command)
    request.answer(policy=guest.policy)
    return Status.SUCCESS


def _receiver_pdh(machine: Machine, guest: Gctx, buffer: SendStart) -> bytes | Status:
    """The receiver's PDH after what the policy asks: the full AMD chain (SEV), the same owner (DOMAIN)."""
    if guest.policy & Policy.SEV:
        status = _sev_platform(machine, guest, buffer)
        if status:
            return status
    status = transfers.output_status(machine, buffer.session_spa, buffer.session_bytes)
    if status:
        return status
    if guest.policy & Policy.DOMAIN:
        status = _domain(machine, buffer)
        if status:
            return status
    if buffer.pdh_bytes != CERTIFICATE_BYTES:
        return Status.INVALID_LENGTH
    pdh = transfers.read(machine, buffer.pdh_spa, CERTIFICATE_BYTES)
    return Status.INVALID_ADDRESS if pdh is None else pdh


def _receiver(machine: Machine, buffer: SendStart) -> Receiver | Status:
    if buffer.platform_bytes != CHAIN_BYTES or buffer.pdh_bytes != CERTIFICATE_BYTES:
        return Status.INVALID_LENGTH
    chain = transfers.read(machine, buffer.platform_spa, CHAIN_BYTES)
    pdh = transfers.read(machine, buffer.pdh_spa, CERTIFICATE_BYTES)
    if chain is None or pdh is None:
        return Status.INVALID_ADDRESS
    parts = (chain[start : start + CERTIFICATE_BYTES] for start in range(0, CHAIN_BYTES, CERTIFICATE_BYTES))
    return Receiver(SevCertificate.from_bytes(pdh), *map(SevCertificate.from_bytes, parts))


def _sev_platform(machine: Machine, guest: Gctx, buffer: SendStart) -> Status:
    """ARK, ASK, CEK, PEK, PDH, and the receiver's firmware as new as the policy asks."""
    if buffer.amd_bytes not in AMD_CHAIN_BYTES:
        return Status.INVALID_LENGTH
    receiver = _receiver(machine, buffer)
    if isinstance(receiver, Status):
        return receiver
    data = transfers.read(machine, buffer.amd_spa, buffer.amd_bytes)
    if data is None:
        return Status.INVALID_ADDRESS
    ask = amd_chain(data, machine.config.generation)
    if isinstance(ask, Status):
        return ask
    status = validate(receiver.cek, ask) or validate(receiver.pek, receiver.cek) or validate(receiver.pdh, receiver.pek)
    if status:
        return status
    api = receiver.pek.api_major, receiver.pek.api_minor
    return Status.POLICY_FAILURE if api < policy_api(guest.policy) else Status.SUCCESS


def _domain(machine: Machine, buffer: SendStart) -> Status:
    """OCA, PEK, PDH, and the OCA the same as ours."""
    receiver = _receiver(machine, buffer)
    if isinstance(receiver, Status):
        return receiver
    status = (
        validate(receiver.oca, receiver.oca)
        or validate(receiver.pek, receiver.oca)
        or validate(receiver.pdh, receiver.pek)
    )
    if status:
        return status
    own = sev_state(machine).identity.oca_certificate
    return Status.SUCCESS if receiver.oca.to_bytes() == own else Status.POLICY_FAILURE


def send_update_data(machine: Machine, request: Request[Transport]) -> Status:
    """Encrypt guest memory for the receiver.

    Source: 55766, SEND_UPDATE_DATA; AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_send_update (order of checks).
    """
    return _send_update(machine, request, vmsa=False)


def send_update_vmsa(machine: Machine, request: Request[Transport]) -> Status:
    """Encrypt a VMSA for the receiver, if its checksum holds. Source: as SEND_UPDATE_DATA."""
    return _send_update(machine, request, vmsa=True)


def _send_update(machine: Machine, request: Request[Transport], *, vmsa: bool) -> Status:
    buffer = request.buffer
    if buffer.header_bytes < PacketHeader.SIZE:
        request.answer(header_bytes=PacketHeader.SIZE)
        return Status.INVALID_LENGTH
    guest = active_guest_of(machine, request, vmsa=vmsa)
    if isinstance(guest, Status):
        return guest
    length = buffer.guest_bytes
    if not 0 < length <= SCRATCH_BYTES or not aligned16(length) or buffer.transport_bytes < length:
        return Status.INVALID_LENGTH
    if not aligned16(buffer.guest_spa):
        return Status.INVALID_ADDRESS
    status = transfers.output_status(machine, buffer.header_spa, buffer.header_bytes) or transfers.output_status(
        machine, buffer.transport_spa, buffer.transport_bytes
    )
    if status:
        return status
    data = transfers.read_guest(machine, guest, buffer.guest_spa, length)
    if data is None:
        return Status.INVALID_ADDRESS
    if vmsa and not vmsa_slots.matches(machine, guest, data):
        return Status.INVALID_PARAM
    places = ((buffer.transport_spa, length), (buffer.header_spa, PacketHeader.SIZE))
    if not all(transfers.valid_range(machine, spa, count) for spa, count in places):
        return Status.INVALID_ADDRESS
    iv = machine.entropy.take("sev.packet-iv", KEY_BYTES)
    header, packet = crypto.seal_packet(guest.keys, crypto.Context.DATA, data, iv=iv)
    transfers.write(machine, buffer.transport_spa, packet)
    transfers.write(machine, buffer.header_spa, header)
    request.answer(header_bytes=PacketHeader.SIZE)
    return Status.SUCCESS


def send_finish(machine: Machine, request: Request[HandleOnly]) -> Status:
    """The guest has gone: it cannot be activated any more. Source: 55766, SEND_FINISH."""
    return _end_sending(machine, request)


def send_cancel(machine: Machine, request: Request[HandleOnly]) -> Status:
    """The guest stays and runs. Source: Linux Documentation/virt/kvm/x86/amd-memory-encryption.rst, SEND_CANCEL."""
    return _end_sending(machine, request)


def _end_sending(machine: Machine, request: Request[HandleOnly]) -> Status:
    guest = guest_of(machine, request)
    if isinstance(guest, Status):
        return guest
    close_channel(guest)
    move_guest(guest, request.command)
    return Status.SUCCESS


def receive_start(machine: Machine, request: Request[LaunchStart]) -> Status:
    """Make the guest that another platform sends; the session is mandatory, the checks are those of LAUNCH_START.

    Source: 55766, RECEIVE_START; AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_receive_start.
    """
    return start_with_session(machine, request)


def receive_update_data(machine: Machine, request: Request[Transport]) -> Status:
    """Check and decrypt a packet into guest memory.

    Source: 55766, RECEIVE_UPDATE_DATA; AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_receive_update (order of checks).
    """
    return _receive_update(machine, request, vmsa=False)


def receive_update_vmsa(machine: Machine, request: Request[Transport]) -> Status:
    """Check and decrypt a VMSA; it gets a checksum slot of this platform. Source: as RECEIVE_UPDATE_DATA."""
    return _receive_update(machine, request, vmsa=True)


def _receive_update(machine: Machine, request: Request[Transport], *, vmsa: bool) -> Status:
    buffer = request.buffer
    guest = active_guest_of(machine, request, vmsa=vmsa)
    if isinstance(guest, Status):
        return guest
    length = buffer.transport_bytes
    if (
        not 0 < length <= SCRATCH_BYTES
        or buffer.guest_bytes != length
        or not aligned16(length)
        or buffer.header_bytes < PacketHeader.SIZE
    ):
        return Status.INVALID_LENGTH
    if not aligned16(buffer.guest_spa):
        return Status.INVALID_ADDRESS
    status = transfers.output_status(machine, buffer.guest_spa, length)
    if status:
        return status
    header = transfers.read(machine, buffer.header_spa, PacketHeader.SIZE)
    if header is None:
        return Status.INVALID_ADDRESS
    if PacketHeader.from_bytes(header).compressed:
        return Status.UNSUPPORTED
    packet = transfers.read(machine, buffer.transport_spa, length)
    if packet is None or not transfers.valid_range(machine, buffer.guest_spa, length):
        return Status.INVALID_ADDRESS
    data = crypto.open_packet(guest.keys, crypto.Context.DATA, header, packet)
    if data is None:
        return Status.BAD_MEASUREMENT
    if vmsa:
        prepared = vmsa_slots.prepare(machine, guest, data)
        if isinstance(prepared, Status):
            return prepared
        data = prepared
    transfers.write_guest(machine, guest, buffer.guest_spa, data)
    return Status.SUCCESS


def receive_finish(machine: Machine, request: Request[HandleOnly]) -> Status:
    """The guest runs here; a pending ASID is in use. Source: 55766, RECEIVE_FINISH."""
    guest = guest_of(machine, request)
    if isinstance(guest, Status):
        return guest
    run_guest(sev_state(machine), guest)
    move_guest(guest, request.command)
    return Status.SUCCESS
