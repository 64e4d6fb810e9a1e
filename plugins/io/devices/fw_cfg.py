"""QEMU's firmware configuration device: selector, data, and DMA.

Source: QEMU docs/specs/fw_cfg.rst. In an encrypted guest descriptor and buffer must be shared: the device reads them
as the hypervisor does.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum, IntFlag

from sevlab.core.layout import Layout, u32, u64
from sevlab.core.state import StateDict, Stateful, new
from sevlab.plugins.io.devices.registers import Register

SELECTOR_PORT, DATA_PORT, DMA_PORT = 0x510, 0x511, 0x514
SIGNATURE = 0x51454D5520434647
"""What the DMA register reads, big-endian: "QEMU CFG"."""

REGISTERS = (
    Register(0x510, "selector", 2, "w", "which item; the position returns to its start"),
    Register(0x511, "data", 1, "r", "next byte of the item, zero past its end"),
    Register(0x514, "DMA address", 8, "rw", "big-endian; the write of the low half (518h) starts; reads QEMU CFG"),
)


class Key(IntEnum):
    """Well-known items."""

    SIGNATURE = 0x00
    ID = 0x01
    RAM_BYTES = 0x03
    CPU_COUNT = 0x05
    MAX_CPUS = 0x0F
    FILE_DIRECTORY = 0x19
    FIRST_FILE = 0x20


class DmaControl(IntFlag):
    """Bits of the descriptor's control word."""

    ERROR = 1
    READ = 2
    SKIP = 4
    SELECT = 8
    WRITE = 16


class DmaDescriptor(Layout, size=16):
    """The descriptor that the guest puts into memory; big-endian."""

    control = u32(0, big_endian=True, doc="31:16 key, 4:0 operations", source="QEMU docs/specs/fw_cfg.rst")
    length = u32(4, big_endian=True, unit="bytes", source="QEMU docs/specs/fw_cfg.rst")
    address = u64(8, big_endian=True, doc="GPA", source="QEMU docs/specs/fw_cfg.rst")


MAX_TRANSFER_BYTES = 1 << 20
"""Longest DMA transfer served; longer ones end in an error, so that no guest can make the host copy without end."""


class FwCfg(Stateful):
    """Items by key, the selected one, and the position in it."""

    items: StateDict[int, bytes] = new(StateDict)
    selected: int = 0
    position: int = 0
    dma_high: int = 0

    def install(self, *, ram_bytes: int, cpus: int) -> None:
        """The items that every guest finds."""
        self.items[Key.SIGNATURE] = b"QEMU"
        self.items[Key.ID] = (3).to_bytes(4, "little")
        self.items[Key.RAM_BYTES] = ram_bytes.to_bytes(8, "little")
        self.items[Key.CPU_COUNT] = self.items[Key.MAX_CPUS] = cpus.to_bytes(2, "little")
        self.items[Key.FILE_DIRECTORY] = bytes(4)

    def add_file(self, name: str, content: bytes) -> int:
        """Add a named file; returns its key."""
        files = int.from_bytes(self.items[Key.FILE_DIRECTORY][:4], "big")
        key = Key.FIRST_FILE + files
        entry = len(content).to_bytes(4, "big") + key.to_bytes(2, "big") + bytes(2) + name.encode().ljust(56, b"\0")
        self.items[Key.FILE_DIRECTORY] = (files + 1).to_bytes(4, "big") + self.items[Key.FILE_DIRECTORY][4:] + entry
        self.items[key] = content
        return key

    def select(self, key: int) -> None:
        """Choose an item and return to its start."""
        self.selected = key & 0xFFFF
        self.position = 0

    def take(self, length: int) -> bytes:
        """The next bytes of the selected item, zeros past its end."""
        item = self.items.get(self.selected, b"")
        piece = item[self.position : self.position + length]
        self.position += length
        return piece.ljust(length, b"\0")

    def read(self, port: int, width: int) -> int:
        """Read from 510h to 51Bh; data is byte-wide, whatever the access."""
        if port == DATA_PORT:
            return self.take(1)[0]
        if DMA_PORT <= port < DMA_PORT + 8:
            data = SIGNATURE.to_bytes(8, "big")[port - DMA_PORT :][:width]
            return int.from_bytes(data, "little")
        return 0

    def write(self, port: int, width: int, value: int, dma: Callable[[int], None]) -> None:
        """Write to 510h to 51Bh; `dma(gpa)` runs the descriptor at `gpa`."""
        if port == SELECTOR_PORT:
            if width == 2:  # a byte there is a write to the data register, which takes none
                self.select(value)
        elif width == 4 and port in (DMA_PORT, DMA_PORT + 4):
            half = int.from_bytes(value.to_bytes(4, "little"), "big")
            if port == DMA_PORT:
                self.dma_high = half
            else:
                gpa, self.dma_high = self.dma_high << 32 | half, 0
                dma(gpa)

    def transfer(self, descriptor: DmaDescriptor, write: Callable[[int, bytes], bool]) -> int:
        """Carry out a descriptor; returns the control word to store: 0 done, 1 error.

        `write(gpa, data)` is False where the guest has no memory. Items cannot be written.
        """
        if descriptor.control & DmaControl.SELECT:
            self.select(descriptor.control >> 16)
        if descriptor.length > MAX_TRANSFER_BYTES:
            return int(DmaControl.ERROR)
        if descriptor.control & DmaControl.READ:
            return 0 if write(descriptor.address, self.take(descriptor.length)) else int(DmaControl.ERROR)
        if descriptor.control & DmaControl.WRITE:
            return int(DmaControl.ERROR)
        if descriptor.control & DmaControl.SKIP:
            self.position += descriptor.length
        return 0
