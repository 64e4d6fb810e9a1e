"""Firmware images: the GUID table at the end of an OVMF or SVSM image, and the SEV metadata that it points to.

The table grows down from 32 bytes before the image's end: each entry is data, length (u16, of the whole entry), GUID,
and the first one from above is the footer, whose length is that of the table. GUIDs have the mixed byte order.
Source: edk2 OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm and OvmfPkg/ResetVector/X64/OvmfSevMetadata.asm; QEMU
hw/i386/pc_sysfw_ovmf.c; coconut-svsm qemu target/i386/sev.c (SVSM_INFO).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from sevlab.core.errors import FormatError
from sevlab.core.layout import Layout, raw_bytes, u32
from sevlab.core.layout_tools import read_file_part
from sevlab.core.units import PAGE_BYTES

FOUR_GIB = 1 << 32
TABLE_END_BYTES = 32
"""What follows the table: the reset vector."""

ENTRY_TAIL_BYTES = 18
"""Length and GUID of an entry."""

FOOTER = "96b582de-1fb2-45f7-baea-a366c55a082d"
SEV_HASH_TABLE = "7255371f-3a3b-4b04-927b-1da6efa8d454"
SEV_ES_RESET_BLOCK = "00f771de-1a7e-4fcb-890e-68c77e2fb44e"
SEV_METADATA = "dc886566-984a-4798-a75e-5585a7bf67cc"
SVSM_INFO = "a789a612-0597-4c4b-a49f-cbb1fe9d1ddd"

EDK2_METADATA = "edk2 OvmfPkg/ResetVector/X64/OvmfSevMetadata.asm"


class SectionType(IntEnum):
    """What a range of the metadata is launched as. Source: edk2 OvmfSevMetadata.asm; QEMU target/i386/sev.h."""

    SEC_MEM = 1
    SECRETS = 2
    CPUID = 3
    SVSM_CAA = 4
    KERNEL_HASHES = 0x10


class MetadataHeader(Layout, size=16):
    """Head of the SEV metadata."""

    signature = raw_bytes(0x0, 4, doc="ASEV", source=EDK2_METADATA)
    length = u32(0x4, unit="bytes", doc="with this head", source=EDK2_METADATA)
    metadata_version = u32(0x8, values=(1,), source=EDK2_METADATA)
    sections = u32(0xC, doc="how many follow", source=EDK2_METADATA)


class MetadataSection(Layout, size=12):
    """One range of guest memory."""

    gpa = u32(0x0, aligned=PAGE_BYTES, source=EDK2_METADATA)
    length = u32(0x4, unit="bytes", source=EDK2_METADATA)
    section_type = u32(0x8, doc="see SectionType", source=EDK2_METADATA)


class Section(NamedTuple):
    """A range of the metadata; `offset` is where the image says so."""

    gpa: int
    length_bytes: int
    section_type: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Firmware:
    """An image: its bytes, where they start in the guest, its table by GUID, and its metadata."""

    name: str
    data: bytes
    start_gpa: int
    table: dict[str, bytes]
    sections: tuple[Section, ...]

    def entry(self, guid: str, what: str) -> int:
        """The number at the start of the table's entry `guid`. Raises `FormatError` if there is none."""
        data = self.table.get(guid, b"")
        if len(data) < 4:
            found = "no such entry" if guid not in self.table else f"{len(data)} bytes"
            offset = max(len(self.data) - TABLE_END_BYTES, 0)
            raise FormatError(
                self.name, offset, f"table entry {guid}", expected=f"a 4-byte number, {what}", found=found
            )
        return int.from_bytes(data[:4], "little")

    @property
    def reset_eip(self) -> int:
        """Where application processors start under SEV-ES. Raises `FormatError`."""
        return self.entry(SEV_ES_RESET_BLOCK, "the SEV-ES reset address")

    @property
    def svsm_eip(self) -> int:
        """Where the processors of an SVSM start. Raises `FormatError`."""
        return self.start_gpa + self.entry(SVSM_INFO, "the SVSM's entry point")

    @property
    def hash_table_gpa(self) -> int:
        """Where the firmware expects the table of kernel hashes. Raises `FormatError` if it expects none."""
        gpa = self.entry(SEV_HASH_TABLE, "the address of the kernel hashes")
        if gpa == 0:
            offset = len(self.data) - TABLE_END_BYTES
            raise FormatError(
                self.name, offset, f"table entry {SEV_HASH_TABLE}", expected="an address", found="0: not supported"
            )
        return gpa

    def has_section(self, section_type: SectionType) -> bool:
        """Whether the metadata has a range of that type."""
        return any(section.section_type == section_type for section in self.sections)


def parse_firmware(data: bytes, name: str = "firmware", *, end_gpa: int = FOUR_GIB) -> Firmware:
    """The image in file `name`, which the guest sees up to `end_gpa`.

    An image without the table's footer has an empty table. Raises `FormatError`.
    """
    table = dict(_table(data, name))
    sections = tuple(_sections(data, name, table))
    return Firmware(name, data, end_gpa - len(data), table, sections)


def guid_of(data: bytes) -> str:
    """The text of a GUID in the mixed byte order of firmware tables."""
    return str(uuid.UUID(bytes_le=data))


def _table(data: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    end = len(data) - TABLE_END_BYTES
    if end < ENTRY_TAIL_BYTES or guid_of(data[end - 16 : end]) != FOOTER:
        return
    length_offset = end - ENTRY_TAIL_BYTES
    table_bytes = int.from_bytes(data[length_offset : end - 16], "little")
    if not ENTRY_TAIL_BYTES <= table_bytes <= end:
        expected = f"{ENTRY_TAIL_BYTES:#x} to {end:#x} bytes"
        raise FormatError(name, length_offset, "length of the GUID table", expected=expected, found=f"{table_bytes:#x}")
    lowest, position = end - table_bytes, length_offset
    seen = set()
    while position - lowest >= ENTRY_TAIL_BYTES:
        guid = guid_of(data[position - 16 : position])
        length = int.from_bytes(data[position - ENTRY_TAIL_BYTES : position - 16], "little")
        where = position - ENTRY_TAIL_BYTES
        if not ENTRY_TAIL_BYTES <= length <= position - lowest:
            expected = f"{ENTRY_TAIL_BYTES:#x} to {position - lowest:#x} bytes"
            raise FormatError(name, where, f"length of table entry {guid}", expected=expected, found=f"{length:#x}")
        if guid in seen:
            raise FormatError(name, where, f"table entry {guid}", expected="once", found="a second time")
        seen.add(guid)
        yield guid, data[position - length : where]
        position -= length


def _sections(data: bytes, name: str, table: dict[str, bytes]) -> Iterator[Section]:
    entry = table.get(SEV_METADATA)
    if entry is None:
        return
    if len(entry) < 4:
        where = len(data) - TABLE_END_BYTES
        raise FormatError(name, where, f"table entry {SEV_METADATA}", expected="4 bytes", found=f"{len(entry)}")
    from_end = int.from_bytes(entry[:4], "little")
    start = len(data) - from_end
    if start < 0:
        where = len(data) - TABLE_END_BYTES
        found = f"{from_end:#x} before the end of {len(data):#x} bytes"
        raise FormatError(name, where, "offset of the SEV metadata", expected="a place in the image", found=found)
    header = read_file_part(MetadataHeader, data, name, start)
    if header.signature != b"ASEV":
        raise FormatError(name, start, "MetadataHeader.signature", expected="b'ASEV'", found=repr(header.signature))
    needed = MetadataHeader.SIZE + header.sections * MetadataSection.SIZE
    if header.length < needed:
        expected = f"at least {needed:#x} for {header.sections} sections"
        raise FormatError(name, start + 4, "MetadataHeader.length", expected=expected, found=f"{header.length:#x}")
    for number in range(header.sections):
        offset = start + MetadataHeader.SIZE + number * MetadataSection.SIZE
        section = read_file_part(MetadataSection, data, name, offset)
        yield Section(section.gpa, section.length, section.section_type, offset)
