"""Nested page faults: memory that is mapped again, and device accesses that are emulated.

With decode assist the exit brings the instruction's bytes; without, the hypervisor fetches them - from a plain guest.
Corner cases end as the architecture and its errata say: a fault on the guest's page tables or on a fetch has no
operand and the guest is resumed; an SEV guest without bytes is erratum 1096.
Source: spec 24593, 15.25.6 and 15.8.4; Linux arch/x86/kvm/svm/svm.c, svm_check_emulate_instruction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.access import AccessKind
from sevlab.core.cpu import INSN_BYTES_MAX, FaultUnwind, Registers, visible_registers
from sevlab.core.state import capture, restore
from sevlab.core.svm import NpfError, Vector
from sevlab.core.units import PAGE_BYTES
from sevlab.plugins.io.bus import CannotServe, PlainBus, SevBus, window_at
from sevlab.plugins.io.coverage import refusal
from sevlab.plugins.io.decode import Insn, Undecodable, decode
from sevlab.plugins.io.emulate import Unsupported, execute
from sevlab.plugins.io.execution import Execution
from sevlab.plugins.io.injection import inject_exception
from sevlab.plugins.io.modes import Mode, mode_of
from sevlab.plugins.io.unserved import unserved

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.events import CpuExit
    from sevlab.core.machine import Machine

CR4_SMEP, CR4_SMAP = 1 << 20, 1 << 21
CS_LONG, CS_BIG = 1 << 9, 1 << 10
MAX_ELEMENTS = 1024
"""Elements of a repeated instruction that one exit serves; the guest then executes it again for the rest."""


def code_bits(vcpu: Vcpu) -> int:
    """16, 32 or 64: the width of the guest's code segment."""
    attributes = vcpu.system.cs[1]
    if attributes & CS_LONG:
        return 64
    return 32 if attributes & CS_BIG else 16


def handle(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """Serve a nested page fault."""
    gpa, error = exit_.exit_info_2, exit_.exit_info_1
    vm = machine.vm_of(vcpu)
    if gpa < vm.memory_bytes and not error & NpfError.P:
        page = gpa & -PAGE_BYTES
        machine.access.nested_tables(vm).map(page, vm.memory_spa + page, PAGE_BYTES)
        machine.access.forget()
        return
    if error & (NpfError.TABLE_WALK | NpfError.ID):
        return  # no operand to emulate: the guest tries again
    mode = mode_of(vcpu)
    if mode is Mode.SEV_ES:
        return  # no decoding is ever possible; the guest tries again and gets #VC when the page is marked MMIO
    data = exit_.insn or (fetch(machine, vcpu) if mode is Mode.PLAIN else b"")
    if not data:
        _no_bytes(machine, vcpu, exit_)
        return
    insn = decode(data, code_bits(vcpu), vcpu.regs.rip)
    if isinstance(insn, Undecodable):
        inject_exception(machine, vcpu, Vector.UD)
        return
    emulate(machine, vcpu, exit_, insn)


def fetch(machine: Machine, vcpu: Vcpu) -> bytes:
    """The bytes at RIP as the hypervisor reads them: up to 15, fewer before an unmapped page."""
    base = 0 if code_bits(vcpu) == 64 else vcpu.system.cs[3]
    linear = base + vcpu.regs.rip
    out = b""
    for count in (INSN_BYTES_MAX, PAGE_BYTES - (linear & PAGE_BYTES - 1)):
        try:
            out = machine.access.guest_read(vcpu, linear, min(count, INSN_BYTES_MAX), AccessKind.FETCH)
            break
        except FaultUnwind:
            continue  # the second page may be missing; the instruction may end in the first
    return out


def _no_bytes(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """An SEV guest without instruction bytes: erratum 1096 where SMAP explains it, else #UD."""
    cr4, cpl = vcpu.system.cr4, vcpu.system.cpl
    if mode_of(vcpu) is Mode.PLAIN:
        unserved(machine, vcpu, exit_, "the instruction cannot be fetched")
    elif cr4 & CR4_SMAP and (not cr4 & CR4_SMEP or cpl == 3):
        if cpl == 3:
            inject_exception(machine, vcpu, Vector.GP, 0)
        else:
            machine.hypervisor.stop(machine, vcpu.vm_id, "triple fault: erratum 1096 left no instruction bytes")
    else:
        inject_exception(machine, vcpu, Vector.UD)


def emulate(machine: Machine, vcpu: Vcpu, exit_: CpuExit, insn: Insn) -> None:
    """Execute `insn` for the guest; a fault of its own becomes an exception, and the registers stay."""
    registers = visible_registers(machine, vcpu)
    mode = mode_of(vcpu)
    reason = refusal(insn, mode)
    if reason:
        unserved(machine, vcpu, exit_, reason)
        return
    if mode is Mode.SEV:
        run = Execution(insn, registers, vcpu.system, PlainBus(machine, vcpu))
        linear = run.linear(insn.memory[0]) if insn.memory else 0
        bus: PlainBus | SevBus = SevBus(machine, vcpu, exit_.exit_info_2, linear)
    else:
        bus = PlainBus(machine, vcpu)
    scratch = restore(Registers(), capture(registers))
    try:
        result = execute(insn, scratch, vcpu.system, bus)
    except FaultUnwind as unwind:
        if insn.prefixes:
            scratch.rip = registers.rip
            restore(registers, capture(scratch))  # the elements before the fault are done
        if unwind.fault.vector == Vector.PF:
            vcpu.system.cr2 = unwind.fault.address
        inject_exception(machine, vcpu, unwind.fault.vector, unwind.fault.error_code)
        return
    except CannotServe as cannot:
        unserved(machine, vcpu, exit_, str(cannot))
        return
    if isinstance(result, Unsupported):
        unserved(machine, vcpu, exit_, result.reason)
        return
    restore(registers, capture(scratch))


def is_device(machine: Machine, gpa: int) -> bool:
    """Whether a device answers at `gpa`."""
    return window_at(machine, gpa) is not None
