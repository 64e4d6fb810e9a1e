"""Nested page faults of a log: memory that is mapped, or one instruction that accesses a device.

The bytes of the instruction and the address of the fault determine the registers of its memory operand as far as the
model needs them: with translation off, linear addresses are guest-physical ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.events import Supplied
from sevlab.core.svm import EVENT_VALID, EventType, ExitCode
from sevlab.core.units import MASK64
from sevlab.plugins.captured.certain import IOAPIC, LAPIC, mmio_certain
from sevlab.plugins.captured.exits import apic_effects
from sevlab.plugins.captured.records import ApicAccessed
from sevlab.plugins.captured.state import captured
from sevlab.plugins.io import Insn, decode, devices, inject_software, mmio_read, mmio_write, write_register

if TYPE_CHECKING:
    from sevlab.core.builder import ExitHandler, PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.events import CpuExit, GuestExit
    from sevlab.core.machine import Machine

STRING_MOVES = ("movsb", "movsw", "movsd", "movsq")
WORD_DEVICES, WORD_BYTES = (LAPIC, IOAPIC), 4
RAM_GPA = 0x1000
"""Where the operand of a string move lies that is not the device."""


def register(builder: PluginBuilder) -> None:
    """Take the place of the handler of nested page faults."""
    builder.exits.replace(ExitCode.NPF, nested_fault)


def nested_fault(original: ExitHandler) -> ExitHandler:
    """Serve a fault with what the log shows."""

    def handle(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
        step: GuestExit = captured(machine).step
        if not step.insn:
            if exit_.exit_info_2 & ~0xFFF in WORD_DEVICES and (step.stored or step.answers):
                _word(machine, vcpu, exit_.exit_info_2, step)
            return  # memory that the hypervisor maps: the guest executes the instruction again
        rip = vcpu.regs.rip
        insn = decode(step.insn, step.mode or 64, rip)
        if isinstance(insn, Insn) and step.event & EVENT_VALID and step.event >> 8 & 7 == EventType.SOFTWARE:
            # INT n whose delivery met the fault: KVM injects it again and skips it (svm.c, svm_complete_interrupts)
            vcpu.vmcb.exit_int_info = 0
            inject_software(vcpu, step.event & 0xFF, insn.length, nrips=False)
            return
        if not isinstance(insn, Insn) or not insn.memory:
            vcpu.regs.rip += len(step.insn)  # an event's own delivery faulted; nothing of the operand is known
            machine.emit(Supplied("operand"))
            return
        gpa = exit_.exit_info_2
        vcpu.regs.rip = place_operand(machine, vcpu, insn, step, gpa)
        moved = vcpu.regs.rip - rip
        sure = mmio_certain(machine, vcpu, gpa)
        apic = devices(machine, vcpu).lapics[vcpu.vcpu_id]
        before = apic.isr
        original(machine, vcpu, exit_._replace(exit_info_1=exit_.exit_info_1 | 1))
        vcpu.regs.rip = vcpu.regs.rip - moved & MASK64
        writes = any("write" in operand.access for operand in insn.memory)
        if gpa & ~0xFFF == LAPIC:
            machine.emit(ApicAccessed(gpa & 0xFF0, writes))
            if writes:
                apic_effects(machine, vcpu, gpa & 0xFF0, before)
        if not sure:
            machine.emit(Supplied("value"))

    return handle


def _word(machine: Machine, vcpu: Vcpu, gpa: int, step: GuestExit) -> None:
    """An access to an interrupt controller in a log without instructions: it takes 32-bit words only."""
    if step.stored:
        mmio_write(machine, vcpu, gpa, WORD_BYTES, step.stored[0])
        return
    sure = mmio_certain(machine, vcpu, gpa)
    mmio_read(machine, vcpu, gpa, WORD_BYTES)
    if not sure:
        machine.emit(Supplied("value"))


def place_operand(machine: Machine, vcpu: Vcpu, insn: Insn, step: GuestExit, gpa: int) -> int:
    """Set the registers so that the operand lies at `gpa` and holds what the log saw; returns the RIP to decode at."""
    regs = vcpu.regs
    if insn.mnemonic in STRING_MOVES:
        regs.rsi, regs.rdi, regs.rcx = (RAM_GPA, gpa, 1) if step.stored else (gpa, RAM_GPA, 1)
        machine.emit(Supplied("stored"))
        if step.stored:
            size = insn.memory[0].size
            spa = machine.vm_of(vcpu).memory_spa + RAM_GPA
            machine.memory.write(spa, (step.stored[0] & (1 << size * 8) - 1).to_bytes(size, "little"), None, vcpu.tag)
        return regs.rip
    for operand in insn.operands:
        if operand.kind == "reg" and step.stored and "read" in operand.access:
            write_register(regs, operand.register, step.stored[0] & (1 << operand.size * 8) - 1)
            machine.emit(Supplied("stored"))
    memory = insn.memory[0]
    if memory.index_register:
        write_register(regs, memory.index_register, 0)
    if memory.rip_relative:
        return regs.rip + gpa - memory.displacement & MASK64
    if memory.base:
        mask = (1 << memory.address_size) - 1
        scale = memory.scale + 1 if memory.base == memory.index_register else 1
        write_register(regs, memory.base, ((gpa - memory.displacement) & mask) // scale)
    elif memory.index_register:
        write_register(regs, memory.index_register, (gpa - memory.displacement & MASK64) // memory.scale)
    return regs.rip
