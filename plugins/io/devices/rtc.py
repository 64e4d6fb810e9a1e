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
    Register(0x71, "data", 1, "rw", "00 to 09 time and alarm, 0A to 0D status, 32 century, else memory"),
)

STATUS_A, STATUS_B, STATUS_C, STATUS_D, CENTURY = 0x0A, 0x0B, 0x0C, 0x0D, 0x32
A_UIP, B_24_HOURS, B_BINARY, B_SET, D_VALID = 0x80, 0x02, 0x04, 0x80, 0x80
PM = 0x80
C_IRQ, C_PERIODIC, C_ALARM, C_UPDATE = 0x80, 0x40, 0x20, 0x10
"""Status C; status B enables each of the three at the same place."""
ALARM_SECOND, ALARM_MINUTE, ALARM_HOUR = 1, 3, 5
ALARM_ANY = 0xC0
"""An alarm register with both top bits set matches everything."""
BASE_HZ = 32_768
DAY_SECONDS = 86_400
TIME_REGISTERS = (0, 2, 4, 6, 7, 8, 9, CENTURY)


class Rtc(Stateful):
    """Index, control registers and 128 bytes of memory.

    The clock is the virtual one and cannot be set: writes to the time registers are ignored.
    """

    index: int = 0
    status_a: int = 0x26
    status_b: int = B_24_HOURS
    status_c: int = 0
    seen: int = 0
    """The TSC up to which periods, alarms and updates have been noted in status C."""
    memory: StateDict[int, int] = new(StateDict)

    def now(self, tsc: int) -> datetime:
        """The time on the clock."""
        return EPOCH + timedelta(seconds=tsc // TSC_HZ)

    def _rate_hz(self) -> int:
        """Periodic interrupts a second; 0: none. Rates 1 and 2 are those of 8 and 9."""
        rate = self.status_a & 0xF
        return BASE_HZ >> (rate + 6 if rate < 3 else rate - 1) if rate else 0

    def tick(self, tsc: int) -> bool:
        """Note in status C what happened up to `tsc`; returns the level of the interrupt line.

        An alarm is looked for only while its interrupt is enabled.
        """
        before = self.seen
        if tsc == before:
            return bool(self.status_c & C_IRQ)
        self.seen = tsc
        rate_hz = self._rate_hz()
        if rate_hz and tsc * rate_hz // TSC_HZ > before * rate_hz // TSC_HZ:
            self.status_c |= C_PERIODIC
        first, last = before // TSC_HZ + 1, tsc // TSC_HZ
        if last >= first and not self.status_b & B_SET:
            self.status_c |= C_UPDATE
            if (
                self.status_b & C_ALARM
                and not self.status_c & C_ALARM
                and any(self._alarm_matches(second) for second in range(first, min(last, first + DAY_SECONDS) + 1))
            ):
                self.status_c |= C_ALARM
        if self.status_c & self.status_b & (C_PERIODIC | C_ALARM | C_UPDATE):
            self.status_c |= C_IRQ
        return bool(self.status_c & C_IRQ)

    def next_event(self, tsc: int) -> int | None:
        """The TSC at which status C changes next with its interrupt enabled."""
        times = []
        rate_hz = self._rate_hz()
        if self.status_b & C_PERIODIC and rate_hz:
            times.append(-(-(tsc * rate_hz // TSC_HZ + 1) * TSC_HZ // rate_hz))
        if self.status_b & (C_UPDATE | C_ALARM) and not self.status_b & B_SET:
            times.append((tsc // TSC_HZ + 1) * TSC_HZ)
        return min(times, default=None)

    def _alarm_matches(self, seconds: int) -> bool:
        now = EPOCH + timedelta(seconds=seconds)
        shown = (
            (ALARM_SECOND, self._coded(now.second)),
            (ALARM_MINUTE, self._coded(now.minute)),
            (ALARM_HOUR, self._hour(now.hour)),
        )
        alarms = ((self.memory.get(index, 0), value) for index, value in shown)
        return all(alarm & ALARM_ANY == ALARM_ANY or alarm == value for alarm, value in alarms)

    def write(self, port: int, value: int, tsc: int) -> None:
        """Write a byte to 70h or 71h."""
        value &= 0xFF
        self.tick(tsc)
        if port == RTC_PORT:
            self.index = value & 0x7F
        elif self.index == STATUS_A:
            self.status_a = value & 0x7F
        elif self.index == STATUS_B:
            self.status_b = value
        elif self.index not in (STATUS_C, STATUS_D, *TIME_REGISTERS):
            self.memory[self.index] = value

    def read(self, port: int, tsc: int) -> int:
        """Read a byte; the index port reads all ones. Status C is cleared by the read."""
        self.tick(tsc)
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
