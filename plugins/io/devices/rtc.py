"""CMOS clock and memory. Time is the virtual clock's, from a fixed start; BCD and binary, 12 and 24 hours.

Source: Motorola MC146818A datasheet; PC architecture (ports 70h and 71h, IRQ 8).
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sevlab.core.determinism import TSC_HZ
from sevlab.core.state import StateDict, Stateful, new
from sevlab.plugins.io.devices.registers import Register

RTC_PORT = 0x70
RTC_IRQ = 8
EPOCH = datetime(2025, 1, 1, tzinfo=UTC)
"""What the clock shows when the machine starts; fixed, so that runs repeat."""

UPDATE_TICKS = 244 * TSC_HZ // 1_000_000
"""UIP goes up 244 us before the seconds change."""

REGISTERS = (
    Register(0x70, "index", 1, "w", "6:0 register, 7 masks NMI"),
    Register(0x71, "data", 1, "rw", "00 seconds .. 09 year, 0A-0D status, 32 century, else memory"),
)

STATUS_A, STATUS_B, STATUS_C, STATUS_D, CENTURY = 0x0A, 0x0B, 0x0C, 0x0D, 0x32
A_UIP, B_24_HOURS, B_BINARY, B_SET, D_VALID = 0x80, 0x02, 0x04, 0x80, 0x80
PM = 0x80
TIME_REGISTERS = (0, 2, 4, 6, 7, 8, 9, CENTURY)


class Rtc(Stateful):
    """Index, control registers and 128 bytes of memory.

    The clock is the virtual one and cannot be set: writes to the time registers are ignored.
    """

    index: int = 0
    status_a: int = 0x26
    status_b: int = B_24_HOURS
    status_c: int = 0
    memory: StateDict[int, int] = new(StateDict)

    def now(self, tsc: int) -> datetime:
        """The time on the clock."""
        return EPOCH + timedelta(seconds=tsc // TSC_HZ)

    def write(self, port: int, value: int) -> None:
        """Write a byte to 70h or 71h."""
        value &= 0xFF
        if port == RTC_PORT:
            self.index = value & 0x7F
        elif self.index == STATUS_A:
            self.status_a = value & 0x7F
        elif self.index == STATUS_B:
            self.status_b = value
        elif self.index not in (STATUS_C, STATUS_D, *TIME_REGISTERS):
            self.memory[self.index] = value

    def read(self, port: int, tsc: int) -> int:
        """Read a byte; the index port reads all ones."""
        if port == RTC_PORT:
            return 0xFF
        index = self.index
        if index == STATUS_A:
            updating = not self.status_b & B_SET and tsc % TSC_HZ >= TSC_HZ - UPDATE_TICKS
            return self.status_a | (A_UIP if updating else 0)
        if index == STATUS_B:
            return self.status_b
        if index == STATUS_C:
            value, self.status_c = self.status_c, 0
            return value
        if index == STATUS_D:
            return D_VALID
        field = self._field(index, tsc)
        return self.memory.get(index, 0) if field is None else field

    def _field(self, index: int, tsc: int) -> int | None:
        now = self.now(tsc)
        if index == 4:
            return self._hour(now.hour)
        fields = {
            0: now.second,
            2: now.minute,
            6: now.isoweekday() % 7 + 1,
            7: now.day,
            8: now.month,
            9: now.year % 100,
            CENTURY: now.year // 100,
        }
        value = fields.get(index)
        return None if value is None else self._coded(value)

    def _coded(self, value: int) -> int:
        return value if self.status_b & B_BINARY else value // 10 << 4 | value % 10

    def _hour(self, hour: int) -> int:
        if self.status_b & B_24_HOURS:
            return self._coded(hour)
        return self._coded((hour + 11) % 12 + 1) | (PM if hour >= 12 else 0)
