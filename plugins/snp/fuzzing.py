"""What fuzzing needs of SNP: what a VMGEXIT carries, and coordinates of state feedback."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from sevlab.core.oracle import StateCounter
from sevlab.core.payload import Message, Payload
from sevlab.core.units import PAGE_BYTES, PAGE_MASK, PAGE_SHIFT
from sevlab.core.vocabulary import Record
from sevlab.plugins.sev_es import SHARED_BUFFER_BYTES, SHARED_BUFFER_OFFSET, Ghcb, MsrInfo, NaeCode, Vmgexit, msr_layout
from sevlab.plugins.snp.context import VMPCKS
from sevlab.plugins.snp.ghcb_events import EVENTS, MSR_REQUESTS
from sevlab.plugins.snp.layout import ASID, ASSIGNED
from sevlab.plugins.snp.psc import PscHeader
from sevlab.plugins.snp.rmp import ENTRY_BYTES, PAIR, entry_address, read_entry, region_of
from sevlab.plugins.snp.states import SnpState, page_state, snp_state

if TYPE_CHECKING:
    from sevlab.core.machine import Machine
    from sevlab.core.state import StateDict, Stateful


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

PSC_AT, PSC_END = SHARED_BUFFER_OFFSET, SHARED_BUFFER_OFFSET + SHARED_BUFFER_BYTES
"""Where in the GHCB the structure of a page state change lies, and where its room ends."""

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


EXAMPLES: dict[int, tuple[dict[str, int], ...]] = {
    NaeCode.SNP_AP_CREATION: tuple(
        {"sw_exit_info_1": apic_id << 32 | request, "rax": 1} for apic_id in (0, 1, 2) for request in (0, 1, 2, 3)
    ),
    NaeCode.SNP_PAGE_STATE_CHANGE: tuple(
        {"sw_scratch": GHCB_GPA + offset} for offset in (PSC_AT, PSC_END - 16, PSC_END - 8, PSC_END - 7)
    ),
    NaeCode.SNP_RUN_VMPL: tuple({"sw_exit_info_1": vmpl} for vmpl in range(5)),
}
"""Requests that the document tells apart, and the first past them."""

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
                examples=EXAMPLES.get(code, ()),
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

FORGED_PSC: Payload = Payload(
    "sev_es.forge",
    "data",
    lambda record: PSC_AT if getattr(record, "offset", None) == PSC_AT else None,
    (Message(PSC_AT, "PSC_HEADER", PscHeader, {"offset": PSC_AT}, needs=("cur_entry", "end_entry", "reserved_4")),),
)
"""What a hostile hypervisor makes of a page state change."""
