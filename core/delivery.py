"""Event delivery: what the processor does from an event to the first instruction of its handler.

IDT gate, code segment, stack switch by TSS or IST, the frame, RFLAGS; a fault on the way combines with the event and is
delivered instead, up to the triple fault. 64-bit mode, protected mode with 16- and 32-bit gates, and real mode. All
memory is reached as the guest reaches it - through its page tables, privately where the C-bit says so - and nothing
changes in the vCPU until the frame is written.

An engine that executes guest code calls `deliver`; the events of a guest that is only scripted have no handler in its
memory, so nothing else does.

Source: spec 24593 (APM volume 2), 8.7 (protected mode), 8.9 (long mode), 8.6 (real mode), 8.2.9 (double fault), and
24594 (APM volume 3), INT n.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.access import AccessKind
from sevlab.core.cpu import CR0_PE, FaultUnwind, Segment, Vcpu
from sevlab.core.events import Fault
from sevlab.core.exceptions import FAULTS, WITH_ERROR_CODE, Combined, combine
from sevlab.core.paging import CR4_LA57, EFER_LMA
from sevlab.core.svm import EVENT_ERROR_VALID, EventType, ExitCode, Vector, event
from sevlab.core.units import MASK32, MASK64

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

RFLAGS_TF, RFLAGS_IF, RFLAGS_NT, RFLAGS_RF, RFLAGS_VM = 1 << 8, 1 << 9, 1 << 14, 1 << 16, 1 << 17

IDT_ERROR = 1 << 1
"""Bit of an error code: the selector index is an IDT vector. Source: spec 24593, 8.4.1."""

TASK_GATE, GATE_16, GATE_32 = 0x5, (0x6, 0x7), (0xE, 0xF)
TRAP_GATE_BIT = 1 << 0
"""Set in a trap gate's type, clear in an interrupt gate's, which also clears RFLAGS.IF."""

TSS_RSP0, TSS_IST1 = 4, 36
"""Offsets in the 64-bit TSS. Source: spec 24593, 12.2.5."""


class Delivered(Enum):
    """How a delivery ended."""

    DELIVERED = "the handler runs next"
    SHUTDOWN = "triple fault"
    TASK_GATE = "a task gate: the processor would switch tasks, which is a TASK_SWITCH exit"
    VIRTUAL_8086 = "an event in virtual-8086 mode, which is not modelled"


class _Gate(NamedTuple):
    """What an IDT entry says; `width` is the bytes of a stack slot."""

    selector: int
    offset: int
    type: int
    dpl: int
    present: bool
    ist: int
    width: int


class _Stop(Exception):  # not an error: the way out of a delivery that the model does not do
    def __init__(self, how: Delivered) -> None:
        super().__init__(how)
        self.how = how


def deliver(machine: Machine, vcpu: Vcpu, word: int, *, next_rip: int | None = None) -> Delivered:
    """Deliver the event `word` (EVENTINJ format, valid bit set) to `vcpu`.

    `next_rip` is the address behind the instruction, for software interrupts, #BP and #OF: it is pushed instead of RIP.
    CR2 is the caller's for the event itself; a #PF on the way sets it here. Raises `FaultUnwind` with a nested page
    fault, after `exit_int_info` has been set to the event under way: the caller makes it an exit.
    Source: spec 24593, 8.7 to 8.9 and 15.7.2.
    """
    while True:
        try:
            _enter(machine, vcpu, word, next_rip)
        except _Stop as stop:
            return stop.how
        except FaultUnwind as unwind:
            fault = unwind.fault
            if fault.vector == ExitCode.NPF:
                vcpu.vmcb.exit_int_info = word
                raise
            combined = Combined.SECOND
            if word >> 8 & 7 == EventType.EXCEPTION:
                combined = combine(word & 0xFF, fault.vector)
            if combined is Combined.TRIPLE_FAULT:
                return Delivered.SHUTDOWN
            if fault.vector == Vector.PF:
                vcpu.system.cr2 = fault.address
            if combined is Combined.DOUBLE_FAULT:
                fault = Fault(Vector.DF, 0, 0)
            error_code = fault.error_code if fault.vector in WITH_ERROR_CODE else None
            word, next_rip = event(fault.vector, EventType.EXCEPTION, error_code), None
        else:
            return Delivered.DELIVERED


def _fault(vector: int, error_code: int) -> FaultUnwind:
    return FaultUnwind(Fault(vector, error_code, 0))


def _enter(machine: Machine, vcpu: Vcpu, word: int, next_rip: int | None) -> None:
    """One attempt; raises `FaultUnwind` with nothing changed."""
    system, regs = vcpu.system, vcpu.regs
    if not system.cr0 & CR0_PE:
        _enter_real(machine, vcpu, word & 0xFF, regs.rip if next_rip is None else next_rip)
        return
    if regs.rflags & RFLAGS_VM:
        raise _Stop(Delivered.VIRTUAL_8086)
    vector, kind = word & 0xFF, word >> 8 & 7
    long = bool(system.efer & EFER_LMA)
    software = kind == EventType.SOFTWARE or (kind == EventType.EXCEPTION and vector in (Vector.BP, Vector.OF))
    external = 0 if software else 1
    gate = _read_gate(machine, vcpu, vector, long=long, external=external, software=software)
    code, cpl = _code_segment(machine, vcpu, gate.selector, long=long, external=external)
    if long and not _canonical(vcpu, gate.offset):
        raise _fault(Vector.GP, 0)

    pushed = [regs.rflags | (RFLAGS_RF if kind == EventType.EXCEPTION and vector in FAULTS else 0), system.cs[0]]
    pushed.append(regs.rip if next_rip is None else next_rip)
    if word & EVENT_ERROR_VALID:
        pushed.append(word >> 32 & MASK32)
    stack: Segment = system.ss
    top = regs.rsp
    if long:
        if gate.ist:
            top = _tss_word(machine, vcpu, TSS_IST1 + 8 * (gate.ist - 1), 8, external)
        elif cpl < system.cpl:
            top = _tss_word(machine, vcpu, TSS_RSP0 + 8 * cpl, 8, external)
        top &= -16
        if cpl < system.cpl:
            stack = (cpl, cpl << 5, 0, 0)
        pushed = [system.ss[0], regs.rsp, *pushed]
    elif cpl < system.cpl:
        stack, top = _inner_stack(machine, vcpu, cpl, external)
        pushed = [system.ss[0], regs.rsp, *pushed]
    top = _push(machine, vcpu, stack, top, pushed, gate.width, cpl=cpl, long=long)

    system.cs, system.cpl = (gate.selector & ~3 | cpl, *code[1:]), cpl
    if stack is not system.ss:
        system.ss = stack
    regs.rsp, regs.rip = top, gate.offset
    cleared = RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM | (0 if gate.type & TRAP_GATE_BIT else RFLAGS_IF)
    regs.rflags &= ~cleared
    vcpu.vmcb.interrupt_state &= ~1  # the shadow of STI or MOV SS is over
    vcpu.halted = False


def _canonical(vcpu: Vcpu, address: int) -> bool:
    top = address >> (56 if vcpu.system.cr4 & CR4_LA57 else 47)
    return top in (0, (1 << (8 if vcpu.system.cr4 & CR4_LA57 else 17)) - 1)


def _read_gate(machine: Machine, vcpu: Vcpu, vector: int, *, long: bool, external: int, software: bool) -> _Gate:
    """The IDT entry of `vector`, checked. Source: spec 24593, 8.7.1 and 4.8.4; 24594, INT n."""
    _, _, limit, base = vcpu.system.idtr
    size = 16 if long else 8
    error = vector << 3 | IDT_ERROR | external
    if vector * size + size - 1 > limit:
        raise _fault(Vector.GP, error)
    entry = int.from_bytes(machine.access.guest_read(vcpu, base + vector * size & MASK64, size), "little")
    kind = entry >> 40 & 0x1F  # with the S bit, which must be 0
    offset = entry & 0xFFFF | entry >> 32 & 0xFFFF_0000
    width = 4
    if long:
        offset |= entry >> 32 & 0xFFFF_FFFF_0000_0000
        width = 8
    elif kind in GATE_16:
        offset &= 0xFFFF
        width = 2
    legal = GATE_32 if long else (TASK_GATE, *GATE_16, *GATE_32)
    gate = _Gate(
        entry >> 16 & 0xFFFF,
        offset,
        kind,
        entry >> 45 & 3,
        bool(entry >> 47 & 1),
        entry >> 32 & 7 if long else 0,
        width,
    )
    if gate.type not in legal or (software and gate.dpl < vcpu.system.cpl):
        raise _fault(Vector.GP, error)
    if not gate.present:
        raise _fault(Vector.NP, error)
    if gate.type == TASK_GATE:
        raise _Stop(Delivered.TASK_GATE)
    return gate


def read_descriptor(machine: Machine, vcpu: Vcpu, selector: int) -> tuple[int, int] | None:
    """(descriptor, 8 bytes; its linear address) that `selector` names in the GDT or LDT; None past the limit.

    Source: spec 24593, 4.7.
    """
    _, _, limit, base = vcpu.system.ldtr if selector & 4 else vcpu.system.gdtr
    if (selector | 7) > limit:
        return None
    address = base + (selector & ~7) & MASK64
    return int.from_bytes(machine.access.guest_read(vcpu, address, 8), "little"), address


def segment_of(selector: int, descriptor: int) -> Segment:
    """A code or data descriptor as the VMCB holds a segment. Source: spec 24593, 4.8.1 and 15.5.1."""
    attributes = descriptor >> 40 & 0xFF | descriptor >> 44 & 0xF00
    limit = descriptor & 0xFFFF | descriptor >> 32 & 0xF_0000
    if attributes & 0x800:
        limit = limit << 12 | 0xFFF
    base = descriptor >> 16 & 0xFF_FFFF | descriptor >> 32 & 0xFF00_0000
    return (selector, attributes, limit, base)


def _code_segment(machine: Machine, vcpu: Vcpu, selector: int, *, long: bool, external: int) -> tuple[Segment, int]:
    """The handler's code segment and privilege level. Source: spec 24593, 8.7.2 and 8.9.2."""
    cpl = vcpu.system.cpl
    if not selector & ~3:
        raise _fault(Vector.GP, external)
    error = selector & ~3 | external
    found = read_descriptor(machine, vcpu, selector)
    if found is None:
        raise _fault(Vector.GP, error)
    segment = segment_of(selector, found[0])
    attributes = segment[1]
    dpl = attributes >> 5 & 3
    if attributes & 0x18 != 0x18 or dpl > cpl:  # S and code
        raise _fault(Vector.GP, error)
    if long and attributes & 0x600 != 0x200:  # L without D
        raise _fault(Vector.GP, error)
    if not attributes & 0x80:
        raise _fault(Vector.NP, error)
    return segment, cpl if attributes & 4 else dpl


def _tss_word(machine: Machine, vcpu: Vcpu, offset: int, width: int, external: int) -> int:
    """`width` bytes at `offset` of the TSS; #TS past its limit. Source: spec 24593, 12.2.5 and 8.2.11."""
    selector, _, limit, base = vcpu.system.tr
    if offset + width - 1 > limit:
        raise _fault(Vector.TS, selector & ~3 | external)
    return int.from_bytes(machine.access.guest_read(vcpu, base + offset & MASK64, width), "little")


def _inner_stack(machine: Machine, vcpu: Vcpu, cpl: int, external: int) -> tuple[Segment, int]:
    """SS and ESP for privilege level `cpl` from a 16- or 32-bit TSS, checked. Source: spec 24593, 8.7.3 and 12.2."""
    wide = bool(vcpu.system.tr[1] & 8)
    width, place = (4, 4 + 8 * cpl) if wide else (2, 2 + 4 * cpl)
    pointer = _tss_word(machine, vcpu, place, width, external)
    selector = _tss_word(machine, vcpu, place + width, 2, external)
    error = selector & ~3 | external
    found = read_descriptor(machine, vcpu, selector) if selector & ~3 else None
    if found is None or selector & 3 != cpl:
        raise _fault(Vector.TS, error)
    segment = segment_of(selector, found[0])
    if segment[1] & 0x1A != 0x12 or segment[1] >> 5 & 3 != cpl:  # writable data of this level
        raise _fault(Vector.TS, error)
    if not segment[1] & 0x80:
        raise _fault(Vector.SS, error)
    return segment, pointer


def _push(
    machine: Machine, vcpu: Vcpu, stack: Segment, top: int, words: list[int], width: int, *, cpl: int, long: bool
) -> int:
    """Store `words`, the first at the highest address, below `top`; returns the new stack pointer."""
    kind = AccessKind.WRITE | (AccessKind.USER if cpl == 3 else 0)
    mask = (1 << width * 8) - 1
    frame = b"".join((word & mask).to_bytes(width, "little") for word in reversed(words))
    if long:
        lowest = top - len(frame) & MASK64
        if not (_canonical(vcpu, lowest) and _canonical(vcpu, top - 1 & MASK64)):
            raise _fault(Vector.SS, 0)
        machine.access.guest_write(vcpu, lowest, frame, kind)
        return lowest
    wrap = MASK32 if stack[1] & 0x400 else 0xFFFF  # B: a 32-bit stack pointer
    lowest = (top & wrap) - len(frame) & wrap
    if not _within(stack, lowest, len(frame), wrap):
        raise _fault(Vector.SS, 0 if stack is vcpu.system.ss else stack[0] & ~3)
    machine.access.guest_write(vcpu, stack[3] + lowest & MASK32, frame, kind)
    return top & ~wrap | lowest


def _within(stack: Segment, lowest: int, length: int, wrap: int) -> bool:
    """Whether the bytes lie inside the segment's limit; an expand-down one begins above it. Source: 24593, 4.12."""
    if stack[1] & 0xC == 0x4:
        return lowest > stack[2] and lowest + length - 1 <= wrap
    return lowest + length - 1 <= stack[2]


def _enter_real(machine: Machine, vcpu: Vcpu, vector: int, return_ip: int) -> None:
    """Through the interrupt vector table: FLAGS, CS, IP on the stack, no error code. Source: spec 24593, 8.6."""
    system, regs = vcpu.system, vcpu.regs
    _, _, limit, base = system.idtr
    if vector * 4 + 3 > limit:
        raise _fault(Vector.GP, 0)
    entry = int.from_bytes(machine.access.guest_read(vcpu, base + vector * 4 & MASK32, 4), "little")
    words = [regs.rflags & 0xFFFF, system.cs[0], return_ip]
    regs_rsp = _push(machine, vcpu, system.ss, regs.rsp, words, 2, cpl=0, long=False)
    selector = entry >> 16
    system.cs = (selector, system.cs[1], system.cs[2], selector << 4)
    regs.rsp, regs.rip = regs_rsp, entry & 0xFFFF
    regs.rflags &= ~(RFLAGS_TF | RFLAGS_IF | RFLAGS_RF)
    vcpu.vmcb.interrupt_state &= ~1
    vcpu.halted = False
