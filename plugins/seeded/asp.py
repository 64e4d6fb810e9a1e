"""Bugs of the Secure Processor's legacy commands, and of the host that sends them."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from sevlab.core.access import ASP, AccessKind
from sevlab.core.buffers import CheckedBuffer
from sevlab.core.errors import InvariantViolation
from sevlab.core.units import PAGE_BYTES
from sevlab.plugins import sev
from sevlab.plugins.seeded.planting import Bug, seeded_state
from sevlab.plugins.sev import Command, GuestState, Status

if TYPE_CHECKING:
    from typing import Any

    from sevlab.core import asp
    from sevlab.core.asp import CommandHandler
    from sevlab.core.events import Fault
    from sevlab.core.machine import Machine
    from sevlab.plugins.seeded.planting import Mark, Planter

LAYOUTS = {declared.command: declared.buffer for declared in sev.LEGACY_COMMANDS}
REPLY_BYTES = {Command.LAUNCH_MEASURE: 0x30, Command.ATTESTATION: 0xD0}
"""What these write; the rest of the room stays as it was."""

CERTIFICATE_BYTES = 0x824


def fields(command: asp.Command) -> Any:
    """The command buffer, decoded."""
    layout = LAYOUTS[Command(command.number)]
    assert layout is not None  # only commands with a buffer are asked for
    return layout.from_bytes(command.buffer)


def legacy_cmd_on_snp(plan: Planter, mark: Mark) -> None:
    """A legacy command writes wherever its buffers point: the RMP is not asked about the pages.

    Source: CVE-2021-26323; AMD-ASPFW sev_uapp/src/sev_rmp.c (check_page_range_firmware_writable).
    """

    def make(original: Any) -> Any:
        def access_check(actor: Any, spa: int, gpa: int, kind: int) -> Fault | None:
            fault: Fault | None = original(actor, spa, gpa, kind)
            if actor is ASP and kind & AccessKind.WRITE:
                mark.reached()
                if fault is not None and mark.triggers():
                    return None
            return fault

        return access_check

    plan.builder.replace_slot("access_check", make)


def reply_not_cleared(plan: Planter, mark: Mark) -> None:
    """A reply that is shorter than its room is copied with the room's length, out of a scratch nobody cleared.

    Source: CVE-2021-26404 and CVE-2023-31346.
    """

    def make(original: CommandHandler) -> CommandHandler:
        def run(machine: Machine, command: asp.Command) -> int:
            buffer = fields(command)
            status = original(machine, command)
            written = REPLY_BYTES[Command(command.number)]
            room = min(buffer.length, PAGE_BYTES)
            place = machine.access.asp_place(buffer.spa, room)
            if not status and place is not None:
                mark.reached()
                if room > written and mark.triggers():
                    rest = CheckedBuffer(room - written)
                    rest.store(0, machine.memory, place.spa + written, rest.size, place.key)
            return status

        return run

    for number in REPLY_BYTES:
        plan.command(number, make)


def pdh_offcurve(plan: Planter, mark: Mark) -> None:
    """The PDH's private key is multiplied with whatever point the other side sends.

    The multiplication demands a point of P-384 and says so. Source: CVE-2019-9836.
    """

    def make(original: CommandHandler) -> CommandHandler:
        def run(machine: Machine, command: asp.Command) -> int:
            buffer = fields(command)
            status = original(machine, command)
            if status in (Status.SUCCESS, Status.INVALID_CERTIFICATE, Status.BAD_MEASUREMENT) and buffer.dh_spa:
                mark.reached()
                if status == Status.INVALID_CERTIFICATE and is_off_curve(machine, buffer.dh_spa) and mark.triggers():
                    raise InvariantViolation("crypto.point", "the PDH is multiplied with a point that is not on P-384")
            return status

        return run

    for number in (Command.LAUNCH_START, Command.RECEIVE_START):
        plan.command(number, make)


def is_off_curve(machine: Machine, address: int) -> bool:
    """Whether there is a PDH certificate whose only flaw is its point."""
    place = machine.access.asp_place(address, CERTIFICATE_BYTES)
    if place is None:
        return False
    data = machine.memory.read(place.spa, CERTIFICATE_BYTES, place.key)
    certificate = sev.certificates.SevCertificate.from_bytes(data)
    pdh = certificate.pubkey_usage == sev.certificates.Usage.PDH
    if certificate.certificate_version != 1 or not pdh or certificate.pubkey_algo != sev.Algorithm.ECDH_SHA256:
        return False
    key = sev.EcPublicKey.from_bytes(certificate.pubkey[: sev.EcPublicKey.SIZE])
    x, y = (int.from_bytes(number, "little") for number in (key.qx, key.qy))
    return sev.crypto.public_key(sev.Point(x, y)) is None


def receive_ctx_leak(plan: Planter, mark: Mark) -> None:
    """A guest that came in and could not be bound to an ASID keeps its context: its DECOMMISSION gets lost.

    The published fault is the host's, which does not send it; the context that stays is the same. Source:
    CVE-2021-47389, Linux f1815e0aa770 and 934002cd660b (arch/x86/kvm/svm/sev.c).
    """

    def make_activate(original: CommandHandler) -> CommandHandler:
        def activate(machine: Machine, command: asp.Command) -> int:
            handle = fields(command).handle
            guest = sev.sev_state(machine).guests.get(handle)
            status = original(machine, command)
            if guest is not None and guest.state is GuestState.RUPDATE:
                mark.reached()
                if status:
                    state = seeded_state(machine)
                    state.unbound = tuple(sorted({*state.unbound, handle}))
            return status

        return activate

    def make_decommission(original: CommandHandler) -> CommandHandler:
        def decommission(machine: Machine, command: asp.Command) -> int:
            handle = fields(command).handle
            state = seeded_state(machine)
            if handle in state.unbound and handle in sev.sev_state(machine).guests:
                if mark.triggers():
                    return cast("int", Status.SUCCESS)
                state.unbound = tuple(one for one in state.unbound if one != handle)
            return original(machine, command)

        return decommission

    plan.command(Command.ACTIVATE, make_activate)
    plan.command(Command.DECOMMISSION, make_decommission)


BUGS = (
    Bug("S19", "legacy-cmd-on-snp", 50, "snp.firmware-writes", legacy_cmd_on_snp, stateful=True),
    Bug("S22", "reply-not-cleared", 55, "invariant", reply_not_cleared, stateful=True),
    Bug("S23", "pdh-offcurve", 49, "invariant", pdh_offcurve),
    Bug("S24", "receive-ctx-leak", 14, "sev.balance", receive_ctx_leak, stateful=True),
)
"""Those of this file."""
