"""8254 timer: three counters at 1193182 Hz, and port 61h with the speaker's gate.

Counting is a function of virtual time: nothing runs in between. Modes 0 (one shot), 2 (rate), 3 (square) and what
Linux uses of them; 1 and 5 start at the count instead of a trigger, and a new count of modes 2 and 3 takes effect at
once instead of at the end of the period. Source: Intel 8254 datasheet; PC architecture.
"""

from __future__ import annotations

from sevlab.core.determinism import TSC_HZ
from sevlab.core.state import Stateful, new
from sevlab.plugins.io.devices.registers import Register

PIT_PORT, GATE_PORT = 0x40, 0x61
PIT_HZ = 1193182
PIT_IRQ = 0

REGISTERS = (
    Register(0x40, "counter 0", 1, "rw", "IRQ 0"),
    Register(0x41, "counter 1", 1, "rw", "refresh"),
    Register(0x42, "counter 2", 1, "rw", "speaker, gated by port 61h"),
    Register(0x43, "control", 1, "w", "7:6 counter (3: read back), 5:4 access, 3:1 mode, 0 BCD"),
    Register(0x61, "gate", 1, "rw", "0 gate of counter 2, 1 speaker, 4 refresh toggle, 5 output of counter 2"),
)

LATCH, LOW, HIGH, BOTH = 0, 1, 2, 3


class Counter(Stateful):
    """One counter; `started` is the TSC at which `count` began to run."""

    count: int = 0x10000
    started: int = 0
    mode: int = 0
    access: int = BOTH
    bcd: bool = False
    gate: bool = True
    low_written: int = -1
    second_read: bool = False
    latched: int = -1
    status: int = -1
    loaded: bool = False
    reported: int = 0
    """How many output edges of counter 0 have been given to the interrupt controller."""

    def elapsed(self, tsc: int) -> int:
        """Input clocks since the count was loaded."""
        return (tsc - self.started) * PIT_HZ // TSC_HZ

    def value(self, tsc: int) -> int:
        """The counter's present value as a read shows it: 16 bits, four decimal digits in BCD."""
        limit = 10_000 if self.bcd else 0x10000
        if not (self.loaded and self.gate):
            shown = self.count
        elif self.mode in (2, 3):
            step = 2 if self.mode == 3 else 1
            shown = self.count - self.elapsed(tsc) * step % self.count
        else:
            shown = self.count - self.elapsed(tsc)
        shown %= limit
        return int(f"{shown:04d}", 16) if self.bcd else shown

    def output(self, tsc: int) -> bool:
        """The level of OUT."""
        if not self.loaded:
            return self.mode != 0
        clocks = self.elapsed(tsc)
        if self.mode in (2, 3):
            place = clocks % self.count
            low = place == self.count - 1 if self.mode == 2 else place >= (self.count + 1) // 2
            return not (low and self.gate)
        if self.mode in (4, 5):
            return clocks != self.count  # a strobe of one clock
        return clocks >= self.count

    def edges(self, tsc: int) -> int:
        """Rising edges of OUT since the count was loaded."""
        if not self.loaded:
            return 0
        clocks = self.elapsed(tsc)
        return clocks // self.count if self.mode in (2, 3) else int(clocks >= self.count)

    def load(self, value: int, tsc: int) -> None:
        """A complete count: 0 means 65536 (10000 in BCD)."""
        if self.bcd:  # digits above 9 are undefined: each counts its value here
            value = sum((value >> 4 * place & 0xF) * 10**place for place in range(4)) % 10_000
        self.count = value or (10_000 if self.bcd else 0x10000)
        self.started = tsc
        self.loaded = True
        self.reported = 0


class Pit(Stateful):
    """The three counters and the gate port."""

    channel_0: Counter = new(Counter)
    channel_1: Counter = new(Counter)
    channel_2: Counter = new(Counter)
    speaker: bool = False

    @property
    def counters(self) -> tuple[Counter, Counter, Counter]:
        """Counters 0 to 2."""
        return self.channel_0, self.channel_1, self.channel_2

    def write(self, port: int, value: int, tsc: int) -> None:
        """Write a byte to 40h-43h or 61h."""
        value &= 0xFF
        if port == GATE_PORT:
            gate = bool(value & 1)
            if gate and not self.channel_2.gate:
                self.channel_2.started = tsc
            self.channel_2.gate = gate
            self.speaker = bool(value & 2)
        elif port == PIT_PORT + 3:
            self._control(value, tsc)
        else:
            self._count(self.counters[port - PIT_PORT], value, tsc)

    def _count(self, counter: Counter, value: int, tsc: int) -> None:
        if counter.access == LOW:
            counter.load(value, tsc)
        elif counter.access == HIGH:
            counter.load(value << 8, tsc)
        elif counter.low_written < 0:
            counter.low_written = value
            if counter.mode == 0:
                counter.loaded = False  # the first byte of a new count stops a one-shot. Source: 8254 datasheet, mode 0
        else:
            counter.load(value << 8 | counter.low_written, tsc)
            counter.low_written = -1

    def _control(self, value: int, tsc: int) -> None:
        number = value >> 6
        if number == 3:
            self._read_back(value, tsc)
            return
        counter = self.counters[number]
        access = value >> 4 & 3
        if access == LATCH:
            if counter.latched < 0:
                counter.latched = counter.value(tsc)
            return
        mode = value >> 1 & 7
        counter.mode = mode & 3 if mode > 5 else mode
        counter.access = access
        counter.bcd = bool(value & 1)
        counter.low_written = counter.latched = counter.status = -1
        counter.second_read = counter.loaded = False

    def _read_back(self, value: int, tsc: int) -> None:
        for index, counter in enumerate(self.counters):
            if not value >> index + 1 & 1:
                continue
            if not value & 0x20 and counter.latched < 0:
                counter.latched = counter.value(tsc)
            if not value & 0x10 and counter.status < 0:
                counter.status = (
                    counter.output(tsc) << 7
                    | (not counter.loaded) << 6
                    | counter.access << 4
                    | counter.mode << 1
                    | counter.bcd
                )

    def read(self, port: int, tsc: int) -> int:
        """Read a byte from 40h-42h or 61h; the control port reads zero."""
        if port == GATE_PORT:
            counter = self.channel_2
            toggle = tsc // (TSC_HZ // 66_000) & 1
            return counter.gate | self.speaker << 1 | toggle << 4 | counter.output(tsc) << 5
        if port == PIT_PORT + 3:
            return 0
        counter = self.counters[port - PIT_PORT]
        if counter.status >= 0:
            status, counter.status = counter.status, -1
            return status
        value = counter.latched if counter.latched >= 0 else counter.value(tsc)
        if counter.access == BOTH and not counter.second_read:
            counter.second_read = True
            return value & 0xFF
        counter.second_read = False
        counter.latched = -1
        return value & 0xFF if counter.access == LOW else value >> 8

    def due(self, tsc: int) -> bool:
        """Whether counter 0 has an edge that the interrupt controller has not seen; asking takes it."""
        counter = self.channel_0
        edges = counter.edges(tsc)
        if edges <= counter.reported:
            return False
        counter.reported = edges
        return True

    def next_event(self) -> int | None:
        """The TSC of counter 0's next edge that the interrupt controller has not seen."""
        counter = self.channel_0
        if not counter.loaded or (counter.mode not in (2, 3) and counter.reported):
            return None
        return counter.started - (-(counter.reported + 1) * counter.count * TSC_HZ // PIT_HZ)
