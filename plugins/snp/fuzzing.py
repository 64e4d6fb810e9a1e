"""What fuzzing needs of SNP: what a VMGEXIT carries, targets, oracles, and coordinates of state feedback."""

from __future__ import annotations

from collections.abc import Hashable
from struct import Struct
from typing import TYPE_CHECKING, Any

from sevlab.core.events import Party
from sevlab.core.oracle import Finding, Oracle, StateCounter, Target
from sevlab.core.payload import Message, Payload
from sevlab.core.units import PAGE_BYTES, PAGE_MASK, PAGE_SHIFT
from sevlab.core.vocabulary import Outcome, Record, spec_of
from sevlab.plugins.sev_es import Ghcb, MsrInfo, NaeCode, Vmgexit, msr_layout
from sevlab.plugins.snp.context import VMPCKS
from sevlab.plugins.snp.ghcb_events import EVENTS, MSR_REQUESTS
from sevlab.plugins.snp.layout import ASID, ASID_SHIFT, ASSIGNED, PAGE_SIZE
from sevlab.plugins.snp.records import MessageAnswered
from sevlab.plugins.snp.rmp import (
    BOOKKEEPING_BYTES,
    ENTRY_BYTES,
    PAGES_PER_2M,
    PAIR,
    entry_address,
    read_entry,
    region_of,
    state_of,
)
from sevlab.plugins.snp.states import PageState, SnpState, page_state, snp_state

if TYPE_CHECKING:
    from sevlab.core.machine import Machine
    from sevlab.core.state import StateDict, Stateful


COUNTERS_IN_TABLE = Struct("<1024Q")
"""The page counters of every ASID that an entry has room for."""


class RmpInvariants:
    """The table agrees with itself and with what the firmware remembers."""

    name = "snp.rmp"
    documentation = (
        "Between steps the RMP's page counters are the number of assigned pages of each ASID; every context page of the"
        " firmware's is in state Context and no other page is; the table's own pages stay Firmware."
        " Source: 56860, page states; AMD-ASPFW sev_rmp.c."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        state = snp_state(machine)
        if not state.rmp_base or not machine.components["sev"].snp_initialised:  # type: ignore[union-attr]
            return ()
        wrong = [
            f"the context page {spa:#x} is {state_of(machine, spa).name}"
            for spa in state.platform.guests
            if state_of(machine, spa) is not PageState.CONTEXT
        ]
        if state_of(machine, state.rmp_base) is not PageState.FIRMWARE:
            wrong.append("the table does not protect itself")
        return tuple(Finding(self.name, "state", message, spec_of(step).kind) for message in wrong)

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        state = snp_state(machine)
        if not state.rmp_base or not machine.components["sev"].snp_initialised:  # type: ignore[union-attr]
            return ()
        counted = count_assigned(machine)
        counters = COUNTERS_IN_TABLE.unpack(machine.memory.read(state.rmp_base, COUNTERS_IN_TABLE.size, None))
        wrong = [
            f"ASID {asid}: counted {counter}, assigned {counted.get(asid, 0)}"
            for asid, counter in enumerate(counters)
            if asid and counter != counted.get(asid, 0)
        ]
        return tuple(Finding(self.name, "counter", message) for message in wrong)


def count_assigned(machine: Machine) -> dict[int, int]:
    """How many 4 KiB pages each ASID has by the entries of the table."""
    state = snp_state(machine)
    first = state.rmp_base + BOOKKEEPING_BYTES
    counted: dict[int, int] = {}
    entries = (state.rmp_end + 1 - first) // ENTRY_BYTES
    raw = machine.memory.read(first, entries * ENTRY_BYTES, None)
    for low, _high in PAIR.iter_unpack(raw):
        asid = (low & ASID) >> ASID_SHIFT
        if low & ASSIGNED and asid:
            counted[asid] = counted.get(asid, 0) + (PAGES_PER_2M if low & PAGE_SIZE else 1)
    return counted


class MessageOrder:
    """A VMPCK's counter only grows, by two for each message: no number is used twice."""

    name = "snp.sequence"
    documentation = (
        "The firmware's count of each VMPCK is even and never goes back while its guest lives, and the guest's own"
        " count never runs ahead of it. Source: 56860, SNP_GUEST_REQUEST."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        wrong = [
            f"guest {spa:#x}, VMPCK {number}: count {count} is odd"
            for spa, guest in snp_state(machine).platform.guests.items()
            for number, count in enumerate(guest.message_counts)
            if count & 1
        ]
        answers = sum(isinstance(record, MessageAnswered) for record in outcome.records)
        if answers > 1:
            wrong.append(f"one message had {answers} answers")
        return tuple(Finding(self.name, "count", message, spec_of(step).kind) for message in wrong)

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        return ()


ORACLES: tuple[Oracle, ...] = (RmpInvariants(), MessageOrder())
_NAMES = tuple(oracle.name for oracle in ORACLES)
_RMP_STEPS = ("snp.rmpupdate", "snp.psmash", "snp.rmpread", "read", "write", "npt")

TARGETS: tuple[Target, ...] = (
    Target(
        "snp.commands",
        Party.HYPERVISOR,
        ("asp.command", "asp.read", "asp.write", "cache", *_RMP_STEPS),
        _NAMES,
        ("snp",),
        "SNP mailbox commands and RMP instructions of a hostile hypervisor.",
    ),
    Target(
        "snp.messages",
        Party.GUEST,
        ("snp.message", "sev_es.vmgexit", "write"),
        _NAMES,
        ("snp",),
        "Guest messages of a hostile guest to the firmware, through an honest hypervisor.",
    ),
    Target(
        "snp.psc",
        Party.GUEST,
        ("sev_es.vmgexit", "snp.pvalidate", "snp.rmpadjust", "snp.rmpquery", "write", "race"),
        _NAMES,
        ("snp",),
        "Page state changes and RMP instructions of a hostile guest.",
    ),
    Target(
        "snp.guest",
        Party.HYPERVISOR,
        (
            *(
                "snp.set-pages",
                "snp.message",
                "snp.create-ap",
                "snp.cpuid-page",
                "snp.doorbell",
                "snp.hv",
                "snp.hv-ipi",
            ),
            *("sev_es.forge", "sev_es.forge-msr", *_RMP_STEPS),
        ),
        _NAMES,
        ("snp",),
        "The reference guest against a hypervisor that forges replies and page states.",
    ),
)


# State feedback: what is read after every step is as it lies there; words are made of it once.

PAGES = 16
"""So many pages from the start of each VM's memory are looked at."""


def _snp(machine: Machine) -> SnpState:
    return machine.components["snp"]  # type: ignore[return-value]  # asked after every step: a cast costs a call


def _platform(machine: Machine) -> tuple[Hashable, ...]:
    platform = _snp(machine).platform
    return (platform.state, len(platform.guests), bool(platform.vlek))


def _platform_words(raw: tuple[Any, ...]) -> tuple[str, ...]:
    state, guests, vlek = raw
    return (state.name, f"guests{min(guests, 3)}", f"vlek{int(vlek)}")


def _guests(machine: Machine) -> tuple[Hashable, ...]:
    guests = _snp(machine).platform.guests.values()
    return tuple([(guest.state, bool(guest.asid), guest.imi_en) for guest in guests])


def _guest_words(raw: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(f"{state.name}{int(assigned)}{int(imi_en)}" for state, assigned, imi_en in raw)


def _messages(machine: Machine) -> tuple[Hashable, ...]:
    return tuple([guest.message_counts for guest in _snp(machine).platform.guests.values()])


def _message_words(raw: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple("".join(str(min(counts[number] // 2, 3)) for number in range(VMPCKS)) for counts in raw)


def _pages(machine: Machine) -> tuple[Hashable, ...]:
    """The entries of the first pages of each VM, with the one that rules their region of 2 MiB."""
    found = []
    for vm in machine.hypervisor.vms.values():
        spa = vm.memory_spa
        first, head = entry_address(machine, spa), read_entry(machine, region_of(spa))
        raw = b"" if first is None else machine.memory.read(first, PAGES * ENTRY_BYTES, None)
        found.append((raw, head.low if head is not None and head.huge and head.low & ASSIGNED else None))
    return tuple(found)


def _page_parts(machine: Machine) -> tuple[Stateful | StateDict[Any, Any] | int, ...]:
    """The pages of the table that `_pages` looks at, and the state, which says where the table is."""
    spas = [vm.memory_spa + offset for vm in machine.hypervisor.vms.values() for offset in (0, PAGES * PAGE_BYTES)]
    spas += [region_of(spa) for spa in spas]
    places = {entry_address(machine, spa) for spa in spas} - {None}
    return (snp_state(machine), *sorted({place >> PAGE_SHIFT for place in places if place is not None}))


def _page_words(raw: tuple[Any, ...]) -> tuple[str, ...]:
    """Which page states occur: a small set, not their number."""
    words = []
    for entries, head in raw:
        lows = {
            low if head is None or low & (ASSIGNED | ASID) != ASSIGNED else head for low, _ in PAIR.iter_unpack(entries)
        }
        words.append("".join(sorted({page_state(low).name[:9] for low in lows})))
    return tuple(words)


def _vmpls(machine: Machine) -> tuple[Hashable, ...]:
    return tuple([(vcpu.vmpl, vcpu.halted, vcpu.stopped) for vcpu in machine.vcpus.values()])


def _vmpl_words(raw: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(f"{vmpl}{int(halted)}{int(stopped)}" for vmpl, halted, stopped in raw)


COUNTERS: tuple[StateCounter, ...] = (
    StateCounter("snp.platform", _platform, _platform_words, lambda machine: (snp_state(machine).platform,)),
    StateCounter("snp.guest", _guests, _guest_words, lambda machine: (snp_state(machine).platform,)),
    StateCounter("snp.messages", _messages, _message_words, lambda machine: (snp_state(machine).platform,)),
    StateCounter("snp.page", _pages, _page_words, _page_parts),
    StateCounter("snp.vcpus", _vmpls, _vmpl_words),
)


# What a VMGEXIT of an SNP guest carries -------------------------------------------------------------------------------

GHCB_GPA = 0x5000
"""Where fuzzed guests have their GHCB."""

CODE = Ghcb.FIELDS["sw_exit_code"]


def _page_message(record: Record) -> int | None:
    if not isinstance(record, Vmgexit) or record.ghcb_msr & PAGE_MASK:
        return None
    code = int.from_bytes(record.page[CODE.offset : CODE.offset + 8], "little")
    return code if code in EVENTS else None


def _place(machine: Machine, record: Record) -> int | None:
    """SPA of the GHCB that a VMGEXIT names."""
    vcpu = machine.vcpus.get(record.vcpu) if isinstance(record, Vmgexit) else None
    return None if vcpu is None else machine.access.translate_gpa(vcpu, record.ghcb_msr)  # type: ignore[attr-defined]


def _msr_message(record: Record) -> int | None:
    info = record.ghcb_msr & msr_layout.INFO_MASK if isinstance(record, Vmgexit) else 0
    return info if info in MSR_REQUESTS else None


GHCB_PAYLOADS: tuple[Payload, ...] = (
    Payload(
        "sev_es.vmgexit",
        "page",
        _page_message,
        tuple(
            Message(
                int(code),
                NaeCode(code).name,
                Ghcb,
                {"ghcb_msr": GHCB_GPA},
                {
                    "sw_exit_code": int(code),
                    "sw_exit_info_1": 0,
                    "sw_exit_info_2": 0,
                    "protocol_version": 2,
                    **event.example,
                    **({} if event.scratch is None else {"sw_scratch": GHCB_GPA + 0x800}),
                },
                event.inputs,
            )
            for code, event in sorted(EVENTS.items())
        ),
        place_of=_place,
    ),
    Payload(
        "sev_es.vmgexit",
        "ghcb_msr",
        _msr_message,
        tuple(
            Message(int(info), MsrInfo(info).name, request.request, fields={"info": int(info)})
            for info, request in sorted(MSR_REQUESTS.items())
        ),
    ),
)
"""The events and requests that this plugin adds to those of `sev_es`."""
