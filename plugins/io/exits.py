"""The hypervisor's handlers of the intercepts that need only registers.

Each reads what a plain or SEV guest shows in its registers, answers, and lets RIP point behind the instruction.
Source: spec 24593, 15.9 (which instruction exits with what) and 15.7.2 (decode assists).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.cpu import (
    CONTROL_SEV_ES,
    GPR_NAMES,
    Vcpu,
    skip_instruction,
    visible_registers,
)
from sevlab.core.events import CpuExit, Fault
from sevlab.core.exceptions import WITH_ERROR_CODE
from sevlab.core.hypercall import HypercallEnd, HypercallFrame, code_mode
from sevlab.core.paging import CR0_PG, CR4_PAE, EFER_LMA, EFER_LME
from sevlab.core.svm import ExitCode, Vector
from sevlab.plugins.io import interrupts, ioio, mmio
from sevlab.plugins.io.devices.board import write_lapic
from sevlab.plugins.io.devices.lapic import TPR
from sevlab.plugins.io.injection import inject_exception, inject_software
from sevlab.plugins.io.unserved import unserved

if TYPE_CHECKING:
    from collections.abc import Callable

    from sevlab.core.builder import PluginBuilder
    from sevlab.core.machine import Machine

MASK32 = 0xFFFF_FFFF
CR_MOV = 1 << 63
"""EXITINFO1 of a control-register exit with decode assist: it was a MOV, and bits 3:0 name the register."""

CR_NAMES = {0: "cr0", 2: "cr2", 3: "cr3", 4: "cr4", 8: "cr8"}
DR_NAMES = {6: "dr6", 7: "dr7"}
DR_RESERVED_HIGH = 0xFFFF_FFFF_0000_0000
CR0_RESERVED_HIGH = 0xFFFF_FFFF_0000_0000
XCR0_SUPPORTED = 0x7
EFER_SVME = 1 << 12


def cpuid(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """CPUID."""
    registers = visible_registers(machine, vcpu)
    answer = machine.cpuid(vcpu, registers.rax & MASK32, registers.rcx & MASK32)
    registers.rax, registers.rbx, registers.rcx, registers.rdx = answer
    skip_instruction(vcpu, exit_)


def rdtsc(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """RDTSC and RDTSCP."""
    registers = visible_registers(machine, vcpu)
    tsc = machine.tsc() + vcpu.vmcb.tsc_offset
    registers.rax, registers.rdx = tsc & MASK32, tsc >> 32 & MASK32
    if exit_.exit_code == ExitCode.RDTSCP:
        registers.rcx = vcpu.system.tsc_aux & MASK32
    skip_instruction(vcpu, exit_)


def rdpmc(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """RDPMC: there are no counters, and those that exist read zero."""
    registers = visible_registers(machine, vcpu)
    if registers.rcx & MASK32 > 5:
        inject_exception(machine, vcpu, Vector.GP, 0)
        return
    registers.rax = registers.rdx = 0
    skip_instruction(vcpu, exit_)


def msr(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """RDMSR and WRMSR: an unknown register is #GP(0)."""
    registers = visible_registers(machine, vcpu)
    number = registers.rcx & MASK32
    handlers = machine.tables.guest_msrs.get(number)
    fault: Fault | None = Fault(Vector.GP, 0, 0)
    if exit_.exit_info_1 & 1:
        if handlers is not None and handlers.write is not None:
            fault = handlers.write(machine, vcpu, number, (registers.rdx & MASK32) << 32 | registers.rax & MASK32)
    elif handlers is not None and handlers.read is not None:
        value = handlers.read(machine, vcpu, number)
        if isinstance(value, int):
            fault = None
            registers.rax, registers.rdx = value & MASK32, value >> 32 & MASK32
        else:
            fault = value
    if fault is not None:
        inject_exception(machine, vcpu, fault.vector, fault.error_code)
    else:
        skip_instruction(vcpu, exit_)


def hlt(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """HLT: the vCPU sleeps until an interrupt waits for it. An encrypted guest's RIP moves by itself."""
    if not vcpu.vmcb.encryption_control & CONTROL_SEV_ES:
        skip_instruction(vcpu, exit_)
    vcpu.halted = True
    interrupts.wake(machine, vcpu)


def skip(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """PAUSE, MONITOR, MWAIT, INVLPGA: nothing to do for a model without speed."""
    skip_instruction(vcpu, exit_)


def flush_caches(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """INVD and WBINVD of a guest: a hypervisor writes back for both, since INVD would destroy others' data."""
    machine.memory.write_back_all()
    skip_instruction(vcpu, exit_)


def invlpg(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """INVLPG: translations of the guest are not kept, and its nested ones are dropped."""
    machine.access.forget()
    skip_instruction(vcpu, exit_)


def xsetbv(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """XSETBV of XCR0: x87 must be set, AVX needs SSE, nothing else exists. Source: spec 24594, XSETBV."""
    registers = visible_registers(machine, vcpu)
    value = (registers.rdx & MASK32) << 32 | registers.rax & MASK32
    legal = not registers.rcx & MASK32 and value & 1 and not value & ~XCR0_SUPPORTED and (value & 6) != 4
    if not legal or vcpu.system.cpl:
        inject_exception(machine, vcpu, Vector.GP, 0)
        return
    vcpu.system.xcr0 = value
    skip_instruction(vcpu, exit_)


PREEMPTED = HypercallEnd.PREEMPTED


def vmmcall(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """VMMCALL: the owner of the slot `hypercall` answers; without one it is #UD."""
    registers = visible_registers(machine, vcpu)
    owner = machine.slots.hypercall
    if owner is None:
        inject_exception(machine, vcpu, Vector.UD)
        return
    frame = HypercallFrame(registers, vcpu.system.cpl, code_mode(vcpu))
    if owner(machine, vcpu, frame) is not PREEMPTED:
        skip_instruction(vcpu, exit_)


def control_register(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """MOV from and to CRn, CLTS, LMSW, SMSW; decode assist names the general register."""
    code = exit_.exit_code
    if not exit_.exit_info_1 & CR_MOV:
        unserved(machine, vcpu, exit_, "the register operand is known only with decode assist, for MOV")
        return
    number, write = code & 0xF, bool(code & 0x10) or code == ExitCode.CR0_SEL_WRITE
    if code == ExitCode.CR0_SEL_WRITE:
        number = 0
    name = CR_NAMES.get(number)
    if name is None:
        inject_exception(machine, vcpu, Vector.UD)
        return
    registers = visible_registers(machine, vcpu)
    general = GPR_NAMES[exit_.exit_info_1 & 0xF]
    if not write:
        setattr(registers, general, getattr(vcpu.system, name))
    elif not _write_control(machine, vcpu, name, getattr(registers, general)):
        inject_exception(machine, vcpu, Vector.GP, 0)
        return
    skip_instruction(vcpu, exit_)


def _write_control(machine: Machine, vcpu: Vcpu, name: str, value: int) -> bool:
    """Write a control register; False for #GP. CR8 is the APIC's task priority. Source: spec 24593, 3.1, 16.4.2."""
    system = vcpu.system
    if name == "cr0":
        if (
            value & CR0_RESERVED_HIGH
            or (value & 1 << 31 and not value & 1)
            or (value & 1 << 29 and not value & 1 << 30)
            or (value & CR0_PG and system.efer & EFER_LME and not system.cr4 & CR4_PAE)
        ):
            return False
        long_mode = value & CR0_PG and system.efer & EFER_LME
        system.efer = system.efer & ~EFER_LMA | (EFER_LMA if long_mode else 0)
    elif name == "cr8":
        if value >> 4:
            return False
        write_lapic(machine, vcpu, TPR, value << 4)
    setattr(system, name, value)
    return True


def debug_register(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """MOV from and to DRn. Source: spec 24593, 13.1.1."""
    number, write = exit_.exit_code & 0xF, bool(exit_.exit_code & 0x10)
    registers = visible_registers(machine, vcpu)
    general = GPR_NAMES[exit_.exit_info_1 & 0xF]
    name = DR_NAMES.get(number + 2 if number in (4, 5) else number)
    if write:
        value = getattr(registers, general)
        if name is not None and value & DR_RESERVED_HIGH:
            inject_exception(machine, vcpu, Vector.GP, 0)
            return
        if name is not None:
            setattr(vcpu.system, name, value | (0x400 if name == "dr7" else 0xFFFF_0FF0))
        elif number < 4:
            addresses = vcpu.system.debug_addresses
            vcpu.system.debug_addresses = (*addresses[:number], value, *addresses[number + 1 :])
    else:
        value = getattr(vcpu.system, name) if name is not None else vcpu.system.debug_addresses[number & 3]
        setattr(registers, general, value)
    skip_instruction(vcpu, exit_)


def write_trap(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """CR and EFER write traps: the guest has written already, EXITINFO1 has the value; the hypervisor takes note."""
    if exit_.exit_code == ExitCode.EFER_WRITE_TRAP:
        vcpu.system.efer = exit_.exit_info_1 | EFER_SVME
        return
    name = CR_NAMES.get(exit_.exit_code - ExitCode.CR0_WRITE_TRAP)
    if name is not None:
        setattr(vcpu.system, name, exit_.exit_info_1)


def software_interrupt(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """INT n: injected again as what it was; EXITINFO1 has the vector with decode assist."""
    inject_software(vcpu, exit_.exit_info_1 & 0xFF, len(exit_.insn) or 2, nrips=bool(exit_.next_rip))


def exception(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """An intercepted exception: given back to the guest, with the instruction's length for #BP and #OF."""
    vector = exit_.exit_code - ExitCode.EXCEPTION_0
    if vector in (Vector.BP, Vector.OF):
        inject_software(vcpu, vector, len(exit_.insn) or 1, nrips=bool(exit_.next_rip))
        return
    if vector == Vector.MC:
        return  # the host's own machine check handler has seen it
    if vector == Vector.PF:
        vcpu.system.cr2 = exit_.exit_info_2
    inject_exception(machine, vcpu, vector, exit_.exit_info_1 & MASK32 if vector in WITH_ERROR_CODE else None)


def icebp(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """INT1: a #DB behind the instruction. Source: Xen xen/arch/x86/hvm/svm/svm.c, VMEXIT_ICEBP."""
    skip_instruction(vcpu, exit_)
    inject_exception(machine, vcpu, Vector.DB)


def undefined(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """The guest has no SVM of its own. Source: spec 24593, 15.4 (EFER.SVME clear: #UD)."""
    inject_exception(machine, vcpu, Vector.UD)


def shutdown(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """A triple fault ends the VM."""
    machine.hypervisor.stop(machine, vcpu.vm_id, "shutdown (triple fault)")


def nothing(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """INTR, NMI, SMI, INIT: the host takes them when interrupts are on again; the guest goes on."""


def window(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """VINTR: the guest can take an interrupt now; the preparation of the entry injects it."""
    interrupts.close_window(vcpu)


def task_switch(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """A task switch needs the TSS in memory and the instruction's length, which no exit gives."""
    unserved(machine, vcpu, exit_, "a task switch needs the TSS, the instruction, and a next RIP")


SVM_INSTRUCTIONS = (
    ExitCode.VMRUN,
    ExitCode.VMLOAD,
    ExitCode.VMSAVE,
    ExitCode.STGI,
    ExitCode.CLGI,
    ExitCode.SKINIT,
)

EXITS: dict[int, Callable[[Machine, Vcpu, CpuExit], None]] = {
    ExitCode.CPUID: cpuid,
    ExitCode.RDTSC: rdtsc,
    ExitCode.RDTSCP: rdtsc,
    ExitCode.RDPMC: rdpmc,
    ExitCode.MSR: msr,
    ExitCode.HLT: hlt,
    ExitCode.PAUSE: skip,
    ExitCode.MONITOR: skip,
    ExitCode.MWAIT: skip,
    ExitCode.MWAIT_CONDITIONAL: skip,
    ExitCode.INVLPGA: skip,
    ExitCode.INVD: flush_caches,
    ExitCode.WBINVD: flush_caches,
    ExitCode.INVLPG: invlpg,
    ExitCode.XSETBV: xsetbv,
    ExitCode.VMMCALL: vmmcall,
    ExitCode.IOIO: ioio.handle,
    ExitCode.NPF: mmio.handle,
    ExitCode.SWINT: software_interrupt,
    ExitCode.SHUTDOWN: shutdown,
    ExitCode.TASK_SWITCH: task_switch,
    ExitCode.VINTR: window,
    ExitCode.IRET: interrupts.iret,
    ExitCode.ICEBP: icebp,
    **dict.fromkeys(SVM_INSTRUCTIONS, undefined),
    ExitCode.EFER_WRITE_TRAP: write_trap,
    ExitCode.CR0_SEL_WRITE: control_register,
    **dict.fromkeys((ExitCode.INTR, ExitCode.NMI, ExitCode.SMI, ExitCode.INIT), nothing),
    **dict.fromkeys(range(ExitCode.CR0_READ, ExitCode.CR0_READ + 32), control_register),
    **dict.fromkeys(range(ExitCode.DR0_READ, ExitCode.DR0_READ + 8), debug_register),
    **dict.fromkeys(range(ExitCode.DR0_WRITE, ExitCode.DR0_WRITE + 8), debug_register),
    **dict.fromkeys(range(ExitCode.EXCEPTION_0, ExitCode.EXCEPTION_0 + 32), exception),
    **dict.fromkeys(range(ExitCode.CR0_WRITE_TRAP, ExitCode.CR0_WRITE_TRAP + 16), write_trap),
}

DEFAULT_INTERCEPTS = (
    ExitCode.INTR,
    ExitCode.NMI,
    ExitCode.SMI,
    ExitCode.INIT,
    ExitCode.CPUID,
    ExitCode.RDPMC,
    ExitCode.HLT,
    ExitCode.INVD,
    ExitCode.WBINVD,
    ExitCode.INVLPGA,
    ExitCode.IOIO,
    ExitCode.MSR,
    ExitCode.TASK_SWITCH,
    ExitCode.SHUTDOWN,
    ExitCode.VMMCALL,
    ExitCode.MONITOR,
    ExitCode.MWAIT,
    ExitCode.XSETBV,
    *SVM_INSTRUCTIONS,
    ExitCode.EXCEPTION_0 + Vector.MC,
)
"""What a hypervisor intercepts of every guest. Source: Linux arch/x86/kvm/svm/svm.c, init_vmcb."""


def register(builder: PluginBuilder) -> None:
    """Register the handlers and set the intercepts of every VM."""
    for code, handler in EXITS.items():
        builder.exits.add(code, handler)
    builder.at_boot(set_intercepts)


def set_intercepts(machine: Machine) -> None:
    """Intercept what is handled."""
    for vcpu in machine.vcpus.values():
        vcpu.vmcb.intercept(*DEFAULT_INTERCEPTS)
