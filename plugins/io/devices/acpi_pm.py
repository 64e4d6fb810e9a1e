"""ACPI power management: event and control registers, PM timer, power off.

Source: ACPI 6.4, 4.8.3; ports as QEMU's pc machine (PM base 600h).
"""

from __future__ import annotations

from sevlab.core.determinism import TSC_HZ
from sevlab.core.state import Stateful
from sevlab.plugins.io.devices.registers import Register

PM_PORT = 0x600
STATUS, ENABLE, CONTROL, TIMER = 0x0, 0x2, 0x4, 0x8
TIMER_HZ = 3_579_545
TIMER_BITS = 24
SCI_ENABLE, SLEEP_ENABLE = 1 << 0, 1 << 13
SLEEP_TYPE_S5 = 0
"""SLP_TYP that QEMU's tables announce for S5."""

REGISTERS = (
    Register(0x600, "PM1 status", 2, "rw", "write 1 to clear"),
    Register(0x602, "PM1 enable", 2, "rw", ""),
    Register(0x604, "PM1 control", 2, "rw", "0 SCI_EN, 12:10 SLP_TYP, 13 SLP_EN: sleep now"),
    Register(0x608, "PM timer", 4, "r", "24 bits at 3579545 Hz"),
)


class AcpiPm(Stateful):
    """The PM1 block; `power_off` is set when the guest asks for S5."""

    status: int = 0
    enable: int = 0
    control: int = SCI_ENABLE
    power_off: bool = False

    def timer(self, tsc: int) -> int:
        """The PM timer."""
        return tsc * TIMER_HZ // TSC_HZ & (1 << TIMER_BITS) - 1

    def read(self, offset: int, width: int, tsc: int) -> int:
        """Read `width` bytes at `offset` of the block."""
        words = {STATUS: self.status, ENABLE: self.enable, CONTROL: self.control}
        image = b"".join(words.get(at, 0).to_bytes(2, "little") for at in range(0, 8, 2))
        image += self.timer(tsc).to_bytes(4, "little") + bytes(4)
        return int.from_bytes(image[offset : offset + width], "little")

    def write(self, offset: int, width: int, value: int) -> None:
        """Write at `offset`; only whole 16-bit registers are written."""
        for at in range(0, width - 1, 2):
            self._write_register(offset + at, value >> at * 8 & 0xFFFF)

    def _write_register(self, offset: int, value: int) -> None:
        if offset == STATUS:
            self.status &= ~value
        elif offset == ENABLE:
            self.enable = value
        elif offset == CONTROL:
            self.control = value & ~SLEEP_ENABLE
            if value & SLEEP_ENABLE and value >> 10 & 7 == SLEEP_TYPE_S5:
                self.power_off = True
