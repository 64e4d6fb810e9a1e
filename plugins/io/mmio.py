"""Nested page faults: memory that is mapped again, and device accesses that are emulated.

With decode assist the exit brings the instruction's bytes; without, the hypervisor fetches them - from a plain guest.
Corner cases end as the architecture and its errata say: a fault on the guest's page tables or on a fetch has no
operand and the guest is resumed; an SEV guest without bytes is erratum 1096.
Source: spec 24593, 15.25.6 and 15.8.4; Linux arch/x86/kvm/svm/svm.c, svm_check_emulate_instruction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.access import CPL_USER, AccessKind
from sevlab.core.cpu import INSN_BYTES_MAX, FaultUnwind, end_shadow, visible_registers
from sevlab.core.svm import ExitCode, NpfError, Vector
from sevlab.core.units import PAGE_BYTES, PAGE_MASK
from sevlab.plugins.io.bus import NPF_PRESENT, CannotServe, PlainBus, SevBus, map_back
from sevlab.plugins.io.coverage import refusal
from sevlab.plugins.io.decode import Insn, Undecodable, decode, too_long
from sevlab.plugins.io.emulate import Unsupported, execute
from sevlab.plugins.io.injection import inject_exception
from sevlab.plugins.io.modes import Mode, mode_of
from sevlab.plugins.io.unserved import unserved

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.events import CpuExit, Fault
    from sevlab.core.machine import Machine
    from sevlab.plugins.io.execution import Bus

CR4_SMEP, CR4_SMAP = 1 << 20, 1 << 21
CS_LONG, CS_BIG = 1 << 9, 1 << 10
NO_OPERAND = int(NpfError.TABLE_WALK | NpfError.ID)
TRUNCATED = Undecodable("no_more_bytes")
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
    error = exit_.exit_info_1
    if map_back(machine, vcpu, exit_.exit_info_2, error):
        return
    if error & NO_OPERAND:
        return  # no operand to emulate: the guest tries again
    mode = mode_of(vcpu)
    if mode is Mode.SEV_ES:
        return  # no decoding is ever possible; the guest tries again and gets #VC when the page is marked MMIO
    data = exit_.insn
    if not data and mode is Mode.PLAIN:
        data = fetch(machine, vcpu)
    if not data:
        _no_bytes(machine, vcpu, exit_)
        return
    bits = code_bits(vcpu)
    insn = decode(data, bits, vcpu.regs.rip)
    if insn == TRUNCATED and mode is Mode.PLAIN:
        data = fetch(machine, vcpu)  # decode assist stops at the end of a page
        insn = decode(data, bits, vcpu.regs.rip)
    if isinstance(insn, Insn):
        emulate(machine, vcpu, exit_, insn)
    elif insn == TRUNCATED:
        unserved(machine, vcpu, exit_, "the instruction's bytes are not complete")
    elif too_long(data, bits):
        inject_exception(machine, vcpu, Vector.GP, 0)
    else:
        inject_exception(machine, vcpu, Vector.UD)


def fetch(machine: Machine, vcpu: Vcpu) -> bytes:
    """The bytes at RIP as the hypervisor reads them: 15, or what there is before an unmapped page."""
    wide = code_bits(vcpu) == 64
    linear = vcpu.regs.rip if wide else vcpu.system.cs[3] + vcpu.regs.rip & 0xFFFF_FFFF
    before_next_page = PAGE_BYTES - (linear & PAGE_MASK)
    for count in (INSN_BYTES_MAX, min(INSN_BYTES_MAX, before_next_page)):
        try:
            return machine.access.guest_read(vcpu, linear, count, AccessKind.FETCH)
        except FaultUnwind:
            continue  # the second page may be missing, and the instruction may end in the first
    return b""


def _no_bytes(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """No instruction bytes: erratum 1096 where SMAP explains it; else the guest tries again.

    The microcode reads the bytes as a data load at CPL 0, which SMAP stops. Nothing that could be injected at CPL 0
    would fit the guest's page tables. Source: AMD revision guide for family 17h, erratum 1096; Linux
    arch/x86/kvm/svm/svm.c, svm_check_emulate_instruction.
    """
    if mode_of(vcpu) is Mode.PLAIN:
        unserved(machine, vcpu, exit_, "the instruction cannot be fetched")
        return
    cr4, user = vcpu.system.cr4, vcpu.system.cpl == CPL_USER
    if cr4 & CR4_SMAP and (not cr4 & CR4_SMEP or user):
        if user:
            inject_exception(machine, vcpu, Vector.GP, 0)
        else:
            machine.hypervisor.stop(machine, vcpu.vm_id, "triple fault: erratum 1096 left no instruction bytes")


def emulate(machine: Machine, vcpu: Vcpu, exit_: CpuExit, insn: Insn) -> None:
    """Execute `insn` for the guest; a fault of its own becomes an exception, and RIP stays."""
    registers = visible_registers(machine, vcpu)
    mode = mode_of(vcpu)
    reason = refusal(insn, mode)
    if reason:
        unserved(machine, vcpu, exit_, reason)
        return
    gpa = exit_.exit_info_2
    if mode is Mode.SEV:
        bus: Bus = SevBus(machine, vcpu, gpa)
    else:
        bus = PlainBus(machine, vcpu, -1 if exit_.exit_info_1 & NPF_PRESENT else gpa & -PAGE_BYTES)
    try:
        result = execute(insn, registers, vcpu.system, bus, max_elements=MAX_ELEMENTS)
    except FaultUnwind as unwind:
        reflect(machine, vcpu, exit_, unwind.fault)
        return
    except CannotServe as cannot:
        unserved(machine, vcpu, exit_, str(cannot))
        return
    if isinstance(result, Unsupported):
        unserved(machine, vcpu, exit_, result.reason)
    else:
        end_shadow(vcpu)


def reflect(machine: Machine, vcpu: Vcpu, exit_: CpuExit, fault: Fault) -> None:
    """What becomes of a fault that an emulated access met.

    The guest's own fault goes to the guest. A nested one can only be about its page tables: memory that is mapped
    again, and then the guest executes the instruction again; or tables where there is no memory.
    """
    if fault.vector == ExitCode.NPF:
        if not map_back(machine, vcpu, fault.address, fault.error_code):
            unserved(machine, vcpu, exit_, "the guest's page tables lie outside its memory")
        return
    if fault.vector == Vector.PF:
        vcpu.system.cr2 = fault.address
    inject_exception(machine, vcpu, fault.vector, fault.error_code)
