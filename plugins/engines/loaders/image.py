"""A guest before its launch: pages by guest-physical address, and the registers it starts with.

A guest starts in 64-bit mode with memory mapped one to one, as the 64-bit boot protocol of Linux asks for. Encrypted
guests start there too, without firmware: the tables carry the C-bit, and the save area that is measured says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sevlab.core.cpu import Registers, SystemRegisters
from sevlab.core.errors import ConfigError
from sevlab.core.units import PAGE_BYTES

TABLES_GPA, GDT_GPA, STACK_GPA = 0x8_0000, 0x8_8000, 0x8_F000
"""Page tables (a PML4, a PDPT, four PDs), the GDT, and the top of the first stack."""
GDT = (0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x0080_8B00_0000_0000)
"""Null, unused, __BOOT_CS (10h), __BOOT_DS (18h). Source: Linux arch/x86/include/asm/boot.h and boot.rst."""
CODE: tuple[int, int, int, int] = (0x10, 0xA9B, 0xFFFF_FFFF, 0)
DATA: tuple[int, int, int, int] = (0x18, 0xC93, 0xFFFF_FFFF, 0)
TASK: tuple[int, int, int, int] = (0x20, 0x8B, 0xFFFF, 0)
PRESENT_WRITABLE, LARGE = 3, 1 << 7
ACCESSED, DIRTY = 1 << 5, 1 << 6
CR0_START, CR4_START, EFER_START = 0x8005_0033, 0x620, 0x1501
"""PG WP NE ET MP PE AM; OSFXSR OSXMMEXCPT PAE; SVME LMA LME SCE."""


@dataclass(slots=True)
class GuestImage:
    """What a loader makes; `loads` maps page-aligned GPAs to bytes, `kind` says what the file was."""

    kind: str
    entry: int
    loads: dict[int, bytes] = field(default_factory=dict)
    rsi: int = 0

    def add(self, gpa: int, data: bytes, what: str, memory_bytes: int) -> None:
        """Put `data` at `gpa`, filled up to whole pages. Raises `ConfigError` outside memory or over another part."""
        if gpa % PAGE_BYTES:
            data = bytes(gpa % PAGE_BYTES) + data
            gpa -= gpa % PAGE_BYTES
        data += bytes(-len(data) % PAGE_BYTES)
        if gpa + len(data) > memory_bytes:
            raise ConfigError(
                f"{what} needs memory up to {gpa + len(data):#x}, and the guest has {memory_bytes:#x}: raise --memory"
            )
        for other, loaded in self.loads.items():
            if gpa < other + len(loaded) and other < gpa + len(data):
                raise ConfigError(f"{what} at {gpa:#x} lies over what is loaded at {other:#x}")
        if data:
            self.loads[gpa] = data

    def finish(self, c_bit_mask: int, memory_bytes: int) -> None:
        """Add page tables with the C-bit and the GDT."""
        entry = PRESENT_WRITABLE | ACCESSED | c_bit_mask
        words = [0] * 512 * 6
        words[0] = TABLES_GPA + 0x1000 | entry
        for number in range(4):
            words[512 + number] = TABLES_GPA + 0x2000 + number * 0x1000 | entry
        for number in range(2048):
            words[1024 + number] = number << 21 | LARGE | DIRTY | entry
        tables = b"".join(word.to_bytes(8, "little") for word in words)
        self.add(TABLES_GPA, tables, "the first page tables", memory_bytes)
        self.add(GDT_GPA, b"".join(word.to_bytes(8, "little") for word in GDT), "the first GDT", memory_bytes)

    def start(self, regs: Registers, system: SystemRegisters, c_bit_mask: int) -> None:
        """The registers of the first instruction. Source: Linux Documentation/arch/x86/boot.rst, 64-bit protocol."""
        regs.rip, regs.rsi, regs.rsp, regs.rflags = self.entry, self.rsi, STACK_GPA, 2
        system.cs = CODE
        system.ss = system.ds = system.es = system.fs = system.gs = DATA
        system.tr, system.ldtr = TASK, (0, 0x82, 0, 0)
        system.gdtr, system.idtr = (0, 0, len(GDT) * 8 - 1, GDT_GPA), (0, 0, 0, 0)
        system.cr0, system.cr3, system.cr4, system.efer = CR0_START, TABLES_GPA | c_bit_mask, CR4_START, EFER_START
        system.cpl = 0
