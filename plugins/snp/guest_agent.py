"""The reference SNP guest on a vCPU: page states, messages to the firmware, application processors.

It trusts nothing that the hypervisor can write: a reply is read once, a message is accepted when its tag, number and
type are right, and a VMPCK whose number is in doubt is wiped, because one nonce twice would give the key away.

Source: Linux arch/x86/coco/sev/core.c and drivers/virt/coco/sev-guest (verify_and_dec_payload, snp_disable_vmpck).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sevlab.core.cpu import FaultUnwind
from sevlab.core.events import Done, Refused
from sevlab.core.steps import deliver_fault
from sevlab.core.svm import ExitCode
from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES, PAGE_MASK
from sevlab.plugins.sev_es import GuestFailed, Outcome, ReferenceGuest, VcHandler, VcResult, guest_side
from sevlab.plugins.snp.guest_cpuid import table_of
from sevlab.plugins.snp.guest_pages import SecretsPage
from sevlab.plugins.snp.guest_protocol import (
    MessageAnswer,
    Termination,
    change_page_state_early,
    change_page_states,
    create_ap,
    send_guest_request,
    terminate,
)
from sevlab.plugins.snp.messages import HEADER_BYTES, MAX_PAYLOAD_BYTES, MESSAGE_VERSION, open_message, seal
from sevlab.plugins.snp.psc import MAX_ENTRIES, PscEntryValue, PscOperation
from sevlab.plugins.snp.records import (
    CreateAp,
    MessageAnswered,
    MessageFailed,
    RmpResult,
    SendMessage,
    SetPages,
    UseCpuidPage,
)
from sevlab.plugins.snp.rmp_guest import RDX_VMSA, pvalidate, rmp_adjust
from sevlab.plugins.snp.rmp_host import RmpCode
from sevlab.plugins.snp.states import snp_state

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

SEQNO_LIMIT = (1 << 32) - 1
"""The driver stores 32 bits and stops before they overflow. Source: Linux drivers/virt/coco/sev-guest."""

VMM_INVALID_LENGTH, VMM_BUSY = 1, 2
BUSY_ATTEMPTS = 8
MAX_PAGES = 4096
MAX_DATA_PAGES = 16
CREATED_VMPL = 1
"""RMPADJUST needs a target VMPL; for a save area of VMPL0 Linux names VMPL1."""

_VMPCKS = tuple(SecretsPage.FIELDS[f"vmpck{number}"].offset for number in range(4))
_SEQNO = SecretsPage.FIELDS["message_seqno_low"].offset


class Ended(Exception):  # the way out when the VM ended in the middle
    """The VM has ended."""


def snp_vcpu(machine: Machine, number: int) -> Vcpu | None:
    """The vCPU, if it is an SNP guest's and runs; else the step is refused."""
    vcpu = machine.vcpus.get(number)
    if vcpu is None or vcpu.vcpu_id not in snp_state(machine).vcpus or vcpu.stopped or vcpu.halted:
        machine.emit(Refused(f"vCPU {number} is no SNP guest that runs"))
        return None
    return vcpu


def conclude(machine: Machine, vcpu: Vcpu, result: VcResult | None) -> None:
    """What a conversation came to; None: the vCPU sleeps or the VM has ended."""
    if result is None:
        return
    if result.outcome is Outcome.DONE:
        machine.emit(Done())
    elif result.fault is not None:
        deliver_fault(machine, vcpu, result.fault)
    else:
        machine.emit(GuestFailed(vcpu.vcpu_id, result.reason))


class Agent:
    """Runs the steps of the reference guest; `change_pages` is how it asks for page states once it has a GHCB."""

    __slots__ = ("_change_pages", "_guest")

    def __init__(self, change_pages: Callable[[tuple[PscEntryValue, ...]], VcHandler] = change_page_states) -> None:
        self._guest = ReferenceGuest("linux")
        self._change_pages = change_pages

    def _converse(self, machine: Machine, vcpu: Vcpu, handler: Any) -> Any:
        return self._guest.converse(machine, vcpu, guest_side(machine, vcpu), handler)

    # Page states ------------------------------------------------------------------------------------------------

    def set_pages(self, machine: Machine, step: SetPages) -> None:
        """To shared: rescind, then ask. To private: ask, then validate; a page that was valid already is an attack.

        Source: Linux arch/x86/coco/sev/core.c (set_pages_state, pvalidate_pages).
        """
        vcpu = snp_vcpu(machine, step.vcpu)
        if vcpu is None:
            return
        length_bytes = PAGE_2M_BYTES if step.page_size else PAGE_BYTES
        if step.gpa % length_bytes or not 0 < step.page_count <= MAX_PAGES or step.page_size > 1 or step.gpa >> 51:
            machine.emit(Refused(f"{step.page_count} pages of {length_bytes:#x} bytes at {step.gpa:#x}: impossible"))
            return
        pages = tuple(step.gpa + number * length_bytes for number in range(step.page_count))
        try:
            if not step.private and not self._validate_all(machine, vcpu, pages, step.page_size, validate=False):
                return
            if not self._ask(machine, vcpu, pages, large=bool(step.page_size), private=step.private):
                return
            if step.private and not self._validate_all(machine, vcpu, pages, step.page_size, validate=True):
                return
        except Ended:
            return
        except FaultUnwind as unwind:
            deliver_fault(machine, vcpu, unwind.fault)
            return
        machine.emit(Done())

    def _ask(self, machine: Machine, vcpu: Vcpu, pages: tuple[int, ...], *, large: bool, private: bool) -> bool:
        operation = PscOperation.PRIVATE if private else PscOperation.SHARED
        handlers: list[VcHandler]
        if guest_side(machine, vcpu).ghcb_gpa < 0:
            step_bytes = PAGE_2M_BYTES if large else PAGE_BYTES
            small = (gpa + offset for gpa in pages for offset in range(0, step_bytes, PAGE_BYTES))
            handlers = [change_page_state_early(gpa, operation) for gpa in small]
        else:
            entries = tuple(PscEntryValue(gpa >> 12, operation, large) for gpa in pages)
            handlers = [
                self._change_pages(entries[start : start + MAX_ENTRIES])
                for start in range(0, len(entries), MAX_ENTRIES)
            ]
        for handler in handlers:
            result = self._converse(machine, vcpu, handler)
            if result is None or result.outcome is not Outcome.DONE:
                conclude(machine, vcpu, result)
                return False
        return True

    def _validate_all(
        self, machine: Machine, vcpu: Vcpu, pages: tuple[int, ...], page_size: int, *, validate: bool
    ) -> bool:
        """PVALIDATE each; 2 MiB that the RMP has in 4 KiB are done one by one; anything else ends the guest."""
        for gpa in pages:
            result = self._pvalidate(machine, vcpu, gpa, page_size=page_size, validate=validate)
            if result.rax == RmpCode.FAIL_SIZEMISMATCH and page_size:
                small = tuple(gpa + offset for offset in range(0, PAGE_2M_BYTES, PAGE_BYTES))
                if not self._validate_all(machine, vcpu, small, 0, validate=validate):
                    return False
            elif result.rax or result.carry:
                why = f"PVALIDATE of {gpa:#x}: RAX {result.rax}, CF {int(result.carry)}"
                machine.emit(GuestFailed(vcpu.vcpu_id, why))
                self._converse(machine, vcpu, terminate(Termination.PVALIDATE, why))
                return False
        return True

    @staticmethod
    def _pvalidate(machine: Machine, vcpu: Vcpu, gpa: int, *, page_size: int, validate: bool) -> RmpResult:
        """PVALIDATE, executed again when the hypervisor had to mend the page's size or state first."""
        try:
            return pvalidate(machine, vcpu, gpa, page_size=page_size, validate=validate)
        except FaultUnwind as unwind:
            if unwind.fault.vector != ExitCode.NPF:
                raise
            deliver_fault(machine, vcpu, unwind.fault)
            if vcpu.stopped:
                raise Ended from None
        return pvalidate(machine, vcpu, gpa, page_size=page_size, validate=validate)

    # Messages ---------------------------------------------------------------------------------------------------

    def send(self, machine: Machine, step: SendMessage) -> None:
        """Seal, send, open, count. Source: Linux drivers/virt/coco/sev-guest (snp_send_guest_request)."""
        vcpu = snp_vcpu(machine, step.vcpu)
        if vcpu is None:
            return
        shapes = (step.shared_gpa | step.secrets_gpa) & PAGE_MASK or max(step.shared_gpa, step.secrets_gpa) >> 51
        sizes = 0 < len(step.payload) <= MAX_PAYLOAD_BYTES and step.data_pages <= MAX_DATA_PAGES
        if shapes or not sizes or step.vmpck > 3 or step.kind > 0xFE or guest_side(machine, vcpu).ghcb_gpa < 0:
            machine.emit(Refused("a message that this guest cannot send"))
            return
        try:
            answer = self._exchange(machine, vcpu, step)
        except FaultUnwind as unwind:
            deliver_fault(machine, vcpu, unwind.fault)
            return
        if answer is not None:
            machine.emit(answer)

    def _exchange(self, machine: Machine, vcpu: Vcpu, step: SendMessage) -> MessageAnswered | MessageFailed | None:
        access = machine.access
        key_gpa, seqno_gpa = step.secrets_gpa + _VMPCKS[step.vmpck], step.secrets_gpa + _SEQNO + 4 * step.vmpck
        key = access.guest_physical_read(vcpu, key_gpa, 32, c_bit=True)
        count = int.from_bytes(access.guest_physical_read(vcpu, seqno_gpa, 4, c_bit=True), "little")
        if not any(key):
            return MessageFailed("the VMPCK is gone", True)
        if count + 2 > SEQNO_LIMIT:
            return MessageFailed("the sequence numbers are used up", False)
        sealed = seal(key, step.payload, seqno=count + 1, kind=step.kind, vmpck=step.vmpck)
        request, response = step.shared_gpa, step.shared_gpa + PAGE_BYTES
        access.guest_physical_write(vcpu, request, sealed.ljust(PAGE_BYTES, b"\0"), c_bit=False)

        def give_up(why: str) -> MessageFailed:
            access.guest_physical_write(vcpu, key_gpa, bytes(32), c_bit=True)
            return MessageFailed(why, True)

        answer = self._transmit(machine, vcpu, step, request, response)
        if answer is None:
            return None if vcpu.stopped or vcpu.halted else give_up("the hypervisor refused the request")
        if answer.vmm_error or answer.firmware_error:
            return give_up(f"VMM error {answer.vmm_error:#x}, firmware error {answer.firmware_error:#x}")
        raw = access.guest_physical_read(vcpu, response, PAGE_BYTES, c_bit=False)
        message = None
        size = int.from_bytes(raw[0x36:0x38], "little")
        if HEADER_BYTES + size <= PAGE_BYTES:
            message = open_message(key, raw)
        if message is None:
            return give_up("the response is not the firmware's")
        head = message.header
        expected = (count + 2, step.kind + 1, MESSAGE_VERSION, step.vmpck)
        if (head.msg_seqno, head.msg_type, head.msg_version, head.msg_vmpck) != expected:
            return give_up("the response belongs to another request")
        access.guest_physical_write(vcpu, seqno_gpa, (count + 2).to_bytes(4, "little"), c_bit=True)
        certificates = b""
        if step.data_pages and not answer.pages_needed:
            place = step.shared_gpa + 2 * PAGE_BYTES
            certificates = access.guest_physical_read(vcpu, place, step.data_pages * PAGE_BYTES, c_bit=False)
        return MessageAnswered(message.payload, certificates)

    def _transmit(
        self, machine: Machine, vcpu: Vcpu, step: SendMessage, request: int, response: int
    ) -> MessageAnswer | None:
        """The request with its certificates; where they do not fit, the same message once more without, so that the
        number is used up by the firmware and never by two messages. Busy: the same bytes again.
        """
        extended = bool(step.data_pages)
        needed = 0
        for _ in range(BUSY_ATTEMPTS):
            handler = send_guest_request(
                request,
                response,
                data_gpa=step.shared_gpa + 2 * PAGE_BYTES,
                data_pages=step.data_pages,
                extended=extended,
            )
            answer = self._converse(machine, vcpu, handler)
            if not isinstance(answer, MessageAnswer):
                return None
            if answer.vmm_error == VMM_INVALID_LENGTH and extended:
                extended, needed = False, answer.pages_needed or 1
            elif answer.vmm_error != VMM_BUSY:
                return answer._replace(pages_needed=needed)
        return MessageAnswer(VMM_BUSY, 0)

    # Application processors -------------------------------------------------------------------------------------

    def create_ap(self, machine: Machine, step: CreateAp) -> None:
        """Write the save area, make it one by RMPADJUST, and ask. Source: Linux core.c (wakeup_cpu_via_vmgexit)."""
        vcpu = snp_vcpu(machine, step.vcpu)
        if vcpu is None:
            return
        if step.vmsa_gpa & PAGE_MASK or step.vmsa_gpa >> 51 or step.apic_id >> 32 or len(step.vmsa) > PAGE_BYTES:
            machine.emit(Refused("a save area is one page below 2^51"))
            return
        if step.request > 0xFFFF or step.vmpl > 0xF or guest_side(machine, vcpu).ghcb_gpa < 0:
            machine.emit(Refused("an AP creation that this guest cannot ask for"))
            return
        features = snp_state(machine).vcpus[vcpu.vcpu_id].sev_features
        try:
            if step.vmsa:
                access = machine.access
                access.guest_physical_write(vcpu, step.vmsa_gpa, step.vmsa.ljust(PAGE_BYTES, b"\0"), c_bit=True)
                code = rmp_adjust(machine, vcpu, step.vmsa_gpa, page_size=0, rdx=RDX_VMSA | CREATED_VMPL)
                if code:
                    machine.emit(GuestFailed(vcpu.vcpu_id, f"RMPADJUST of {step.vmsa_gpa:#x}: {code}"))
                    return
            handler = create_ap(step.apic_id, step.vmsa_gpa, features, request=step.request, vmpl=step.vmpl)
            conclude(machine, vcpu, self._converse(machine, vcpu, handler))
        except FaultUnwind as unwind:
            deliver_fault(machine, vcpu, unwind.fault)


def use_cpuid_page(machine: Machine, step: UseCpuidPage) -> None:
    """Copy the CPUID page for all vCPUs of the guest; one with an impossible count ends it.

    Source: Linux arch/x86/boot/startup/sev-startup.c and sev-shared.c (setup_cpuid_table).
    """
    vcpu = snp_vcpu(machine, step.vcpu)
    if vcpu is None:
        return
    if step.cpuid_gpa & PAGE_MASK or step.cpuid_gpa >> 51:
        machine.emit(Refused("a CPUID page is a page"))
        return
    try:
        page = machine.access.guest_physical_read(vcpu, step.cpuid_gpa, PAGE_BYTES, c_bit=True)
    except FaultUnwind as unwind:
        deliver_fault(machine, vcpu, unwind.fault)
        return
    if not table_of(page):
        why = "the CPUID page has an impossible count"
        machine.emit(GuestFailed(vcpu.vcpu_id, why))
        ReferenceGuest("linux").converse(machine, vcpu, guest_side(machine, vcpu), terminate(Termination.CPUID, why))
        return
    for vcpu_id in machine.hypervisor.vms[vcpu.vm_id].vcpu_ids:
        guest_side(machine, machine.vcpus[vcpu_id]).cpuid_page = page
    machine.emit(Done())


def register(builder: PluginBuilder) -> None:
    """Add the reference guest's steps."""
    agent = Agent()
    builder.steps.add(SetPages, agent.set_pages)
    builder.steps.add(SendMessage, agent.send)
    builder.steps.add(CreateAp, agent.create_ap)
    builder.steps.add(UseCpuidPage, use_cpuid_page)
