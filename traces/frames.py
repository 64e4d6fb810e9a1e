"""The frames that a `.sevtrace` file is a sequence of: what a reader can find again in a damaged file.

A frame is a fixed head and a zstd-compressed payload. The head starts with a marker that no reader mistakes for text,
says which records the payload holds, and carries two checksums: of the payload, and of itself. So a reader that lost
its place looks for the next marker, and a head that is intact says exactly which records a broken payload held.

All numbers are little-endian. A frame is written with one `write`, so a killed writer leaves at most one torn frame,
at the end.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import zstandard
from sevlab.core.errors import TraceFormatError

MARKER = b"\x89sevtrc\n"
"""First bytes of every frame, and so of the file."""

HEADER, RECORDS, INDEX = b"H", b"R", b"I"
"""What a payload is: the header (twice, at the start), entries, the index."""


class HeadField(NamedTuple):
    """One field of a frame's head: its name, its `struct` code, what it means."""

    name: str
    code: str
    meaning: str


HEAD_FIELDS = (
    HeadField("marker", "8s", "`89 73 65 76 74 72 63 0a`"),
    HeadField("kind", "c", "`H` header, `R` records (a block), `I` index"),
    HeadField("version", "B", "1"),
    HeadField("reserved", "H", "0"),
    HeadField(
        "stream", "I", "CRC-32 of the header's payload as stored: frames of another file are no part of this one"
    ),
    HeadField("number", "Q", "of the block, from 0; of an index: how many blocks there are"),
    HeadField("first_entry", "Q", "number of the first entry in the block; of an index: how many entries there are"),
    HeadField("entries", "I", "entries in the block"),
    HeadField("raw_bytes", "I", "length of the payload before compression, at most 16 MiB"),
    HeadField("stored_bytes", "I", "length of the payload as stored, which follows the head"),
    HeadField("min_time", "Q", "earliest time of an entry in the block, ns"),
    HeadField("max_time", "Q", "latest time of an entry in the block, ns"),
    HeadField("payload_crc", "I", "CRC-32 of the payload as stored"),
)
"""All but the last four bytes, which are the CRC-32 of these. Little-endian, without padding."""

HEAD = struct.Struct("<" + "".join(field.code for field in HEAD_FIELDS))
HEAD_CRC = struct.Struct("<I")
HEAD_BYTES = HEAD.size + HEAD_CRC.size

MAX_RAW_BYTES = 16 << 20
"""Longest payload before compression: bounds what a reader allocates for any file."""

MAX_STORED_BYTES = MAX_RAW_BYTES + (1 << 20)

TRAILER = struct.Struct("<Q 8s")
TRAILER_MARKER = b"sevtrc\n\x89"
"""The last bytes of a closed file, after the offset of the index frame."""


class Head(NamedTuple):
    """The head of a frame.

    `stream`: CRC-32 of the file's header payload, so that frames of another file are no part of this one; `number`:
    of the block, from 0; `first_entry`, `entries`: which entries it holds; `min_time`,
    `max_time`: over them, in ns. An index has the numbers of the block and of the entry that would come next.
    """

    kind: bytes
    stream: int
    number: int
    first_entry: int
    entries: int
    raw_bytes: int
    stored_bytes: int
    min_time: int
    max_time: int
    payload_crc: int


def pack_frame(
    kind: bytes,
    payload: bytes,
    *,
    stream: int | None = None,
    number: int = 0,
    first_entry: int = 0,
    entries: int = 0,
    times: tuple[int, int] = (0, 0),
    compressor: zstandard.ZstdCompressor,
) -> bytes:
    """A whole frame. `stream` None: the frame is the header, which defines it."""
    if len(payload) > MAX_RAW_BYTES:
        raise TraceFormatError(f"a block of {len(payload)} bytes: expected at most {MAX_RAW_BYTES}")
    stored = compressor.compress(payload)
    crc = zlib.crc32(stored)
    head = HEAD.pack(
        MARKER, kind, 1, 0, crc if stream is None else stream, number, first_entry, entries,
        len(payload), len(stored), *times, crc,
    )  # fmt: skip
    return head + HEAD_CRC.pack(zlib.crc32(head)) + stored


def parse_head(data: bytes) -> Head | None:
    """The head at the start of `data`, None unless it is intact and possible."""
    if len(data) < HEAD_BYTES or not data.startswith(MARKER):
        return None
    if zlib.crc32(data[: HEAD.size]) != HEAD_CRC.unpack_from(data, HEAD.size)[0]:
        return None
    _, kind, version, zero, *rest = HEAD.unpack_from(data)
    head = Head(kind, *rest)
    if version != 1 or zero or head.raw_bytes > MAX_RAW_BYTES or head.stored_bytes > MAX_STORED_BYTES:
        return None
    return head


def open_payload(head: Head, stored: bytes) -> bytes:
    """The payload of an intact frame. Raises `TraceFormatError` that says what is wrong."""
    if len(stored) != head.stored_bytes:
        raise TraceFormatError(f"the file ends {head.stored_bytes - len(stored)} bytes before the block does")
    if zlib.crc32(stored) != head.payload_crc:
        raise TraceFormatError("the checksum does not match")
    try:
        parameters = zstandard.get_frame_parameters(stored)
        if parameters.content_size != head.raw_bytes:  # before anything is allocated for it
            raise TraceFormatError(f"{parameters.content_size} bytes where the head says {head.raw_bytes}")
        return zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise TraceFormatError(f"not decompressible: {error}") from error


def markdown_table() -> str:
    """The head of a frame for the documentation."""
    lines = ["| Offset | Bytes | Field | Meaning |", "| --- | --- | --- | --- |"]
    offset = 0
    for field in (*HEAD_FIELDS, HeadField("head_crc", "I", "CRC-32 of the bytes before it")):
        size = struct.calcsize("<" + field.code)
        lines.append(f"| {offset:#04x} | {size} | `{field.name}` | {field.meaning} |")
        offset += size
    return "\n".join(lines)
