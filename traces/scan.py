"""Find the intact frames of a damaged trace, and say exactly what is missing between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import msgpack
from sevlab.core.errors import TraceFormatError
from sevlab.traces import frames

WINDOW_BYTES = 1 << 20


class Block(NamedTuple):
    """Where a block is and which entries it holds."""

    offset: int
    number: int
    first_entry: int
    entries: int
    min_time: int
    max_time: int

    @property
    def end(self) -> int:
        """Number of the first entry after the block."""
        return self.first_entry + self.entries


class Loss(NamedTuple):
    """What a damaged place cost: bytes, blocks and entries, by their numbers.

    `blocks` and `entries` are None when nothing that is left says how many there were: the end of the file is gone,
    or the last head in it is broken. 0 entries: only a copy of the header, the index or the trailer is damaged.
    """

    offset: int
    length_bytes: int
    first_block: int
    blocks: int | None
    first_entry: int
    entries: int | None
    reason: str

    def __str__(self) -> str:
        where = f"bytes {self.offset:#x} to {self.offset + self.length_bytes:#x}"
        if self.entries == 0:
            return f"{where}: no entries lost; {self.reason}"
        blocks = f"from {self.first_block}" if self.blocks is None else _range(self.first_block, self.blocks)
        entries = f"from {self.first_entry}" if self.entries is None else _range(self.first_entry, self.entries)
        return f"{where}: blocks {blocks}, entries {entries} lost; {self.reason}"


def _range(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first} to {first + count - 1}"


class Index(NamedTuple):
    """What the index frame says."""

    entries: int
    blocks: tuple[Block, ...]
    kinds: dict[str, int]
    counts: dict[str, int]


class Scan(NamedTuple):
    """The result of a walk over the whole file; `summary` is the index that it met."""

    blocks: list[Block]
    losses: list[Loss]
    summary: Index | None


class Frame(NamedTuple):
    """An intact frame."""

    offset: int
    end: int
    head: frames.Head


def read_head(file: BinaryIO, offset: int) -> frames.Head | None:
    """The head at `offset`, None unless it is intact."""
    file.seek(offset)
    return frames.parse_head(file.read(frames.HEAD_BYTES))


def read_payload(file: BinaryIO, offset: int, head: frames.Head) -> bytes:
    """The payload of the frame at `offset`. Raises `TraceFormatError` when it is broken."""
    file.seek(offset + frames.HEAD_BYTES)
    return frames.open_payload(head, file.read(head.stored_bytes))


def walk(file: BinaryIO, start: int, end: int) -> Iterator[Frame | tuple[int, frames.Head, str]]:
    """All intact frames between two offsets in order, and for a frame whose payload is broken (offset, head, why)."""
    offset = start
    while offset < end:
        head = read_head(file, offset)
        if head is not None:
            try:
                read_payload(file, offset, head)
            except TraceFormatError as error:
                yield offset, head, str(error)
            else:
                frame = Frame(offset, offset + frames.HEAD_BYTES + head.stored_bytes, head)
                yield frame
                offset = frame.end
                continue
        offset = _next_marker(file, offset + 1, end)


def _next_marker(file: BinaryIO, start: int, end: int) -> int:
    overlap = len(frames.MARKER) - 1
    while start < end:
        file.seek(start)
        window = file.read(min(WINDOW_BYTES, end - start))
        found = window.find(frames.MARKER)
        if found >= 0:
            return start + found
        if len(window) <= overlap:
            break
        start += len(window) - overlap
    return end


def read_index(file: BinaryIO, frame: Frame) -> Index | None:
    """The index in an intact frame, None when it is not one."""
    try:
        document = msgpack.unpackb(read_payload(file, frame.offset, frame.head), use_list=False)
        blocks = tuple(
            Block(offset, number, first, entries, low, high)
            for number, (offset, first, entries, low, high) in enumerate(document["blocks"])
        )
        index = Index(document["entries"], blocks, dict(document["kinds"]), dict(document["counts"]))
    except (TraceFormatError, ValueError, TypeError, KeyError):
        return None
    expected = 0
    for block in blocks:
        if not all(type(value) is int and value >= 0 for value in block) or block.first_entry != expected:
            return None
        expected = block.end
    return index if expected == index.entries and _numbers(index.kinds) and _numbers(index.counts) else None


def _numbers(table: dict[Any, Any]) -> bool:
    return all(isinstance(name, str) and type(count) is int for name, count in table.items())


def index_at_end(file: BinaryIO, size: int, stream: int) -> Index | None:
    """The index that the trailer points to, None when either is missing or damaged."""
    if size < frames.TRAILER.size:
        return None
    file.seek(size - frames.TRAILER.size)
    offset, marker = frames.TRAILER.unpack(file.read(frames.TRAILER.size))
    if marker != frames.TRAILER_MARKER or offset >= size:
        return None
    head = read_head(file, offset)
    if head is None or head.kind != frames.INDEX or head.stream != stream:
        return None
    frame = Frame(offset, offset + frames.HEAD_BYTES + head.stored_bytes, head)
    return read_index(file, frame) if frame.end == size - frames.TRAILER.size else None


def scan(file: BinaryIO, size: int, stream: int) -> Scan:
    """Walk the whole file, believing nothing but checksums.

    What is missing follows from the numbers: a block says which one it is and which entry it begins with, the index
    how many there were.
    """
    result = Scan([], [], None)
    end, number, entry = 0, 0, 0  # accounted for: bytes, blocks, entries
    broken: list[tuple[int, frames.Head, str]] = []

    def account(offset: int, blocks: int | None, entries: int | None, otherwise: str = "no intact block there") -> None:
        if (offset, blocks, entries) == (end, number, entry):
            return
        reason = "; ".join(f"{why} (frame at {at:#x})" for at, _, why in broken)
        if not reason:
            reason = otherwise if offset > end else "bytes are missing there"
        lost_blocks = None if blocks is None else blocks - number
        lost_entries = None if entries is None else entries - entry
        result.losses.append(Loss(end, offset - end, number, lost_blocks, entry, lost_entries, reason))

    for found in walk(file, 0, size):
        if not isinstance(found, Frame):
            broken.append(found)
            continue
        offset, head = found.offset, found.head
        if head.stream != stream:
            continue
        if head.kind == frames.RECORDS and head.number >= number and head.first_entry >= entry:
            account(offset, head.number, head.first_entry)
            block = Block(offset, head.number, head.first_entry, head.entries, head.min_time, head.max_time)
            result.blocks.append(block)
            number, entry = block.number + 1, block.end
        elif head.kind == frames.HEADER and not number:
            account(offset, number, entry)
        elif head.kind == frames.INDEX and (index := read_index(file, found)) is not None:
            account(offset, len(index.blocks), index.entries)
            number, entry, end = len(index.blocks), index.entries, found.end
            broken.clear()
            file.seek(end)
            if file.read() == frames.TRAILER.pack(offset, frames.TRAILER_MARKER):
                end = size
            account(size, number, entry, "the trailer is damaged")
            return result._replace(summary=index)
        else:
            continue
        end = found.end
        broken.clear()
    if end < size:
        torn = next(
            (head for _, head, _ in reversed(broken) if head.kind == frames.RECORDS and head.stream == stream), None
        )
        if torn is None or torn.number < number:
            account(size, None, None)
        else:
            account(size, torn.number + 1, torn.first_entry + torn.entries)
    return result
