"""Rules of legal order that SNP's events add to those of the GHCB: page states (R10) and messages (R12).

They warn while `plugin.sev_es.order` is on; a hypervisor answers all the same.
Source: 56421, page state change and SNP guest request; Linux arch/x86/coco/sev/core.c (set_pages_state,
pvalidate_pages), drivers/virt/coco/sev-guest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from sevlab.core.state import StateDict, Stateful, new
from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES
from sevlab.plugins.sev_es import Broken, Ghcb, OrderWarning, msr_layout, sev_es_state
from sevlab.plugins.snp.hypervisor import page_spa
from sevlab.plugins.snp.layout import ASSIGNED, VALIDATED
from sevlab.plugins.snp.messages import HEADER_BYTES, MessageHeader
from sevlab.plugins.snp.psc import MAX_ENTRIES, PscHeader, PscOperation, parse_psc
from sevlab.plugins.snp.rmp import owning_entry

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

COMPONENT = "snp.order"
PSC_BYTES = PscHeader.SIZE * (1 + MAX_ENTRIES)


class MessagesSent(Stateful):
    """The last message of each VM and VMPCK: its number and its bytes."""

    last: StateDict[tuple[int, int], tuple[int, bytes]] = new(StateDict)


def _memory(machine: Machine, vcpu: Vcpu, gpa: int, length_bytes: int) -> bytes | None:
    """Guest memory in the open, without a counted fetch: the checker is no part of the hypervisor."""
    spa = machine.access.translate_gpa(vcpu, gpa)
    if spa is None or spa + length_bytes > machine.memory.size_bytes:
        return None
    return machine.memory.read(spa, length_bytes, None)


# R10 ------------------------------------------------------------------------------------------------------------------


def _validated(machine: Machine, vcpu: Vcpu, gpa: int) -> bool:
    spa = page_spa(machine, vcpu.vm_id, gpa, PAGE_BYTES)
    found = None if spa is None else owning_entry(machine, spa)
    return found is not None and found[1].low & (ASSIGNED | VALIDATED) == ASSIGNED | VALIDATED


def _one_page(machine: Machine, vcpu: Vcpu, gpa: int, operation: int) -> Iterator[Broken]:
    if operation in (PscOperation.SHARED, PscOperation.PRIVATE) and _validated(machine, vcpu, gpa):
        wanted = "shared" if operation == PscOperation.SHARED else "private"
        yield Broken("R10", f"page {gpa:#x} is to become {wanted} while it is validated")


def page_states(machine: Machine, vcpu: Vcpu, page: Ghcb | int) -> Iterator[Broken]:
    """R10: to shared, PVALIDATE rescinds first; to private, PVALIDATE comes after the page state change."""
    if isinstance(page, int):
        request = msr_layout.PageStateRequest.from_bytes(page.to_bytes(8, "little"))
        yield from _one_page(machine, vcpu, request.gfn * PAGE_BYTES, request.operation)
        return
    scratch = page.value_or_zero("sw_scratch")
    room = min(PSC_BYTES, PAGE_BYTES - scratch % PAGE_BYTES)
    raw = _memory(machine, vcpu, scratch, room) if room >= PscHeader.SIZE else None
    if raw is None:
        return
    header, entries = parse_psc(raw)
    for entry in entries[header.cur_entry :]:
        pages = range(0, PAGE_2M_BYTES if entry.large else PAGE_BYTES, PAGE_BYTES)
        for offset in pages:
            broken = tuple(_one_page(machine, vcpu, entry.gfn * PAGE_BYTES + offset, entry.operation))
            yield from broken
            if broken:
                break


def validated_too_early(machine: Machine, vcpu: Vcpu, gpa: int) -> None:
    """R10 from the other side: PVALIDATE of a page that no page state change has made the guest's."""
    spa = page_spa(machine, vcpu.vm_id, gpa, PAGE_BYTES)
    found = None if spa is None else owning_entry(machine, spa)
    if sev_es_state(machine).warns and found is not None and not found[1].low & ASSIGNED:
        machine.emit(OrderWarning(vcpu.vcpu_id, "R10", f"page {gpa:#x} is validated before it was made private"))


# R12 ------------------------------------------------------------------------------------------------------------------


def message(machine: Machine, vcpu: Vcpu, page: Ghcb | int) -> Iterator[Broken]:
    """R12: the numbers of a VMPCK's messages are odd and go up by 2; what is sent again is the same to the byte."""
    assert not isinstance(page, int)  # an event of the page
    raw = _memory(machine, vcpu, page.value_or_zero("sw_exit_info_1"), PAGE_BYTES)
    if raw is None:
        return
    header = MessageHeader.from_bytes(raw[:HEADER_BYTES])
    sent = raw[: HEADER_BYTES + header.msg_size]
    messages = cast("MessagesSent", machine.components[COMPONENT]).last
    key = vcpu.vm_id, header.msg_vmpck
    before = messages.get(key)
    messages[key] = header.msg_seqno, sent
    if not header.msg_seqno & 1:
        yield Broken("R12", f"message number {header.msg_seqno} is even")
    elif before is not None and header.msg_seqno == before[0]:
        if sent != before[1]:
            yield Broken("R12", f"message {header.msg_seqno} is sent again with other bytes")
    elif before is not None and header.msg_seqno != before[0] + 2:
        yield Broken("R12", f"message {header.msg_seqno} follows message {before[0]}")
