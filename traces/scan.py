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
    expected, behind = 0, -1
    for block in blocks:
        if not all(type(value) is int and value >= 0 for value in block) or block.first_entry != expected:
            return None
        if block.offset <= behind:  # a writer only appends
            return None
        expected, behind = block.end, block.offset
    return index if expected == index.entries and _numbers(index.kinds) and _numbers(index.counts) else None


def _numbers(table: dict[Any, Any]) -> bool:
    return all(isinstance(name, str) and type(count) is int for name, count in table.items())


def trailer_offset(file: BinaryIO, size: int) -> int | None:
    """The offset of the index as the trailer gives it, None when there is no trailer."""
    if size < frames.TRAILER.size:
        return None
    file.seek(size - frames.TRAILER.size)
    offset, marker = frames.TRAILER.unpack(file.read(frames.TRAILER.size))
    return offset if marker == frames.TRAILER_MARKER and offset < size else None


def index_at_end(file: BinaryIO, size: int, stream: int) -> Index | None:
    """The index that the trailer points to, None when either is missing or damaged."""
    offset = trailer_offset(file, size)
    if offset is None:
        return None
    head = read_head(file, offset)
    if head is None or head.kind != frames.INDEX or head.stream != stream:
        return None
    frame = Frame(offset, offset + frames.HEAD_BYTES + head.stored_bytes, head)
    return read_index(file, frame) if frame.end == size - frames.TRAILER.size else None


class Scanner:
    """A walk over the whole file that believes nothing but checksums.

    What is missing follows from the numbers: a block says which one it is and which entry it begins with, the index
    how many there were. Where the index at the end of the file (`closing`) is intact, a copy of a block elsewhere is
    taken only when the block at its own place is broken. `blocks`, `losses` and `index` are the result.
    """

    def __init__(self, file: BinaryIO, size: int, stream: int, closing: Index | None = None) -> None:
        self.blocks: list[Block] = []
        self.losses: list[Loss] = []
        self.index: Index | None = None
        self._file = file
        self._size = size
        self._stream = stream
        self._closing = closing
        self._reach: list[int] | None = None
        self._end = self._number = self._entry = 0  # accounted for: bytes, blocks, entries
        self._broken: list[tuple[int, frames.Head, str]] = []
        for found in walk(file, 0, size):
            if not isinstance(found, Frame):
                self._broken.append(found)
            elif found.head.stream == stream and self._take(found):
                self._end = found.end
                self._broken.clear()
        self._finish()

    def _take(self, frame: Frame) -> bool:
        """Account for an intact frame; False when it is not in its place, and so part of what is lost."""
        offset, head = frame.offset, frame.head
        if self.index is not None or self._is_stray(frame):
            return False
        if head.kind == frames.RECORDS and head.number >= self._number and head.first_entry >= self._entry:
            self._account(offset, head.number, head.first_entry)
            block = Block(offset, head.number, head.first_entry, head.entries, head.min_time, head.max_time)
            self.blocks.append(block)
            self._number, self._entry = block.number + 1, block.end
            return True
        if head.kind == frames.HEADER and not self._number:
            self._account(offset, 0, 0)
            return True
        if head.kind == frames.INDEX and head.number >= self._number and head.first_entry >= self._entry:
            self.index = read_index(self._file, frame)
            self._account(offset, head.number, head.first_entry)
            self._number, self._entry = head.number, head.first_entry
            return self.index is not None
        return False

    def _is_stray(self, frame: Frame) -> bool:
        """Whether the closing index says that this frame is a copy: to take it would cost a block in its own place."""
        closing, head = self._closing, frame.head
        if closing is None or head.kind == frames.HEADER:
            return False
        if head.kind == frames.INDEX:
            return frame.end + frames.TRAILER.size != self._size
        if head.number >= len(closing.blocks):
            return True
        if closing.blocks[head.number].offset == frame.offset:
            return False
        if self._reach is None:
            self._reach = self._own_places(closing)
        return frame.offset < self._reach[head.number] or self._reach[head.number + 1] != self._reach[head.number]

    def _own_places(self, closing: Index) -> list[int]:
        """At n: the end of the last intact block, in its own place, of those before number n."""
        reach = [0]
        for own in closing.blocks:
            head = read_head(self._file, own.offset)
            intact = head is not None and (self._stream, *own[1:4]) == (
                head.stream, head.number, head.first_entry, head.entries,
            )  # fmt: skip
            end = own.offset
            try:
                if intact and head is not None:
                    read_payload(self._file, own.offset, head)
                    end += frames.HEAD_BYTES + head.stored_bytes
            except TraceFormatError:
                intact = False
            reach.append(max(reach[-1], end) if intact else reach[-1])
        return reach

    def _finish(self) -> None:
        """Account for what follows the last intact frame."""
        trailer = trailer_offset(self._file, self._size)
        if self.index is not None:
            if trailer is not None and self._end + frames.TRAILER.size == self._size:
                self._end = self._size
            self._account(self._size, self._number, self._entry, "the trailer is damaged")
            return
        for _, head, _ in reversed(self._broken):  # its head is intact: it says its numbers or, an index, the totals
            if head.stream == self._stream and head.kind != frames.HEADER and head.number >= self._number:
                after = head.kind == frames.RECORDS
                self._account(self._size, head.number + after, head.first_entry + head.entries)
                return
        if self._end in {trailer, self._size}:  # nothing but the index stood there
            self._account(self._size, self._number, self._entry, "the index is damaged")
        else:
            self._account(self._size, None, None)

    def _account(self, offset: int, number: int | None, entry: int | None, what: str = "no intact block there") -> None:
        """At `offset`, block `number` and entry `entry` come next (None: unknown): note what is missing before."""
        if (offset, number, entry) == (self._end, self._number, self._entry):
            return
        blocks = None if number is None else number - self._number
        entries = None if entry is None else entry - self._entry
        reason = "; ".join(f"{why} (frame at {at:#x})" for at, _, why in self._broken)
        if not reason:
            reason = what if offset > self._end else "bytes are missing there"
        self.losses.append(Loss(self._end, offset - self._end, self._number, blocks, self._entry, entries, reason))
