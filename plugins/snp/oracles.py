"""Oracles of SNP: the RMP, the firmware's contexts and counters, and what the reference guest takes for done."""

from __future__ import annotations

from itertools import pairwise
from struct import Struct
from typing import TYPE_CHECKING

from sevlab.core.cpu import FaultUnwind
from sevlab.core.crypto import ZERO_PAGE
from sevlab.core.events import Done
from sevlab.core.memory import TAG_ASP, split_pages
from sevlab.core.oracle import Finding, Oracle
from sevlab.core.units import PAGE_SHIFT
from sevlab.core.vocabulary import Outcome, Record, spec_of
from sevlab.plugins.sev_es import SHARED_BUFFER_OFFSET, GhcbRequest, NaeCode, guest_side
from sevlab.plugins.snp.layout import ASID, ASID_SHIFT, ASSIGNED, PAGE_SIZE
from sevlab.plugins.snp.psc import PscHeader, parse_psc
from sevlab.plugins.snp.records import MessageAnswered, SetPages
from sevlab.plugins.snp.rmp import BOOKKEEPING_BYTES, PAGES_PER_2M, PAIR, state_of
from sevlab.plugins.snp.states import PageState, snp_state

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

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
        table = range(state.rmp_base >> PAGE_SHIFT, (state.rmp_end >> PAGE_SHIFT) + 1)
        if not any(pfn in table for pfn in machine.memory.written()):
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
    state, memory = snp_state(machine), machine.memory
    counted: dict[int, int] = {}
    first = state.rmp_base + BOOKKEEPING_BYTES
    for start, length_bytes in split_pages(first, state.rmp_end + 1 - first):
        page = memory.pages.get(start >> PAGE_SHIFT)
        if page is None or page.data == ZERO_PAGE:
            continue  # most of the table: pages that are nobody's
        for low, _high in PAIR.iter_unpack(memory.read(start, length_bytes, None)):
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


class ContextOwnership:
    """An ASID is one guest's."""

    name = "snp.contexts"
    documentation = (
        "Of the firmware's guests no two have the same ASID, and each active one's memory key is its own: else one"
        " guest's pages are read under the other's number. Source: 56860, SNP_ACTIVATE; CVE-2021-26327."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        owners: dict[int, int] = {}
        wrong = []
        for spa, guest in snp_state(machine).platform.guests.items():
            if guest.asid and guest.asid in owners:
                wrong.append(f"ASID {guest.asid} belongs to the contexts {owners[guest.asid]:#x} and {spa:#x}")
            owners[guest.asid] = spa
        return tuple(Finding(self.name, "asid", message, spec_of(step).kind) for message in wrong)

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        return ()


class FirmwareWrites:
    """The firmware does not write over a guest's pages in the host's name."""

    name = "snp.firmware-writes"
    after: tuple[str, ...] = ()
    documentation = (
        "No page that the RMP has as a guest's and validated holds bytes that the firmware put there without the"
        " guest's key: the output of a command goes to pages of the firmware's."
        " Source: CVE-2021-26323; AMD-ASPFW sev_uapp/src/sev_rmp.c (check_page_range_firmware_writable)."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        return ()

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        if not machine.components["sev"].snp_initialised:  # type: ignore[union-attr]
            return ()
        findings = []
        for pfn in machine.memory.written():
            page = machine.memory.pages.get(pfn)
            if page is None or page.key is not None or TAG_ASP not in (page.tags or (page.tag,)):
                continue
            if state_of(machine, pfn << PAGE_SHIFT) is PageState.GUEST_VALID:
                findings.append(Finding(self.name, "owner", f"the firmware wrote to the guest's page {pfn << 12:#x}"))
        return tuple(findings)


class PscProgress:
    """The reference guest takes a page state change for done only when the reply says so, entry by entry."""

    name = "snp.psc"
    after = ("snp.set-pages",)
    documentation = (
        "Within one request for page states CUR_ENTRY never goes back and END_ENTRY and the entries stay as they were;"
        " a guest that says it is done has a reply whose CUR_ENTRY is past the last entry, and no more."
        " Source: 56421, page state change; Linux arch/x86/coco/sev/core.c (vmgexit_psc)."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        if not isinstance(step, SetPages):
            return ()
        asked = [
            record.data
            for record in outcome.records
            if isinstance(record, GhcbRequest) and record.exit_code == NaeCode.SNP_PAGE_STATE_CHANGE
        ]
        wrong: tuple[str, str] | None = None
        for before, after in pairwise(asked):
            wrong = wrong or self._step_back(before, after)
        if wrong is None and asked and outcome.first(Done) is not None:
            wrong = self._unfinished(machine, step.vcpu, asked[-1])
        return () if wrong is None else (Finding(self.name, *wrong, spec_of(step).kind),)

    @staticmethod
    def _step_back(before: bytes, after: bytes) -> tuple[str, str] | None:
        """What is wrong with a request that follows another one of the same structure."""
        (old, entries), (new, more) = parse_psc(before), parse_psc(after)
        if not new.cur_entry and [entry.gfn for entry in more] != [entry.gfn for entry in entries]:
            return None  # the next part of a long list
        if new.cur_entry < old.cur_entry:
            return "backwards", f"CUR_ENTRY went from {old.cur_entry} to {new.cur_entry}"
        if new.end_entry != old.end_entry or len(after) != len(before):
            return "end", f"END_ENTRY went from {old.end_entry} to {new.end_entry}"
        return None

    @staticmethod
    def _unfinished(machine: Machine, vcpu_id: int, sent: bytes) -> tuple[str, str] | None:
        """What is wrong with a reply that the guest took for the last one."""
        vcpu = machine.vcpus[vcpu_id]
        try:
            place = machine.access.guest_physical(vcpu, guest_side(machine, vcpu).ghcb_gpa + SHARED_BUFFER_OFFSET, 0)
        except FaultUnwind:  # the GHCB is gone: nobody can say what the reply was
            return None
        header = PscHeader.from_bytes(machine.memory.read(place.spa, PscHeader.SIZE, None))
        count = (len(sent) - PscHeader.SIZE) // ENTRY_OF_PSC
        if (header.cur_entry, header.end_entry) == (count, count - 1):
            return None
        return "undone", f"done, with CUR_ENTRY {header.cur_entry} and END_ENTRY {header.end_entry} of {count} entries"

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        return ()


ENTRY_OF_PSC = 8
"""Bytes of an entry of the structure."""

ORACLES: tuple[Oracle, ...] = (
    RmpInvariants(),
    MessageOrder(),
    ContextOwnership(),
    FirmwareWrites(),
    PscProgress(),
)
