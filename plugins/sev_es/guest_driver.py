"""The reference guest on a vCPU: runs #VC handlers against the machine's hypervisor.

It owns one shared page as its GHCB, writes only what an event marks valid, reads each reply once, and keeps a copy of
the page when an NMI interrupts it between request and VMGEXIT.
Source: Linux arch/x86/coco/sev/core.c (__sev_get_ghcb, __sev_put_ghcb, __sev_es_nmi_complete, setup_ghcb) and
vc-shared.c; edk2 OvmfPkg/Library/CcExitLib/CcExitLib.c.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, cast

from sevlab.core.access import AccessKind
from sevlab.core.buffers import SharedBuffer
from sevlab.core.cpu import FaultUnwind
from sevlab.core.events import CpuExit, Done, Fault, Refused
from sevlab.core.memory import TAG_PUBLIC
from sevlab.core.paging import CR0_PG
from sevlab.core.state import StateDict, Stateful, capture, new, restore
from sevlab.core.svm import ExitCode, Vector
from sevlab.core.units import MASK64, PAGE_BYTES, PAGE_MASK
from sevlab.plugins.sev_es.ghcb import (
    SHARED_BUFFER_BYTES,
    SHARED_BUFFER_OFFSET,
    VALID_BITS,
    Ghcb,
    NaeCode,
    valid_mask,
)
from sevlab.plugins.sev_es.guest import (
    GuestReply,
    MsrExit,
    Outcome,
    PageExit,
    VcContext,
    VcHandler,
    VcResult,
    handle,
    shared_buffer,
)
from sevlab.plugins.sev_es.guest_startup import before_setup, jump_table_entry
from sevlab.plugins.sev_es.hardware import encrypted, execute_vmgexit
from sevlab.plugins.sev_es.records import (
    ForgeMsr,
    ForgeReply,
    GhcbRequest,
    GuestApHold,
    GuestFailed,
    GuestFault,
    GuestSetup,
    NmiInside,
)
from sevlab.plugins.sev_es.states import sev_es_state, vm_protocol

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

ALWAYS = valid_mask("sw_exit_code", "sw_exit_info_1", "sw_exit_info_2")
REPLIED = ("rax", "rbx", "rcx", "rdx")
CODE_AT = Ghcb.FIELDS["sw_exit_code"].offset
VERSION_AT = Ghcb.FIELDS["protocol_version"].offset
BITMAP_AT = Ghcb.FIELDS["valid_bitmap"].offset
SAVE_AREA_BYTES = 0x800
READ, WRITE = int(AccessKind.READ), int(AccessKind.WRITE)
_U64 = Struct("<Q")
_REPLY_CODE, _REPLY_BITMAP = Struct("<2Q"), slice(BITMAP_AT, BITMAP_AT + 16)


class GuestSide(Stateful):
    """What the reference guest of one vCPU knows."""

    ghcb_gpa: int = -1
    version: int = 1
    dr7: int = 0x400
    active: bool = False
    """A #VC uses the GHCB."""
    backup_active: bool = False
    """A nested one does, and the page's content is in the backup."""
    nmi: tuple[tuple[int, int, bytes], ...] = ()
    in_hold: bool = False
    jump_table_gpa: int = 0
    """Of an AP in hold: where its code finds its start address."""
    cpuid_page: bytes = b""
    """Of an SNP guest: its copy of the CPUID page; empty: it asks the hypervisor."""


class Guests(Stateful):
    """The reference guests of a machine, by vCPU."""

    vcpus: StateDict[int, GuestSide] = new(StateDict)


COMPONENT = "sev_es.guest"


def guest_side(machine: Machine, vcpu: Vcpu) -> GuestSide:
    """What the reference guest of `vcpu` knows."""
    guests = cast("Guests", machine.components[COMPONENT]).vcpus
    found = guests.get(vcpu.vcpu_id)
    if found is None:
        found = guests[vcpu.vcpu_id] = GuestSide()
    return found


class ReferenceGuest:
    """Runs the handlers of the table `vc_handlers` on the machine's vCPUs, as `profile` (linux or edk2) has them."""

    __slots__ = ("profile",)

    def __init__(self, profile: str) -> None:
        self.profile = profile

    # #VC --------------------------------------------------------------------------------------------------------

    def handle_vc(self, machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
        """The guest's IDT entry 29. Source: Linux arch/x86/coco/sev/vc-handle.c (exc_vmm_communication)."""
        side = guest_side(machine, vcpu)
        context = self.context(machine, vcpu, exit_)
        result = self.converse(machine, vcpu, side, handle(context))
        side.dr7 = context.dr7
        if result is not None:
            self._finish(machine, vcpu, result)

    def context(self, machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> VcContext:
        """The #VC as a handler sees it, with ways into the vCPU's memory."""
        access = machine.access

        def read(linear: int, count: int) -> bytes:
            return access.guest_read(vcpu, linear, count)

        def write(linear: int, data: bytes) -> None:
            access.guest_write(vcpu, linear, data)

        def translate(linear: int, to_write: bool) -> tuple[int, bool]:  # noqa: FBT001  # a callback
            """The C-bit is the guest's own; without paging there is none, and what is memory is private."""
            gpa, private = access.guest_page(vcpu, linear, WRITE if to_write else READ)
            return gpa, private and (vcpu.system.cr0 & CR0_PG != 0 or gpa < machine.vm_of(vcpu).memory_bytes)

        side = guest_side(machine, vcpu)
        passed = machine.slots.hypercall_registers
        return VcContext(
            code=exit_.exit_code,
            insn=exit_.insn,
            regs=vcpu.regs,
            system=vcpu.system,
            profile=self.profile,
            ghcb=side.ghcb_gpa >= 0,
            dr7=side.dr7,
            read=read,
            write=write,
            translate=translate,
            hypercall_registers=() if passed is None or exit_.exit_code != ExitCode.VMMCALL else passed(vcpu),
            handlers=machine.tables.vc_handlers,
            cpuid_page=side.cpuid_page,
            vmpl=vcpu.vmpl,
        )

    def _finish(self, machine: Machine, vcpu: Vcpu, result: VcResult) -> None:
        """What becomes of the code that raised the #VC."""
        if result.outcome is Outcome.DONE:
            vcpu.regs.rip = vcpu.regs.rip + result.length & MASK64
        elif result.outcome in (Outcome.EXCEPTION, Outcome.FORWARD):
            fault = result.fault or Fault(Vector.GP, 0, 0)
            machine.emit(GuestFault(vcpu.vcpu_id, fault.vector, fault.error_code))
        elif result.outcome is Outcome.TERMINATE:
            machine.emit(GuestFailed(vcpu.vcpu_id, result.reason))
            execute_vmgexit(machine, vcpu, TERMINATE_GENERAL)
        elif result.outcome is not Outcome.RETRY:
            machine.emit(GuestFailed(vcpu.vcpu_id, f"{result.outcome.value}: {result.reason}"))

    # The conversation -------------------------------------------------------------------------------------------

    def converse(self, machine: Machine, vcpu: Vcpu, side: GuestSide, handler: VcHandler) -> VcResult | None:
        """Run a handler to its end; None when the vCPU stopped or sleeps before that."""
        answer: GuestReply | int | None = None
        try:
            while True:
                request = next(handler) if answer is None else handler.send(answer)
                if isinstance(request, MsrExit):
                    answer = self._msr(machine, vcpu, request.value)
                else:
                    answer = self._page(machine, vcpu, side, request)
                if answer is None:
                    return None
        except StopIteration as end:
            return cast("VcResult", end.value)
        except FaultUnwind as unwind:
            return VcResult(Outcome.EXCEPTION, fault=unwind.fault)

    def _msr(self, machine: Machine, vcpu: Vcpu, value: int) -> int | None:
        """Write, VMGEXIT, read, and put back what the MSR held. Source: Linux (sev_es_rd_ghcb_msr and its callers)."""
        before = vcpu.vmcb.ghcb_gpa
        execute_vmgexit(machine, vcpu, value)
        if vcpu.stopped or vcpu.halted:
            return None
        forged = sev_es_state(machine).forged_msr
        answer = forged.pop(vcpu.vcpu_id) if vcpu.vcpu_id in forged else vcpu.vmcb.ghcb_gpa
        vcpu.vmcb.ghcb_gpa = before
        return answer

    def _page(self, machine: Machine, vcpu: Vcpu, side: GuestSide, request: PageExit) -> GuestReply | None:
        """One request by the page. Source: Linux vc-shared.c (sev_es_ghcb_hv_call) and core.c (__sev_get_ghcb)."""
        nested = side.active
        if nested and side.backup_active:
            machine.emit(GuestFailed(vcpu.vcpu_id, "GHCB and backup GHCB are both in use"))
            return None
        page = self._window(machine, vcpu, side.ghcb_gpa)
        backup = b""
        if nested:
            side.backup_active = True
            backup = page.read(0, PAGE_BYTES)
        side.active = True
        try:
            return self._exchange(machine, vcpu, side, page, request)
        finally:
            if nested:
                side.backup_active = False
                page.write(0, backup)
            else:
                side.active = False

    def _exchange(
        self, machine: Machine, vcpu: Vcpu, side: GuestSide, page: SharedBuffer, request: PageExit
    ) -> GuestReply | None:
        fields = {**request.fields}
        if request.scratch:
            fields["sw_scratch"] = shared_buffer(side.ghcb_gpa)
        valid = (ALWAYS | valid_mask(*fields)).to_bytes(16, "little")
        if self.profile == "edk2":
            page.write(0, bytes(SAVE_AREA_BYTES))
        page.write(BITMAP_AT, bytes(16))
        for name, value in fields.items():
            info = Ghcb.FIELDS[name]
            page.write_uint(info.offset, info.width_bytes, value)
        if request.data:
            page.write(SHARED_BUFFER_OFFSET, request.data)
        page.write(VERSION_AT, side.version.to_bytes(2, "little") + bytes(4))
        page.write(CODE_AT, b"".join(map(_U64.pack, (request.code, request.info_1, request.info_2))))
        page.write(BITMAP_AT, valid)
        if side.nmi:
            self._nmi(machine, vcpu, side)
        machine.emit(
            GhcbRequest(
                vcpu.vcpu_id, request.code, request.info_1, request.info_2, valid, tuple(fields.items()), request.data
            )
        )
        execute_vmgexit(machine, vcpu, side.ghcb_gpa)
        if vcpu.stopped or vcpu.halted:
            return None
        for offset, data in sev_es_state(machine).forged.pop(vcpu.vcpu_id, ()):
            machine.memory.write(page.spa + offset, data, None, TAG_PUBLIC)
        return self._read_reply(page, request)

    @staticmethod
    def _read_reply(page: SharedBuffer, request: PageExit) -> GuestReply:
        """Everything of the reply from one read, and the bitmap cleared for the next request."""
        image = page.read(0, PAGE_BYTES)
        page.write(BITMAP_AT, bytes(16))
        valid = int.from_bytes(image[_REPLY_BITMAP], "little")
        info_1, info_2 = _REPLY_CODE.unpack_from(image, CODE_AT + 8)
        registers = {
            name: _U64.unpack_from(image, Ghcb.FIELDS[name].offset)[0]
            for name in (*REPLIED, *request.returns)
            if valid & VALID_BITS[name]
        }
        count = min(request.buffer_bytes, SHARED_BUFFER_BYTES)
        return GuestReply(info_1, info_2, registers, image[SHARED_BUFFER_OFFSET : SHARED_BUFFER_OFFSET + count])

    @staticmethod
    def _window(machine: Machine, vcpu: Vcpu, ghcb_gpa: int) -> SharedBuffer:
        """The guest's own window on its GHCB: shared, and what it writes there is meant to be seen."""
        place = machine.access.guest_physical(vcpu, ghcb_gpa, WRITE)
        return SharedBuffer(machine.fetches, place.spa, PAGE_BYTES, place.key, TAG_PUBLIC)

    def _nmi(self, machine: Machine, vcpu: Vcpu, side: GuestSide) -> None:
        """An NMI's handler raises a #VC of its own; at its end it says so to the hypervisor.

        Source: Linux arch/x86/coco/sev (__sev_es_nmi_complete), arch/x86/kernel/nmi.c.
        """
        (code, info_1, insn), side.nmi = side.nmi[0], side.nmi[1:]
        kept = capture(vcpu.regs)  # what the NMI's stack frame keeps
        self.handle_vc(machine, vcpu, CpuExit(vcpu.vcpu_id, code, info_1, 0, insn, 0))
        restore(vcpu.regs, kept)
        if not vcpu.stopped:
            self._page(machine, vcpu, side, PageExit(NaeCode.NMI_COMPLETE))

    # Set-up and start-up ----------------------------------------------------------------------------------------

    def setup(self, machine: Machine, step: GuestSetup) -> None:
        """Negotiate, register where that is asked for, and use the page from now on; an SNP guest negotiates once."""
        vcpu = self._guest_vcpu(machine, step.vcpu)
        if vcpu is None:
            return
        if step.ghcb_gpa & PAGE_MASK or step.ghcb_gpa >> 52:
            machine.emit(Refused(f"a GHCB at {step.ghcb_gpa:#x}: expected a page"))
            return
        side = guest_side(machine, vcpu)
        snp = vm_protocol(machine, vcpu).snp
        others = (guest_side(machine, machine.vcpus[other]) for other in machine.vm_of(vcpu).vcpu_ids)
        known = max((other.version for other in others if snp and other is not side and other.ghcb_gpa >= 0), default=0)
        result = self.converse(machine, vcpu, side, before_setup(step.ghcb_gpa, snp=snp, version=known))
        if result is None:
            return
        if result.outcome is not Outcome.DONE:
            machine.emit(GuestFailed(vcpu.vcpu_id, result.reason))
            return
        side.ghcb_gpa, side.version = step.ghcb_gpa, result.length
        vcpu.vmcb.ghcb_gpa = step.ghcb_gpa
        machine.emit(Done())

    def hold(self, machine: Machine, step: GuestApHold) -> None:
        """An AP waits for its start-up IPI, by the page once it has one."""
        vcpu = self._guest_vcpu(machine, step.vcpu)
        if vcpu is None:
            return
        side = guest_side(machine, vcpu)
        side.in_hold, side.jump_table_gpa = True, step.jump_table_gpa
        try:
            if side.ghcb_gpa < 0:
                execute_vmgexit(machine, vcpu, AP_RESET_HOLD)
            else:
                self._page(machine, vcpu, side, PageExit(NaeCode.AP_RESET_HOLD))
        except FaultUnwind as unwind:
            machine.emit(GuestFault(vcpu.vcpu_id, unwind.fault.vector, unwind.fault.error_code))

    def woken(self, machine: Machine, vcpu: Vcpu) -> None:
        """The hold is over: go where the jump table says, or hold again when the answer is 0.

        Source: Linux arch/x86/coco/sev/core.c (sev_es_play_dead, sev_es_setup_ap_jump_table); edk2 MpFuncs.nasm.
        """
        side = guest_side(machine, vcpu)
        if not side.in_hold:
            return
        if side.ghcb_gpa < 0:
            answer = vcpu.vmcb.ghcb_gpa >> 12
        else:
            image = self._window(machine, vcpu, side.ghcb_gpa).read(0, PAGE_BYTES)
            answer = _REPLY_CODE.unpack_from(image, CODE_AT + 8)[1]
        if not answer:
            self.hold(machine, GuestApHold(vcpu.vcpu_id, side.jump_table_gpa))
            return
        side.in_hold = False
        if side.jump_table_gpa:
            jump_table_entry(machine, vcpu, side.jump_table_gpa)

    def _guest_vcpu(self, machine: Machine, number: int) -> Vcpu | None:
        vcpu = machine.vcpus.get(number)
        if vcpu is None or not encrypted(vcpu) or vcpu.stopped or vcpu.halted:
            machine.emit(Refused(f"vCPU {number} is no encrypted guest that runs"))
            return None
        return vcpu

    # Faults -----------------------------------------------------------------------------------------------------

    def arm_nmi(self, machine: Machine, step: NmiInside) -> None:
        """Let an NMI interrupt the next exit; two of them nest."""
        vcpu = self._guest_vcpu(machine, step.vcpu)
        if vcpu is not None:
            side = guest_side(machine, vcpu)
            side.nmi = (*side.nmi, (step.exit_code, step.exit_info_1, step.insn))
            machine.emit(Done())


AP_RESET_HOLD = 0x006
TERMINATE_GENERAL = 0x100
"""Reason set 0, code 0."""


def forge(machine: Machine, step: ForgeReply) -> None:
    """Arm a lie in the next reply by the page."""
    if step.vcpu not in machine.vcpus or step.offset + len(step.data) > PAGE_BYTES:
        machine.emit(Refused("expected a vCPU, and bytes that lie in a page"))
        return
    forged = sev_es_state(machine).forged
    forged[step.vcpu] = (*forged.get(step.vcpu, ()), (step.offset, step.data))
    machine.emit(Done())


def forge_msr(machine: Machine, step: ForgeMsr) -> None:
    """Arm a lie in the next response by the MSR."""
    if step.vcpu not in machine.vcpus:
        machine.emit(Refused(f"there is no vCPU {step.vcpu}"))
        return
    sev_es_state(machine).forged_msr[step.vcpu] = step.value
    machine.emit(Done())


def register(builder: PluginBuilder) -> ReferenceGuest:
    """Add the reference guest's state and steps."""
    profile = str(builder.options["guest"])
    guest = ReferenceGuest("linux" if profile == "none" else profile)
    builder.component(Guests(), COMPONENT)
    builder.steps.add(GuestSetup, guest.setup)
    builder.steps.add(GuestApHold, guest.hold)
    builder.steps.add(NmiInside, guest.arm_nmi)
    builder.steps.add(ForgeReply, forge)
    builder.steps.add(ForgeMsr, forge_msr)
    return guest
