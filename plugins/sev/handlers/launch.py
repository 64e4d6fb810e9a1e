"""Launch: LAUNCH_START, _UPDATE_DATA, _UPDATE_VMSA, _MEASURE, _SECRET, _FINISH, and ATTESTATION."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.plugins.sev import asids, crypto, transfers, vmsa_slots
from sevlab.plugins.sev.buffers import Attestation, HandleOnly, LaunchMeasure, LaunchStart, LaunchUpdate, Transport
from sevlab.plugins.sev.certificates import Algorithm, Usage
from sevlab.plugins.sev.command import Request
from sevlab.plugins.sev.context import NO_KEYS, Gctx, RunningDigest, SevState, sev_state
from sevlab.plugins.sev.handlers.common import (
    active_guest_of,
    aligned16,
    allowed,
    guest_of,
    live_guest,
    move_guest,
    move_platform,
)
from sevlab.plugins.sev.layout import (
    NONCE_BYTES,
    NUMBER_BYTES,
    REPORT_SIGNED_BYTES,
    AttestationReport,
    Measurement,
    PacketHeader,
)
from sevlab.plugins.sev.numbers import MAX_GUESTS, Policy, Status
from sevlab.plugins.sev.session import Channel, open_session

if TYPE_CHECKING:
    from collections.abc import Callable

    from sevlab.core.machine import Machine

VMSA_BYTES = 4096
SCRATCH_BYTES = 0x5000
"""Longest packet: the firmware's scratch buffer. Source: AMD-ASPFW sev_uapp/src/sev_globals.h."""
OEK_BYTES = 32


def launch_start(machine: Machine, request: Request[LaunchStart]) -> Status:
    """Make a guest: session keys from its owner, if there is one, and a new or shared memory key.

    Without a session neither the policy's MAC nor its API version and reserved bits are looked at. Source: 55766,
    LAUNCH_START; AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_launch_start (order of checks).
    """
    if not request.buffer.dh_spa:
        return new_guest(machine, request, Channel(NO_KEYS, bytes(NONCE_BYTES)))
    return start_with_session(machine, request)


def start_with_session(machine: Machine, request: Request[LaunchStart]) -> Status:
    """LAUNCH_START with a session, and all of RECEIVE_START, which must have one."""
    channel = open_session(machine, request.buffer)
    return channel if isinstance(channel, Status) else new_guest(machine, request, channel)


def new_guest(machine: Machine, request: Request[LaunchStart], channel: Channel) -> Status:
    """The common end of LAUNCH_START and RECEIVE_START: key, handle, SEV-ES, and both automata."""
    sev = sev_state(machine)
    shared_with, policy = request.buffer.handle, request.buffer.policy
    sharing = sev.guests.get(shared_with)
    if shared_with:
        if sharing is None:
            return Status.INVALID_GUEST
        if policy != sharing.policy or policy & Policy.NOKS:
            return Status.POLICY_FAILURE
    handle = next((number for number in range(1, MAX_GUESTS + 1) if number not in sev.guests), 0)
    if not handle:
        return Status.RESOURCE_LIMIT
    if policy & Policy.ES and not sev.es:
        return Status.UNSUPPORTED
    seed_bytes = machine.memory.key_bits // 8
    guest = Gctx(
        handle=handle,
        policy=policy,
        vek_seed=machine.entropy.take("sev.vek", seed_bytes) if sharing is None else sharing.vek_seed,
        oek=machine.entropy.take("sev.oek", OEK_BYTES),
        keys=channel.keys,
        nonce=channel.nonce,
    )
    move_guest(guest, request.command)
    move_platform(sev, request.command)
    sev.guests[handle] = guest
    request.answer(handle=handle)
    return Status.SUCCESS


def launch_update_data(machine: Machine, request: Request[LaunchUpdate]) -> Status:
    """Measure plaintext and encrypt it in place.

    Source: 55766, LAUNCH_UPDATE_DATA; AMD-ASPFW sev_uapp/src/sev_mcmd.c, launch_update_common (order of checks).
    """
    return _update(machine, request, vmsa=False)


def launch_update_vmsa(machine: Machine, request: Request[LaunchUpdate]) -> Status:
    """Measure a VMSA as it was given, put the address of its checksum into it, encrypt it in place.

    Source: 55766, LAUNCH_UPDATE_VMSA; AMD-ASPFW sev_uapp/src/sev_mcmd.c and sev_es.c, sev_es_setup_vmsa.
    """
    return _update(machine, request, vmsa=True)


def vmsa_length(buffer: LaunchUpdate) -> Status:
    """LAUNCH_UPDATE_VMSA looks at its length before anything else."""
    return Status.SUCCESS if buffer.length == VMSA_BYTES else Status.INVALID_LENGTH


def _update(machine: Machine, request: Request[LaunchUpdate], *, vmsa: bool) -> Status:
    buffer = request.buffer
    guest = active_guest_of(machine, request, vmsa=vmsa)
    if isinstance(guest, Status):
        return guest
    if not aligned16(buffer.spa):
        return Status.INVALID_ADDRESS
    if not buffer.length or not aligned16(buffer.length):
        return Status.INVALID_LENGTH
    status = transfers.output_status(machine, buffer.spa, buffer.length)
    if status:
        return status
    if not transfers.valid_range(machine, buffer.spa, buffer.length):
        return Status.INVALID_ADDRESS
    return _load_vmsa(machine, guest, buffer.spa) if vmsa else _load_data(machine, guest, buffer.spa, buffer.length)


def _load_data(machine: Machine, guest: Gctx, spa: int, length_bytes: int) -> Status:
    def feed(update: Callable[[bytes | bytearray], object]) -> None:
        transfers.encrypt_in_place(machine, guest, spa, length_bytes, update)

    guest.digest = guest.digest.plus(length_bytes, feed)
    return Status.SUCCESS


def _load_vmsa(machine: Machine, guest: Gctx, spa: int) -> Status:
    vmsa = transfers.read(machine, spa, VMSA_BYTES)
    assert vmsa is not None  # checked before
    prepared = vmsa_slots.prepare(machine, guest, vmsa)
    if isinstance(prepared, Status):
        return prepared
    guest.digest = guest.digest.plus(VMSA_BYTES, lambda update: update(vmsa))
    transfers.write_guest(machine, guest, spa, prepared)
    return Status.SUCCESS


def _room(machine: Machine, request: Request[LaunchMeasure] | Request[Attestation], size: int) -> Status:
    """Whether the answer of `size` bytes can be written; too little room asks for the length."""
    buffer = request.buffer
    if buffer.length < size:
        request.answer(length=size)
        return Status.INVALID_LENGTH
    status = transfers.output_status(machine, buffer.spa, buffer.length)
    if status:
        return status
    return Status.SUCCESS if transfers.valid_range(machine, buffer.spa, size) else Status.INVALID_ADDRESS


def launch_measure(machine: Machine, request: Request[LaunchMeasure]) -> Status:
    """Close the measurement: 32 bytes of HMAC under the TIK and a nonce; can be asked for once.

    Source: 55766, LAUNCH_MEASURE; AMD-ASPFW sev_uapp/src/sev_guest.c, sev_guest_measure.
    """
    sev = sev_state(machine)
    buffer = request.buffer
    guest = guest_of(machine, request)
    if isinstance(guest, Status):
        return guest
    status = _room(machine, request, Measurement.SIZE)
    if status:
        return status
    guest.launch_digest = guest.digest.digest()
    mnonce = machine.entropy.take("sev.mnonce", NONCE_BYTES)
    guest.measure = crypto.launch_measure(
        guest.keys.tik,
        api=(sev.api_major, sev.api_minor),
        build=sev.build,
        policy=guest.policy,
        launch_digest=guest.launch_digest,
        mnonce=mnonce,
    )
    guest.digest = RunningDigest()  # nothing is added any more; what it was is kept
    transfers.write(machine, buffer.spa, Measurement.build(measure=guest.measure, mnonce=mnonce))
    move_guest(guest, request.command)
    return Status.SUCCESS


def launch_secret(machine: Machine, request: Request[Transport]) -> Status:
    """Decrypt the owner's secret, which is bound to the measure, into guest memory; may be repeated.

    Source: 55766, LAUNCH_SECRET; AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_launch_secret (order of checks).
    """
    buffer = request.buffer
    guest = live_guest(machine, buffer.handle)
    if guest is None:
        return Status.INVALID_GUEST
    if not aligned16(buffer.guest_spa):
        return Status.INVALID_ADDRESS
    if (
        buffer.header_bytes != PacketHeader.SIZE
        or not aligned16(buffer.guest_bytes)
        or not 0 < buffer.guest_bytes <= SCRATCH_BYTES
        or buffer.guest_bytes != buffer.transport_bytes
    ):
        return Status.INVALID_LENGTH
    if not allowed(guest, request.command):
        return Status.INVALID_GUEST_STATE
    if not guest.asid:
        return Status.INACTIVE
    status = transfers.output_status(machine, buffer.guest_spa, buffer.guest_bytes)
    if status:
        return status
    header = transfers.read(machine, buffer.header_spa, PacketHeader.SIZE)
    if header is None or not transfers.valid_range(machine, buffer.guest_spa, buffer.guest_bytes):
        return Status.INVALID_ADDRESS
    packet = transfers.read(machine, buffer.transport_spa, buffer.transport_bytes)
    if packet is None:
        return Status.INVALID_ADDRESS
    secret = crypto.open_packet(guest.keys, crypto.Context.LAUNCH_SECRET, header, packet, measure=guest.measure)
    if secret is None:
        return Status.BAD_MEASUREMENT
    if PacketHeader.from_bytes(header).compressed:
        return Status.UNSUPPORTED
    transfers.write_guest(machine, guest, buffer.guest_spa, secret)
    return Status.SUCCESS


def launch_finish(machine: Machine, request: Request[HandleOnly]) -> Status:
    """The guest runs: its transport keys are forgotten, a pending ASID is in use. No ASID is needed.

    Source: 55766, LAUNCH_FINISH; AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_launch_finish.
    """
    guest = guest_of(machine, request)
    if isinstance(guest, Status):
        return guest
    run_guest(sev_state(machine), guest)
    move_guest(guest, request.command)
    return Status.SUCCESS


def run_guest(sev: SevState, guest: Gctx) -> None:
    """What LAUNCH_FINISH and RECEIVE_FINISH do: a pending activation takes effect, the channel is closed."""
    asids.guest_runs(sev, guest)
    close_channel(guest)


def close_channel(guest: Gctx) -> None:
    """Forget the transport keys and all that belongs to the session."""
    guest.keys = NO_KEYS
    guest.nonce = bytes(NONCE_BYTES)
    guest.measure = bytes(32)


def attestation(machine: Machine, request: Request[Attestation]) -> Status:
    """A report of launch digest and policy with the caller's nonce, signed by the PEK.

    Source: Linux include/uapi/linux/psp-sev.h; AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_attestation.
    """
    buffer = request.buffer
    guest = guest_of(machine, request)
    if isinstance(guest, Status):
        return guest
    status = _room(machine, request, AttestationReport.SIZE)
    if status:
        return status
    signed = AttestationReport.build(mnonce=buffer.mnonce, launch_digest=guest.launch_digest, policy=guest.policy)[
        :REPORT_SIGNED_BYTES
    ]
    r, s = crypto.ecdsa_sign(sev_state(machine).identity.pek, signed)
    report = AttestationReport.build(
        mnonce=buffer.mnonce,
        launch_digest=guest.launch_digest,
        policy=guest.policy,
        signature_usage=Usage.PEK,
        signature_algorithm=Algorithm.ECDSA_SHA256,
        signature_r=r.to_bytes(NUMBER_BYTES, "little"),
        signature_s=s.to_bytes(NUMBER_BYTES, "little"),
    )
    transfers.write(machine, buffer.spa, report)
    request.answer(length=AttestationReport.SIZE)
    return Status.SUCCESS
