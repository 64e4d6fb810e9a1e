"""The certificate table of an extended guest request: GUIDs in network order, unlike those of firmware tables.

Source: 56421 (GHCB), extended guest request; Linux include/uapi/linux/sev-guest.h; google/go-sev-guest abi/abi.go.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import NamedTuple

from sevlab.core.errors import FormatError
from sevlab.core.layout import Layout, raw_bytes, u32
from sevlab.core.layout_tools import read_file_part
from sevlab.core.units import PAGE_BYTES

SOURCE = "56421, extended guest request"

GUIDS = {
    "vcek": "63da758d-e664-4564-adc5-f4b93be8accd",
    "vlek": "a8074bc2-a25a-483e-aae6-39c045a0b8a1",
    "ask": "4ab7b379-bbac-4fe4-a02f-05aef327c782",
    "ark": "c0b406a4-a803-4952-9743-3fb6014cd0ae",
    "crl": "92f81bc3-5811-4d3d-97ff-d19f88dc67ea",
}
"""What an entry holds, by the name of what it is; an ASVK stands in the place of the ASK."""

KINDS = {guid: kind for kind, guid in GUIDS.items()}


class CertTableRow(Layout, size=24):
    """One row; a row of zeros ends the table."""

    guid = raw_bytes(0x00, 16, doc="network order", source=SOURCE)
    offset = u32(0x10, unit="bytes", doc="from the table's start", source=SOURCE)
    length = u32(0x14, unit="bytes", source=SOURCE)


class CertTableEntry(NamedTuple):
    """One entry: `kind` by `GUIDS`, "" for another GUID; `offset` is that of its bytes in the table."""

    kind: str
    guid: str
    offset: int
    data: bytes


def parse_cert_table(data: bytes, name: str = "certificate table") -> list[CertTableEntry]:
    """The entries of a table in the order of its rows. Raises `FormatError`."""
    rows = []
    position = 0
    while True:
        row = read_file_part(CertTableRow, data, name, position)
        if not any(row.to_bytes()):
            break
        rows.append((position, row))
        position += CertTableRow.SIZE
    header_bytes = position + CertTableRow.SIZE
    entries = []
    seen = set()
    for where, row in rows:
        guid = str(uuid.UUID(bytes=row.guid))
        end = row.offset + row.length
        if guid in seen:
            raise FormatError(name, where, f"row {guid}", expected="once", found="a second time")
        if row.offset < header_bytes:
            expected = f"{header_bytes:#x} or more, after the rows"
            raise FormatError(name, where + 16, f"offset of {guid}", expected=expected, found=f"{row.offset:#x}")
        if end > len(data):
            expected = f"an end within {len(data):#x} bytes"
            raise FormatError(name, where + 20, f"length of {guid}", expected=expected, found=f"{end:#x}")
        seen.add(guid)
        entries.append(CertTableEntry(KINDS.get(guid, ""), guid, row.offset, data[row.offset : end]))
    return entries


def build_cert_table(entries: Iterable[tuple[str, bytes]]) -> bytes:
    """A table of (GUID, data), the data one after the other behind the rows."""
    items = list(entries)
    offset = (len(items) + 1) * CertTableRow.SIZE
    rows, body = b"", b""
    for guid, data in items:
        rows += CertTableRow.build(guid=uuid.UUID(guid).bytes, offset=offset + len(body), length=len(data))
        body += data
    return rows + bytes(CertTableRow.SIZE) + body


def page_count(table: bytes) -> int:
    """How many pages of the guest the table takes: what a request with too few is told."""
    return -(-len(table) // PAGE_BYTES)
