"""Bugs of SNP: page states, vCPU creation, guest messages, contexts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.buffers import CheckedBuffer
from sevlab.core.memory import TAG_PUBLIC
from sevlab.core.units import MASK64, PAGE_BYTES, PAGE_MASK
from sevlab.plugins.seeded.planting import Bug
from sevlab.plugins.sev import Command, Status
from sevlab.plugins.sev_es import GuestReply, NaeCode, Outcome, PageExit, Reply, VcResult
from sevlab.plugins.sme import install_key, sme_state
from sevlab.plugins.snp import (
    HEADER_BYTES,
    MAX_ENTRIES,
    Agent,
    MessageHeader,
    PscEntryValue,
    PscHeader,
    SetPages,
    SnpActivate,
    SnpGuestRequest,
    build_psc,
    change_page_states,
    header_is_legal,
    parse_psc,
    snp_state,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from sevlab.core import asp
    from sevlab.core.asp import CommandHandler
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine
    from sevlab.plugins.seeded.planting import Mark, Planter
    from sevlab.plugins.sev_es import Ghcb, Scratch, VcHandler

AP_DESTROY = 2
INVALID_PAGE = MASK64 & -PAGE_BYTES
"""What stands for "no page" in the faulty hypervisor."""
ENTRY_BYTES = 8


def psc_wrong_bound(plan: Planter, mark: Mark) -> None:
    """END_ENTRY is compared with what the protocol allows, not with the buffer that the structure lies in.

    Source: Linux db3f219 (fixes 4af663c, arch/x86/kvm/svm/sev.c); https://cyberstan.co.uk/sev-snp-oob.
    """

    def make(original: Callable[..., Reply]) -> Callable[..., Reply]:
        def handler(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
            assert scratch is not None  # declared
            mark.reached()
            end_entry = int.from_bytes(scratch.rest[2:4], "little")
            room = (len(scratch.rest) - PscHeader.SIZE) // ENTRY_BYTES
            if room <= end_entry < MAX_ENTRIES and mark.triggers():
                structure = CheckedBuffer.of(scratch.rest, TAG_PUBLIC)
                for number in range(end_entry + 1):
                    structure.read(PscHeader.SIZE + number * ENTRY_BYTES, ENTRY_BYTES)
            return original(machine, vcpu, ghcb, scratch)

        return handler

    plan.event(NaeCode.SNP_PAGE_STATE_CHANGE, make)


def destroy_then_run(plan: Planter, mark: Mark) -> None:
    """A vCPU whose save area was taken away stays in the scheduler's hands, with an address that is none.

    Source: Linux arch/x86/kvm/svm/sev.c (pre_sev_run refuses a vCPU whose VMSA address is invalid).
    """

    def make(original: Callable[..., Reply]) -> Callable[..., Reply]:
        def handler(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
            vcpu_ids = machine.hypervisor.vms[vcpu.vm_id].vcpu_ids
            apic_id = ghcb.sw_exit_info_1 >> 32
            target = machine.vcpus[vcpu_ids[apic_id]] if apic_id < len(vcpu_ids) else None
            ran = target is not None and not target.halted
            reply: Reply = original(machine, vcpu, ghcb, scratch)
            if target is not None and not reply.info_1 and ghcb.sw_exit_info_1 & 0xFFFF == AP_DESTROY:
                mark.reached()
                if ran and target.halted and mark.triggers():
                    target.halted, target.vmcb.vmsa_pa = False, INVALID_PAGE
            return reply

        return handler

    plan.event(NaeCode.SNP_AP_CREATION, make)


def psc_backwards(plan: Planter, mark: Mark) -> None:
    """The guest takes CUR_ENTRY and END_ENTRY as they come back: backwards, too far, or with entries undone.

    Source: the checks of Linux arch/x86/coco/sev/core.c (vmgexit_psc), left out.
    """

    def trusting(entries: tuple[PscEntryValue, ...]) -> VcHandler:
        data = build_psc(entries)
        current = 0
        honest = change_page_states(entries)
        request = next(honest)
        while True:
            reply = yield request
            assert isinstance(reply, GuestReply)
            header, answered = parse_psc(reply.data) if len(reply.data) == len(data) else (None, ())
            if reply.info_1 or reply.info_2 or header is None:
                return (yield from _rest(honest, reply))
            mark.reached()
            undone = zip(answered, entries, strict=False)
            forged = (
                header.reserved_4
                or header.end_entry != len(entries) - 1
                or not current <= header.cur_entry <= len(entries)
                or any(after._replace(cur_page=0) != entry for after, entry in undone)
            )
            if forged and mark.triggers():
                if header.cur_entry > header.end_entry:
                    return VcResult(Outcome.DONE)
                data = PscHeader.build(cur_entry=header.cur_entry, end_entry=header.end_entry) + reply.data[8:]
                again = yield PageExit(NaeCode.SNP_PAGE_STATE_CHANGE, data=data, scratch=True, buffer_bytes=len(data))
                assert isinstance(again, GuestReply)
                return VcResult(Outcome.DONE)
            current = header.cur_entry
            try:
                request = honest.send(reply)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]  # a VcResult

    plan.replace("steps", SetPages, lambda _original: Agent(trusting).set_pages)


def _rest(handler: VcHandler, reply: GuestReply) -> VcHandler:
    """What the correct guest does from here on."""
    answer: GuestReply | int = reply
    while True:
        try:
            request = handler.send(answer)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]  # a VcResult
        answer = yield request


def greq_length(plan: Planter, mark: Mark) -> None:
    """The length that a message's header names is not compared with the page that the message lies in.

    Source: CVE-2021-26325; AMD-ASPFW sev_uapp/src/sev_channel.c.
    """

    def make(original: CommandHandler) -> CommandHandler:
        def run(machine: Machine, command: asp.Command) -> int:
            buffer = SnpGuestRequest.from_bytes(command.buffer)
            status = original(machine, command)
            place = machine.access.asp_place(buffer.request_spa, HEADER_BYTES)
            if place is None or status not in (Status.SUCCESS, Status.INVALID_PARAM, Status.BAD_MEASUREMENT):
                return status
            mark.reached()
            room = PAGE_BYTES - (place.spa & PAGE_MASK)
            if status == Status.INVALID_PARAM and room >= HEADER_BYTES:
                page = CheckedBuffer.of(machine.memory.read(place.spa, room, place.key), TAG_PUBLIC)
                header = MessageHeader.from_bytes(page.read(0, HEADER_BYTES))
                if header_is_legal(header) and HEADER_BYTES + header.msg_size > room and mark.triggers():
                    page.read(HEADER_BYTES, header.msg_size)
            return status

        return run

    plan.command(Command.SNP_GUEST_REQUEST, make)


def gctx_confusion(plan: Planter, mark: Mark) -> None:
    """SNP_ACTIVATE binds a guest to an ASID that another guest owns: one's key under the other's number.

    Source: CVE-2021-26327; AMD-ASPFW sev_uapp/src/sev_mcmd.c (mcmd_activate_common).
    """

    def make(original: CommandHandler) -> CommandHandler:
        def run(machine: Machine, command: asp.Command) -> int:
            buffer = SnpActivate.from_bytes(command.buffer)
            status = original(machine, command)
            guests = snp_state(machine).platform.guests
            place = machine.access.asp_place(buffer.gctx_spa, PAGE_BYTES)
            guest = None if place is None else guests.get(place.spa)
            if guest is None or status not in (Status.SUCCESS, Status.ASID_OWNED):
                return status
            mark.reached()
            others = [one for one in guests.values() if one is not guest and one.asid == buffer.asid]
            if status == Status.ASID_OWNED and others and mark.triggers():
                key = install_key(machine, buffer.asid, guest.vek, f"SNP guest {guest.gctx_spa:#x}")
                guest.key_id, guest.asid = key.key_id, buffer.asid
                sme_state(machine).keys[buffer.asid] = guest.key_id
                return int(Status.SUCCESS)
            return status

        return run

    plan.command(Command.SNP_ACTIVATE, make)


BUGS = (
    Bug("S05", "psc-wrong-bound", 5, "invariant", psc_wrong_bound),
    Bug("S08", "destroy-then-run", 8, "sev_es.vcpu", destroy_then_run, stateful=True, contexts=True),
    Bug("S18", "psc-backwards", 37, "snp.psc", psc_backwards, stateful=True, contexts=True),
    Bug("S20", "greq-length", 51, "invariant", greq_length, stateful=True),
    Bug("S21", "gctx-confusion", 53, "snp.contexts", gctx_confusion, stateful=True),
)
"""Those of this file."""
