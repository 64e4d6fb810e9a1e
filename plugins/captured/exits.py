"""Exits whose handling needs what the log knows: CPUID and MSRs of the captured processor, operands without assists."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.cpu import skip_instruction
from sevlab.core.events import CpuidResult, Supplied, Value
from sevlab.core.hypercall import CodeMode, HypercallFrame
from sevlab.core.svm import ExitCode, Vector
from sevlab.core.units import MASK32, MASK64
from sevlab.plugins.captured.certain import apic_certain, port_certain
from sevlab.plugins.captured.lines import late_lines
from sevlab.plugins.captured.records import ApicAccessed, InterruptCommand, InterruptEnded, PicAcknowledged
from sevlab.plugins.captured.state import captured
from sevlab.plugins.io import Insn, decode, devices, inject_exception

if TYPE_CHECKING:
    from sevlab.core.builder import ExitHandler, PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.events import CpuExit
    from sevlab.core.machine import Machine

APIC_BASE, X2APIC_FIRST, X2APIC_LAST, TSC_DEADLINE = 0x1B, 0x800, 0x8FF, 0x6E0
EOI, ICR_LOW, ICR_HIGH, SELF_IPI = 0xB0, 0x300, 0x310, 0x3F0
IOIO_IN, IOIO_STRING = 1 << 0, 1 << 2
PIC_COMMAND, ICW1 = (0x20, 0xA0), 1 << 4
CR_MOV = 1 << 63
LONG = 64
CALL_ARGUMENTS = ("rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r10")
"""Where arguments of hypercalls lie in any of their ABIs."""


def register(builder: PluginBuilder) -> None:
    """Take the place of the handlers of `io` that need registers the log does not show."""
    builder.exits.replace(ExitCode.CPUID, lambda _: cpuid)
    builder.exits.replace(ExitCode.MSR, msr)
    builder.exits.replace(ExitCode.IOIO, ioio)
    builder.exits.replace(ExitCode.RDPMC, lambda _: rdpmc)
    for code in (*range(0x20), ExitCode.CR0_SEL_WRITE):
        builder.exits.replace(code, control_register)
    for code in (*range(0x20, 0x28), *range(0x30, 0x38)):
        builder.exits.replace(code, lambda _: skip)
    builder.exits.add(ExitCode.RSM, skip)
    builder.exits.replace(ExitCode.VMMCALL, lambda _: vmmcall)


def skip(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """The instruction is done; the registers that it changed are not known."""
    skip_instruction(vcpu, exit_)


def cpuid(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """CPUID of the captured processor: the first answer of a leaf is taken, from then on it is known."""
    log = captured(machine)
    key = (vcpu.vcpu_id, vcpu.regs.rax & MASK32, vcpu.regs.rcx & MASK32)
    known = log.cpuid.get(key)
    if known is None:
        answers = log.step.answers
        known = (answers[0], answers[1], answers[2], answers[3]) if len(answers) == 4 else (0, 0, 0, 0)
        log.cpuid[key] = known
        machine.emit(Supplied("cpuid"))
    machine.emit(CpuidResult(*known))
    skip_instruction(vcpu, exit_)


def msr(original: ExitHandler) -> ExitHandler:
    """RDMSR and WRMSR: the local APIC's registers are the board's, all others the captured processor's."""

    def handle(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
        number = vcpu.regs.rcx & MASK32
        write = bool(exit_.exit_info_1 & 1)
        if X2APIC_FIRST <= number <= X2APIC_LAST or number in (APIC_BASE, TSC_DEADLINE):
            _board_msr(machine, vcpu, exit_, number, write, original)
            return
        log = captured(machine)
        refused = log.refused.get((number, write))
        if refused is None:
            refused = log.refused[number, write] = log.step.refused
            machine.emit(Supplied("msr-exists"))
        if refused:
            inject_exception(machine, vcpu, Vector.GP, 0)
            return
        key = (vcpu.vcpu_id, number)
        if write:
            log.msrs[key] = log.step.stored[0] if log.step.stored else 0
        else:
            known = log.msrs.get(key)
            if known is None:
                known = log.answer() or 0
                machine.emit(Supplied("value"))
            machine.emit(Value(known))
        skip_instruction(vcpu, exit_)

    return handle


def _board_msr(
    machine: Machine,
    vcpu: Vcpu,
    exit_: CpuExit,
    number: int,
    write: bool,  # noqa: FBT001  # as the exit says it
    original: ExitHandler,
) -> None:
    """An MSR that the board has."""
    apic = devices(machine, vcpu).lapics[vcpu.vcpu_id]
    offset = (number - X2APIC_FIRST) * 16 if number >= X2APIC_FIRST else -1
    before = apic.isr
    sure = number != TSC_DEADLINE and (offset < 0 or apic_certain(offset))
    original(machine, vcpu, exit_)
    if offset >= 0:
        machine.emit(ApicAccessed(offset, write))
    if write:
        apic_effects(machine, vcpu, offset, before)
        return
    machine.emit(Value(vcpu.regs.rdx << 32 | vcpu.regs.rax))
    if not sure:
        machine.emit(Supplied("value"))


def apic_effects(machine: Machine, vcpu: Vcpu, offset: int, isr_before: int) -> None:
    """Say what a write to the local APIC did."""
    if offset == EOI:
        machine.emit(InterruptEnded(max(isr_before.bit_length() - 1, 0)))
    elif offset in (ICR_LOW, SELF_IPI):
        apic = devices(machine, vcpu).lapics[vcpu.vcpu_id]
        icr = apic.icr
        machine.emit(
            InterruptCommand(
                icr >> 32 if apic.x2apic else icr >> 56,
                icr & 0xFF,
                icr >> 8 & 7,
                bool(icr & 1 << 11),
                bool(icr & 1 << 14),
                bool(icr & 1 << 15),
                icr >> 18 & 3,
            )
        )


def ioio(original: ExitHandler) -> ExitHandler:
    """IN, OUT, INS, OUTS: a read that the board does not determine is taken from the log."""

    def handle(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
        info = exit_.exit_info_1
        step = captured(machine).step
        if info & IOIO_STRING:
            _string_operands(machine, vcpu, exit_, step.registers, step.stored)
            machine.emit(Supplied("value"))
            # The log's processor leaves the address size out; where the element lies is ours to choose.
            info = info & ~0x1F80 | 1 << 9
            original(machine, vcpu, exit_._replace(exit_info_1=info))
            return
        sure = not info & IOIO_IN or port_certain(machine, vcpu, info >> 16 & 0xFFFF, info >> 4 & 7)
        if info >> 16 & 0xFFFF in PIC_COMMAND and not info & IOIO_IN:
            pic_command(machine, vcpu, exit_, original)
        else:
            original(machine, vcpu, exit_)
        if step.arrivals:
            late_lines(machine, vcpu, step)
        if not sure:
            machine.emit(Supplied("value"))

    return handle


def pic_command(machine: Machine, vcpu: Vcpu, exit_: CpuExit, original: ExitHandler) -> None:
    """A word to a PIC's command port, and which lines are told that they are served.

    ICW1 drops what waits as well. Source: Linux arch/x86/kvm/i8259.c (pic_clear_isr and its callers).
    """
    pics = devices(machine, vcpu).pics
    slave = exit_.exit_info_1 >> 16 & 0xFFFF != PIC_COMMAND[0]
    pic = pics.slave if slave else pics.master
    before = pic.isr | (pic.irr if vcpu.regs.rax & ICW1 else 0)
    original(machine, vcpu, exit_)
    ended = before & ~pic.isr
    for pin in range(ended.bit_length()):
        if ended >> pin & 1:
            machine.emit(PicAcknowledged(slave, pin))


def _string_operands(
    machine: Machine, vcpu: Vcpu, exit_: CpuExit, registers: tuple[tuple[str, int], ...], stored: tuple[int, ...]
) -> None:
    """The pointers at the start of the guest's memory, the elements that the log shows, and their first value."""
    regs = vcpu.regs
    regs.rsi = regs.rdi = 0
    regs.rcx = dict(registers).get("rcx", 0)
    if stored:
        width = exit_.exit_info_1 >> 4 & 7
        spa = machine.vm_of(vcpu).memory_spa
        machine.memory.write(spa, (stored[0] & (1 << width * 8) - 1).to_bytes(width, "little"), None, vcpu.tag)


def rdpmc(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """RDPMC: whether the counter exists is the captured machine's configuration."""
    machine.emit(Supplied("counter-exists"))
    if captured(machine).step.refused:
        inject_exception(machine, vcpu, Vector.GP, 0)
    else:
        skip_instruction(vcpu, exit_)


def control_register(original: ExitHandler) -> ExitHandler:
    """MOV CRn without decode assist: the operand comes from the instruction's bytes, the value stays as it is.

    The log shows no value of a control register, so that a write leaves the model's as it was.
    """

    def handle(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
        insn = decode(exit_.insn, captured(machine).step.mode or 64, vcpu.regs.rip) if exit_.insn else None
        machine.emit(Supplied("control-register"))
        if isinstance(insn, Insn) and insn.mnemonic in ("mov", "clts", "lmsw", "smsw"):
            vcpu.regs.rip += insn.length
        else:
            original(machine, vcpu, exit_)

    return handle


def vmmcall(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """The hypervisor whose ABI the machine speaks answers. Without one the captured one did: how is not in the log.

    Argument registers that the log does not show are all ones, which no hypercall takes for an operation.
    """
    owner, step = machine.slots.hypercall, captured(machine).step
    if owner is None:
        machine.emit(Supplied("hypercall"))
    else:
        known = dict(step.registers)
        for name in CALL_ARGUMENTS:
            if name not in known:
                setattr(vcpu.regs, name, MASK64)
        mode = CodeMode.BITS_64 if step.mode == LONG else CodeMode.BITS_32
        owner(machine, vcpu, HypercallFrame(vcpu.regs, cpl=0, mode=mode))
    skip_instruction(vcpu, exit_)
