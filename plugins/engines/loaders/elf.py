"""ELF executables for x86-64: their loadable segments by physical address."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from sevlab.core.errors import FormatError

HEADER = Struct("<16sHHIQQQIHHHHHH")
PROGRAM = Struct("<IIQQQQQQ")
MAGIC = b"\x7fELF"
CLASS_64, LITTLE, X86_64, PT_LOAD = 2, 1, 62, 1


class Segment(NamedTuple):
    """A loadable segment: where it goes, its bytes, how much memory it takes."""

    physical: int
    virtual: int
    data: bytes
    memory_bytes: int


class Elf(NamedTuple):
    """What a loader needs of an ELF file; `entry` as the file gives it."""

    entry: int
    segments: tuple[Segment, ...]

    @property
    def entry_physical(self) -> int:
        """The entry point as a physical address: an entry inside a segment's virtual range is moved with it."""
        for segment in self.segments:
            if segment.virtual <= self.entry < segment.virtual + segment.memory_bytes:
                return self.entry - segment.virtual + segment.physical
        return self.entry


def parse_elf(data: bytes, name: str) -> Elf:
    """Raises `FormatError` for what is no x86-64 executable."""
    if len(data) < HEADER.size:
        raise FormatError(name, 0, "ELF header", expected=f"{HEADER.size} bytes", found=f"{len(data)}")
    ident, _, machine, _, entry, offset, _, _, _, size, count, *_ = HEADER.unpack_from(data)
    if ident[:4] != MAGIC:
        raise FormatError(name, 0, "magic", expected="7f454c46 (ELF)", found=ident[:4].hex())
    if ident[4] != CLASS_64 or ident[5] != LITTLE:
        raise FormatError(name, 4, "class", expected="64-bit, little-endian", found=f"{ident[4]}, {ident[5]}")
    if machine != X86_64:
        raise FormatError(name, 18, "machine", expected="62 (x86-64)", found=str(machine))
    if count and size != PROGRAM.size:
        raise FormatError(name, 54, "program header size", expected=str(PROGRAM.size), found=str(size))
    segments = []
    for number in range(count):
        at = offset + number * PROGRAM.size
        if at + PROGRAM.size > len(data):
            raise FormatError(name, at, "program header", expected="inside the file", found=f"file of {len(data)}")
        kind, _, start, virtual, physical, in_file, in_memory, _ = PROGRAM.unpack_from(data, at)
        if kind != PT_LOAD or not in_memory:
            continue
        if start + in_file > len(data) or in_file > in_memory:
            raise FormatError(name, at, "segment", expected="inside the file", found=f"{start:#x}+{in_file:#x}")
        segments.append(Segment(physical, virtual, data[start : start + in_file], in_memory))
    if not segments:
        raise FormatError(name, offset, "program headers", expected="a loadable segment", found="none")
    return Elf(entry, tuple(segments))
