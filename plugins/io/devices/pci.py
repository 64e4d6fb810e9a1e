"""PCI configuration space: mechanism 1 (CF8h/CFCh) and ECAM, with one host bridge and what plugins add.

Source: PCI Local Bus Specification 3.0, 3.2.2.3; PCI Express Base Specification, 7.2.2.
"""

from __future__ import annotations

from sevlab.core.state import StateDict, Stateful, new
from sevlab.plugins.io.devices.registers import Register, ones

ADDRESS_PORT, DATA_PORT = 0xCF8, 0xCFC
ECAM_GPA, ECAM_BYTES = 0xE000_0000, 1 << 28
ENABLE = 1 << 31
CONFIGURATION_BYTES = 256

REGISTERS = (
    Register(0xCF8, "address", 4, "rw", "31 enable, 23:16 bus, 15:11 device, 10:8 function, 7:2 register"),
    Register(0xCFC, "data", 4, "rw", "the addressed register; bytes by port"),
)

HOST_BRIDGE_BDF = 0
HOST_BRIDGE = (0x1237_8086).to_bytes(4, "little") + bytes(4) + (0x0600_0000).to_bytes(4, "little") + bytes(4)
"""Vendor, device and class of the bridge that PC firmware expects at 00:00.0 (the 440FX, as QEMU's pc machine)."""

WRITABLE = frozenset((0x04, 0x05, 0x3C))
"""Bytes of every header that software may write here: command and interrupt line."""


class Pci(Stateful):
    """The address register, and configuration space by (bus << 8 | device << 3 | function)."""

    address: int = 0
    functions: StateDict[int, bytes] = new(StateDict)

    def add(self, bdf: int, header: bytes) -> None:
        """Put a function on the bus; `header` is padded to 256 bytes."""
        self.functions[bdf] = header.ljust(CONFIGURATION_BYTES, b"\0")

    def _configuration(self, bdf: int, offset: int, width: int) -> int:
        space = self.functions.get(bdf)
        if space is None or offset + width > CONFIGURATION_BYTES:
            return ones(width)
        return int.from_bytes(space[offset : offset + width], "little")

    def _configure(self, bdf: int, offset: int, width: int, value: int) -> None:
        space = self.functions.get(bdf)
        if space is None or offset + width > CONFIGURATION_BYTES:
            return
        changed = bytearray(space)
        for index, byte in enumerate(value.to_bytes(width, "little")):
            if offset + index in WRITABLE:
                changed[offset + index] = byte
        self.functions[bdf] = bytes(changed)

    def read(self, port: int, width: int) -> int:
        """Read from CF8h to CFFh; only a 4-byte access reaches the address register."""
        if port < DATA_PORT:
            return self.address if port == ADDRESS_PORT and width == 4 else ones(width)
        if not self.address & ENABLE:
            return ones(width)
        return self._configuration(self.address >> 8 & 0xFFFF, self.address & 0xFC | port & 3, width)

    def write(self, port: int, width: int, value: int) -> None:
        """Write to CF8h to CFFh."""
        if port < DATA_PORT:
            if port == ADDRESS_PORT and width == 4:
                self.address = value & 0x80FF_FFFC
        elif self.address & ENABLE:
            self._configure(self.address >> 8 & 0xFFFF, self.address & 0xFC | port & 3, width, value)

    def read_ecam(self, offset: int, width: int) -> int:
        """Read from the memory-mapped window: 20:27 bus, 15:19 device, 12:14 function, 0:11 register."""
        return self._configuration(offset >> 12, offset & 0xFFF, width)

    def write_ecam(self, offset: int, width: int, value: int) -> None:
        """Write to the memory-mapped window."""
        self._configure(offset >> 12, offset & 0xFFF, width, value)
