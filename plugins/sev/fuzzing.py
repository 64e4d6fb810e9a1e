"""What fuzzing of SEV's mailbox needs, as data: a target that starts with guests in several states, and oracles."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from sevlab.core.events import AspCommand, AspStatus, Party
from sevlab.core.listening import steps_of
from sevlab.core.oracle import Finding, Oracle, StateCounter, Target
from sevlab.core.units import PAGE_BYTES
from sevlab.core.vocabulary import Outcome, Record, spec_of
from sevlab.plugins.sev import driver
from sevlab.plugins.sev.buffers import HandleOnly
from sevlab.plugins.sev.certificates import SevCertificate
from sevlab.plugins.sev.context import sev_state
from sevlab.plugins.sev.numbers import Command
from sevlab.plugins.sev.owner import open_session
from sevlab.plugins.sev.states import GUEST, PLATFORM, GuestState, PlatformState

if TYPE_CHECKING:
    from sevlab.core.machine import Machine


class ContextInvariants:
    """The firmware's contexts, ASIDs and platform state agree."""

    name = "sev.contexts"
    documentation = (
        "Between commands: an ASID belongs to at most one guest; a guest that is UNINIT is gone; the platform is"
        " WORKING exactly while there are guests; only guests of SEV-ES have checksums of VMSAs."
        " Source: 55766, platform and guest state machines."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        sev = sev_state(machine)
        owners: dict[int, int] = {}
        wrong: list[tuple[str, str]] = []
        for handle, guest in sev.guests.items():
            if guest.asid and guest.asid in owners:
                wrong.append(("asid", f"ASID {guest.asid} belongs to guests {owners[guest.asid]} and {handle}"))
            owners[guest.asid] = handle
            if guest.state is GuestState.UNINIT:
                wrong.append(("state", f"guest {handle} is UNINIT and still there"))
            if guest.vmsa_slots and not guest.es:
                wrong.append(("vmsa", f"guest {handle} has checksums of VMSAs without SEV-ES"))
        if (sev.state is PlatformState.WORKING) != bool(sev.guests):
            wrong.append(("platform", f"the platform is {sev.state.name} with {len(sev.guests)} guests"))
        return tuple(Finding(self.name, rule, message, spec_of(step).kind) for rule, message in wrong)

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        return ()


class ResourceBalance:
    """What the firmware holds for guests belongs to guests that live."""

    name = "sev.balance"
    after: tuple[str, ...] = ("asp.command",)
    documentation = (
        "A guest whose DECOMMISSION was answered with SUCCESS is gone, and its handle names nobody; every checksum of a"
        " VMSA in the TMR belongs to a live guest, and no slot to two. Source: 55766, DECOMMISSION; CVE-2021-47389."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        if not isinstance(step, AspCommand) or step.command != Command.DECOMMISSION or step.interface != "sev":
            return ()
        answer = outcome.first(AspStatus)
        handle = HandleOnly.from_bytes(step.buffer[: HandleOnly.SIZE].ljust(HandleOnly.SIZE, b"\0")).handle
        if answer is None or answer.status or handle not in sev_state(machine).guests:
            return ()
        return (Finding(self.name, "context", f"guest {handle} was decommissioned and is there", spec_of(step).kind),)

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        sev = sev_state(machine)
        held = [slot for guest in sev.guests.values() for slot in guest.vmsa_slots]
        wrong = []
        if len(set(held)) != len(held):
            wrong.append("two guests hold one slot of the TMR")
        if set(sev.tmr.checksums) - set(held):
            wrong.append("a slot of the TMR belongs to no live guest")
        return tuple(Finding(self.name, "tmr", message) for message in wrong)


ORACLES: tuple[Oracle, ...] = (ContextInvariants(), ResourceBalance())


def _platform(machine: Machine) -> tuple[Hashable, ...]:
    return (machine.components["sev"].state,)  # type: ignore[union-attr]  # asked after every step


def _guests(machine: Machine) -> tuple[Hashable, ...]:
    return tuple([guest.state for guest in machine.components["sev"].guests.values()])  # type: ignore[union-attr]


COUNTERS: tuple[StateCounter, ...] = (
    StateCounter(PLATFORM.name, _platform, of=lambda machine: (sev_state(machine),)),
    StateCounter(GUEST.name, _guests, of=lambda machine: (sev_state(machine),)),
)


def boot(machine: Machine) -> None:
    """A platform with one guest that runs, and one whose launch has begun."""
    driver.launch_guest(machine, 0, loads={0x1000: bytes(64)})
    driver.begin_launch(machine, 1)


def seeds(machine: Machine) -> tuple[tuple[Record, ...], ...]:
    """Whole lives of guests, and the platform's commands."""
    page = driver.scratch_page(machine) + PAGE_BYTES
    second = machine.hypervisor.vms[1]
    guests = sev_state(machine).guests
    handle = max(guests)
    running = driver.Launched(min(guests), guests[min(guests)].asid, b"")

    def finish() -> None:
        driver.load(machine, second, driver.Launched(handle, 0, b""), 0x2000, bytes(range(64)))
        driver.run(machine, Command.LAUNCH_MEASURE, handle=handle, spa=page, length=0x30)
        driver.run(machine, Command.LAUNCH_FINISH, handle=handle)
        driver.run(machine, Command.GUEST_STATUS, handle=handle)

    def stop() -> None:
        driver.stop_guest(machine, running)
        driver.flush(machine)
        driver.begin_launch(machine, 0)

    def platform() -> None:
        driver.run(machine, Command.PLATFORM_STATUS)
        driver.run(machine, Command.PDH_CERT_EXPORT, pdh_spa=page, pdh_bytes=0x824, chain_spa=page + PAGE_BYTES,
                   chain_bytes=0x2000)  # fmt: skip
        driver.run(machine, Command.SHUTDOWN)
        driver.run(machine, Command.INIT, **driver.tmr_fields(machine))

    def arrive() -> None:
        """A guest that another platform sent: it cannot run yet, and is given up."""
        fields = owner_fields(machine, page)
        arrived = driver.need(machine, Command.RECEIVE_START, **fields).handle
        driver.run(machine, Command.ACTIVATE, handle=arrived, asid=running.asid + 2)
        driver.run(machine, Command.GUEST_STATUS, handle=arrived)
        driver.run(machine, Command.DEACTIVATE, handle=arrived)
        driver.run(machine, Command.DECOMMISSION, handle=arrived)

    def owned() -> None:
        """A launch with its owner's session."""
        started = driver.need(machine, Command.LAUNCH_START, **owner_fields(machine, page)).handle
        driver.run(machine, Command.DECOMMISSION, handle=started)

    return tuple(steps_of(machine, call) for call in (owned, arrive, finish, stop, platform))


def owner_fields(machine: Machine, page: int) -> dict[str, int]:
    """An owner's certificate and session at `page` and behind it, as fields of LAUNCH_START and RECEIVE_START."""
    places = {"pdh_spa": page, "pdh_bytes": SevCertificate.SIZE, "chain_spa": page + PAGE_BYTES, "chain_bytes": 0x2000}
    driver.need(machine, Command.PDH_CERT_EXPORT, **places)
    pdh = SevCertificate.from_bytes(driver.get(machine, page, SevCertificate.SIZE))
    session = open_session(pdh, 0, machine.entropy)
    certificate = session.certificate.to_bytes()
    driver.put(machine, page, certificate)
    driver.put(machine, page + PAGE_BYTES, session.session)
    return {
        "dh_spa": page,
        "dh_bytes": len(certificate),
        "session_spa": page + PAGE_BYTES,
        "session_bytes": len(session.session),
    }


TARGETS: tuple[Target, ...] = (
    Target(
        "sev.commands",
        Party.HYPERVISOR,
        ("asp.command", "asp.write", "asp.read", "write", "read", "cache", "msr"),
        tuple(oracle.name for oracle in ORACLES),
        ("sev",),
        "SEV mailbox commands of a hostile hypervisor: any order, any buffer, any page.",
        boot=boot,
        seeds=seeds,
    ),
)
