"""Local APIC, in its memory-mapped and its x2APIC form.

Source: spec 24593 (APM volume 2), chapter 16. The timer counts the virtual clock divided as the guest asks; its input
is one tick a nanosecond (1 GHz), a choice of ours.
"""

from __future__ import annotations

from sevlab.core.determinism import TSC_HZ
from sevlab.core.state import StateDict, Stateful, new
from sevlab.plugins.io.devices.registers import Register

LAPIC_GPA, LAPIC_BYTES = 0xFEE0_0000, 0x1000
APIC_BASE_MSR, X2APIC_MSR, X2APIC_MSR_LAST, TSC_DEADLINE_MSR = 0x1B, 0x800, 0x8FF, 0x6E0
BASE_BSP, BASE_X2APIC, BASE_ENABLE = 1 << 8, 1 << 10, 1 << 11
TIMER_HZ = 1_000_000_000

ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR_LOW, ICR_HIGH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVT_TIMER, LVT_LAST, TIMER_INITIAL, TIMER_CURRENT, TIMER_DIVIDE, SELF_IPI = 0x320, 0x370, 0x380, 0x390, 0x3E0, 0x3F0
SVR_ENABLE, LVT_MASK = 1 << 8, 1 << 16
TIMER_PERIODIC, TIMER_DEADLINE = 1, 2
FIRST_VECTOR = 16
ESR_SEND_ILLEGAL, ESR_RECEIVE_ILLEGAL, ESR_REGISTER = 1 << 5, 1 << 6, 1 << 7

REGISTERS = (
    Register(ID, "ID", 4, "r", "31:24 in xAPIC, all of it in x2APIC"),
    Register(VERSION, "version", 4, "r", "7:0 version, 23:16 last LVT entry"),
    Register(TPR, "task priority", 4, "rw", "7:0"),
    Register(PPR, "processor priority", 4, "r", "7:0"),
    Register(EOI, "end of interrupt", 4, "w", "the highest vector in service is done"),
    Register(LDR, "logical destination", 4, "rw", "31:24; derived and read-only in x2APIC"),
    Register(DFR, "destination format", 4, "rw", "31:28 Fh flat, 0 cluster; not in x2APIC"),
    Register(SVR, "spurious vector", 4, "rw", "7:0 vector, 8 enable"),
    Register(ISR, "in service", 32, "r", "256 bits"),
    Register(TMR, "trigger mode", 32, "r", "256 bits"),
    Register(IRR, "requested", 32, "r", "256 bits"),
    Register(ESR, "error status", 4, "rw", "a write loads it"),
    Register(ICR_LOW, "interrupt command", 8, "rw", "7:0 vector, 10:8 mode, 19:18 shorthand; 64 bits in x2APIC"),
    Register(LVT_TIMER, "LVT timer", 4, "rw", "7:0 vector, 16 mask, 18:17 one-shot, periodic, TSC deadline"),
    Register(0x330, "LVT thermal", 4, "rw", ""),
    Register(0x340, "LVT performance", 4, "rw", ""),
    Register(0x350, "LVT LINT0", 4, "rw", "10:8 mode: 7 ExtINT lets the 8259A pair in"),
    Register(0x360, "LVT LINT1", 4, "rw", ""),
    Register(LVT_LAST, "LVT error", 4, "rw", ""),
    Register(TIMER_INITIAL, "timer initial count", 4, "rw", "starts the timer"),
    Register(TIMER_CURRENT, "timer current count", 4, "r", ""),
    Register(TIMER_DIVIDE, "timer divide", 4, "rw", "bits 3, 1:0"),
    Register(SELF_IPI, "self IPI", 4, "w", "x2APIC only: 7:0 vector"),
)

LVTS = tuple(range(LVT_TIMER, LVT_LAST + 1, 0x10))
LVT_WRITABLE = 0x7_A7FF
"""Bits of an LVT entry that software may set; delivery status (12) and remote IRR (14) are read-only."""
WRITABLE = {TPR: 0xFF, LDR: 0xFF00_0000, DFR: 0xF000_0000, TIMER_DIVIDE: 0xB}
"""Plain registers, with the bits that hold something."""
FIXED_ONES = {DFR: 0x0FFF_FFFF}
RESET = {SVR: 0xFF, DFR: 0xFFFF_FFFF, **dict.fromkeys(LVTS, LVT_MASK)}


class Lapic(Stateful):
    """The APIC of one vCPU. IRR, ISR and TMR are 256-bit numbers, bit n for vector n."""

    apic_id: int = 0
    base: int = LAPIC_GPA | BASE_ENABLE
    registers: StateDict[int, int] = new(StateDict)
    irr: int = 0
    isr: int = 0
    tmr: int = 0
    icr: int = 0
    started: int = 0
    initial: int = 0
    fired: int = 0
    deadline: int = 0
    errors: int = 0
    """Noted since the last write of ESR, which shows them."""
    nmi_pending: bool = False
    nmi_blocked: bool = False
    """An NMI is being handled: until the guest's IRET, whose place is `nmi_iret_rip`."""
    nmi_iret_rip: int = -1
    waits_for_startup: bool = False

    def reset(self) -> None:
        """INIT: everything but the identifier and the base."""
        self.registers.clear()
        self.irr = self.isr = self.tmr = self.icr = 0
        self.started = self.initial = self.fired = self.deadline = self.errors = 0
        self.nmi_pending = self.nmi_blocked = self.waits_for_startup = False
        self.nmi_iret_rip = -1

    @property
    def enabled(self) -> bool:
        """Whether software switched the APIC on."""
        return bool(self.register(SVR) & SVR_ENABLE)

    @property
    def mapped(self) -> bool:
        """Whether the registers are at their window: enabled by APIC_BASE and not in x2APIC mode."""
        return self.base & (BASE_ENABLE | BASE_X2APIC) == BASE_ENABLE

    @property
    def x2apic(self) -> bool:
        """Whether the MSR form is on."""
        return bool(self.base & BASE_X2APIC)

    def register(self, offset: int) -> int:
        """A plain register's value."""
        return self.registers.get(offset, RESET.get(offset, 0))

    # Interrupts -------------------------------------------------------------------------------------------------

    def accept(self, vector: int, *, level: bool = False) -> bool:
        """A fixed interrupt arrives; vectors below 16 are refused and noted."""
        if not self.enabled:
            return False
        if vector < FIRST_VECTOR:
            self.errors |= ESR_RECEIVE_ILLEGAL
            return False
        self.irr |= 1 << vector
        self.tmr = self.tmr & ~(1 << vector) | level << vector
        return True

    @property
    def priority(self) -> int:
        """Processor priority: the task's, or that of the vector in service."""
        task = self.register(TPR) & 0xFF
        service = self.isr.bit_length() - 1 if self.isr else 0
        return task if task >> 4 >= service >> 4 else service & 0xF0

    def pending(self) -> int | None:
        """The highest requested vector, if its class is above the processor's priority."""
        if not self.irr:
            return None
        vector = self.irr.bit_length() - 1
        return vector if vector >> 4 > self.priority >> 4 else None

    def acknowledge(self) -> int | None:
        """Take the pending vector into service."""
        vector = self.pending()
        if vector is not None:
            self.irr &= ~(1 << vector)
            self.isr |= 1 << vector
        return vector

    def end_of_interrupt(self) -> int | None:
        """EOI; returns the vector that was in service."""
        if not self.isr:
            return None
        vector = self.isr.bit_length() - 1
        self.isr &= ~(1 << vector)
        return vector

    # Timer ------------------------------------------------------------------------------------------------------

    def _divisor(self) -> int:
        code = self.register(TIMER_DIVIDE)
        shift = (code & 3 | code >> 1 & 4) + 1 & 7
        return 1 << shift

    def _clocks(self, tsc: int) -> int:
        return (tsc - self.started) * TIMER_HZ // TSC_HZ // self._divisor()

    def current_count(self, tsc: int) -> int:
        """The timer's present count."""
        if not self.initial:
            return 0
        clocks = self._clocks(tsc)
        if self.register(LVT_TIMER) >> 17 & 3 == TIMER_PERIODIC:
            return self.initial - clocks % self.initial
        return max(self.initial - clocks, 0)

    def tick(self, tsc: int) -> None:
        """Request the timer's interrupt if it is due."""
        lvt = self.register(LVT_TIMER)
        mode = lvt >> 17 & 3
        if mode == TIMER_DEADLINE:
            due = bool(self.deadline) and tsc >= self.deadline
            if due:
                self.deadline = 0
        elif not self.initial:
            return
        else:
            expired = self._clocks(tsc) // self.initial
            if mode != TIMER_PERIODIC:
                expired = min(expired, 1)
            due = expired > self.fired
            if due:
                self.fired = expired
        if due and not lvt & LVT_MASK:  # a masked expiry is lost
            self.accept(lvt & 0xFF)

    def next_event(self) -> int | None:
        """The TSC at which the timer expires next; None when it is not armed or masked."""
        lvt = self.register(LVT_TIMER)
        mode = lvt >> 17 & 3
        if lvt & LVT_MASK:
            return None
        if mode == TIMER_DEADLINE:
            return self.deadline or None
        if not self.initial or (mode != TIMER_PERIODIC and self.fired):
            return None
        return self.started - (-(self.fired + 1) * self.initial * self._divisor() * TSC_HZ // TIMER_HZ)

    # Registers --------------------------------------------------------------------------------------------------

    def read(self, offset: int, tsc: int) -> int:
        """Read the 32-bit register at `offset` (a multiple of 16)."""
        if offset == ID:
            return self.apic_id if self.x2apic else self.apic_id << 24
        if offset == VERSION:
            return 0x0005_0014
        if offset == PPR:
            return self.priority
        for start, bitmap in ((ISR, self.isr), (TMR, self.tmr), (IRR, self.irr)):
            if start <= offset < start + 0x80:
                return bitmap >> (offset - start) * 2 & 0xFFFF_FFFF
        if offset == LDR and self.x2apic:
            return (self.apic_id >> 4) << 16 | 1 << (self.apic_id & 15)
        if offset in (ICR_LOW, ICR_HIGH):
            return self.icr >> (32 if offset == ICR_HIGH else 0) & 0xFFFF_FFFF
        if offset == TIMER_INITIAL:
            return self.initial
        if offset == TIMER_CURRENT:
            return self.current_count(tsc)
        return self.register(offset)

    def write(self, offset: int, value: int, tsc: int) -> None:
        """Write the 32-bit register at `offset`; EOI and the command register are the board's business."""
        if offset == TIMER_INITIAL:
            if self.register(LVT_TIMER) >> 17 & 3 != TIMER_DEADLINE:
                self.initial, self.started, self.fired = value, tsc, 0
        elif offset == LVT_TIMER:
            if (self.register(LVT_TIMER) >> 17 & 3 == TIMER_DEADLINE) != (value >> 17 & 3 == TIMER_DEADLINE):
                self.initial = self.deadline = 0  # another way to be armed disarms
            self._write_lvt(offset, value)
        elif LVT_TIMER < offset <= LVT_LAST:
            self._write_lvt(offset, value)
        elif offset == SVR:
            self.registers[SVR] = value & 0x1FF
            if not value & SVR_ENABLE:
                for lvt in LVTS:
                    self.registers[lvt] = self.register(lvt) | LVT_MASK
        elif offset == ICR_HIGH:
            self.icr = self.icr & 0xFFFF_FFFF | (value & 0xFF00_0000) << 32
        elif offset == TIMER_DIVIDE:
            clocks = self._clocks(tsc)  # the count goes on from where it is, at the new rate
            self.registers[offset] = value & WRITABLE[offset]
            self.started = tsc - clocks * self._divisor() * TSC_HZ // TIMER_HZ
        elif offset in WRITABLE:
            self.registers[offset] = value & WRITABLE[offset] | FIXED_ONES.get(offset, 0)
        elif offset == ESR:
            self.registers[ESR], self.errors = self.errors, 0

    def _write_lvt(self, offset: int, value: int) -> None:
        """While the APIC is off by software, every entry stays masked."""
        self.registers[offset] = value & LVT_WRITABLE | (0 if self.enabled else LVT_MASK)
