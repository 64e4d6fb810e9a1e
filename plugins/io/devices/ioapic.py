"""I/O APIC with 24 pins. Source: Intel 82093AA datasheet."""

from __future__ import annotations

from collections.abc import Callable

from sevlab.core.state import StateDict, Stateful, new
from sevlab.plugins.io.devices.registers import Register

IOAPIC_GPA, IOAPIC_BYTES = 0xFEC0_0000, 0x1000
PINS = 24
PIT_PIN = 2
"""Where IRQ 0 arrives, as PC firmware announces."""
SELECT, WINDOW, EOI = 0x00, 0x10, 0x40
MASKED, LEVEL, REMOTE_IRR = 1 << 16, 1 << 15, 1 << 14
READ_ONLY = REMOTE_IRR | 1 << 12
DESTINATION = 0xFF00_0000

REGISTERS = (
    Register(0x00, "select", 4, "rw", "index: 0 ID, 1 version, 10h + 2n and 11h + 2n pin n"),
    Register(0x10, "window", 4, "rw", "the selected register"),
    Register(0x40, "EOI", 4, "w", "end of interrupt of a vector"),
)

Deliver = Callable[[int], None]
"""Called with the redirection entry of the pin that asks."""


class IoApic(Stateful):
    """The redirection table by pin (64 bits each), and which pins ask (whatever their polarity)."""

    select: int = 0
    identifier: int = 0
    redirection: StateDict[int, int] = new(StateDict)
    lines: int = 0

    def entry(self, pin: int) -> int:
        """Redirection entry of `pin`; masked at reset."""
        return self.redirection.get(pin, MASKED)

    def set_line(self, pin: int, *, level: bool, deliver: Deliver) -> None:
        """Pin `pin` (0 to 23) has this level now."""
        if not 0 <= pin < PINS:
            return
        before = bool(self.lines >> pin & 1)
        self.lines = self.lines & ~(1 << pin) | level << pin
        entry = self.entry(pin)
        if level and (entry & LEVEL or not before):
            self._request(pin, deliver)

    def _request(self, pin: int, deliver: Deliver) -> None:
        entry = self.entry(pin)
        if entry & MASKED or entry & REMOTE_IRR:
            return
        if entry & LEVEL:
            self.redirection[pin] = entry | REMOTE_IRR
        deliver(entry)

    def end_of_interrupt(self, vector: int, deliver: Deliver) -> None:
        """A level-triggered vector is done: a pin that is still up asks again."""
        for pin in range(PINS):
            entry = self.entry(pin)
            if entry & LEVEL and entry & REMOTE_IRR and entry & 0xFF == vector:
                self.redirection[pin] = entry & ~REMOTE_IRR
                if self.lines >> pin & 1:
                    self._request(pin, deliver)

    def read(self, offset: int) -> int:
        """Read 32 bits at `offset` of the window."""
        if offset == SELECT:
            return self.select
        if offset != WINDOW:
            return 0
        index = self.select
        if index in (0, 2):
            return self.identifier << 24
        if index == 1:
            return 0x11 | PINS - 1 << 16
        if 0x10 <= index < 0x10 + 2 * PINS:
            return self.entry(index - 0x10 >> 1) >> 32 * (index & 1) & 0xFFFF_FFFF
        return 0

    def write(self, offset: int, value: int, deliver: Deliver) -> None:
        """Write 32 bits at `offset` of the window."""
        if offset == SELECT:
            self.select = value & 0xFF
        elif offset == EOI:
            self.end_of_interrupt(value & 0xFF, deliver)
        elif offset == WINDOW:
            self._write_selected(value & 0xFFFF_FFFF, deliver)

    def _write_selected(self, value: int, deliver: Deliver) -> None:
        index = self.select
        if index == 0:
            self.identifier = value >> 24 & 0xF
        elif 0x10 <= index < 0x10 + 2 * PINS:
            pin = index - 0x10 >> 1
            old = self.entry(pin)
            if index & 1:
                self.redirection[pin] = old & 0xFFFF_FFFF | (value & DESTINATION) << 32
                return
            self.redirection[pin] = old >> 32 << 32 | value & ~READ_ONLY & 0x1_FFFF | old & READ_ONLY
            if not value & LEVEL:
                self.redirection[pin] &= ~REMOTE_IRR
            if value & LEVEL and not value & MASKED and self.lines >> pin & 1:
                self._request(pin, deliver)
