"""Read a `.sevtrace` file, whatever happened to it: every intact block, and an exact account of what is gone.

A closed file says in its index where its blocks are. Without an index, or when a block is not where the index says,
the reader walks the whole file (`traces.scan`). Either way a block is believed only with its checksum.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from sevlab.core.errors import TraceFormatError
from sevlab.core.vocabulary import Vocabulary
from sevlab.traces import frames
from sevlab.traces.codec import Codec
from sevlab.traces.scan import Block, Frame, Index, Loss, Scanner, index_at_end, read_head, read_payload, walk
from sevlab.traces.schema import Entry, Header, unpack_header, vocabulary_of, with_trace_records

MAX_HEADER_BYTES = 1 << 20


class TraceReader:
    """The entries of a trace, in the order in which they were appended.

    `source` is a path or a seekable binary file; `vocabulary` defaults to that of the header's plugins, as far as they
    are installed. `header` is what the trace says of itself, `index` what it says at its end (None: it was not closed,
    or its end is gone), `vocabulary` its record kinds, `foreign` those that are declared otherwise here, with the
    reason, and `losses` the damage met so far. Raises `TraceFormatError` only when the file holds no header at all.
    """

    def __init__(self, source: str | Path | BinaryIO, *, vocabulary: Vocabulary | None = None) -> None:
        self.name = str(source) if isinstance(source, (str, Path)) else getattr(source, "name", "trace")
        self._owned = isinstance(source, (str, Path))
        self._file: BinaryIO = _open(Path(source)) if isinstance(source, (str, Path)) else source
        self._size = self._file.seek(0, os.SEEK_END)
        try:
            frame = self._find_header()
            self.header: Header = unpack_header(read_payload(self._file, frame.offset, frame.head))
        except TraceFormatError:
            self.close()
            raise
        self._stream = frame.head.stream
        if vocabulary is None:
            vocabulary = _installed_vocabulary(self.header)
        self._codec = Codec(self.header.kinds, with_trace_records(vocabulary))
        self.vocabulary = self._codec.vocabulary
        self.foreign: Mapping[str, str] = self._codec.foreign
        self.losses: list[Loss] = []
        self._closing = index_at_end(self._file, self._size, self._stream) if not frame.offset else None
        self.index: Index | None = self._closing
        self._scanned = False
        self._blocks: list[Block] = []
        self._cached: tuple[int, list[Entry]] = (-1, [])
        if self.index is not None:
            self._blocks = list(self.index.blocks)
        else:
            self._scan()

    def _find_header(self) -> Frame:
        for found in walk(self._file, 0, min(self._size, 2 * (MAX_HEADER_BYTES + frames.HEAD_BYTES))):
            if isinstance(found, Frame) and found.head.kind == frames.HEADER:
                return found
        self._file.seek(0)
        start = self._file.read(8)
        raise TraceFormatError(
            f"{self.name}: no .sevtrace header; it starts with {start!r}, expected {frames.MARKER!r}"
            if start != frames.MARKER
            else f"{self.name}: both copies of the header are damaged or cut off ({self._size} bytes)"
        )

    def _scan(self) -> None:
        found = Scanner(self._file, self._size, self._stream, self._closing)
        self._scanned = True
        self._blocks, self.losses, self.index = found.blocks, found.losses, found.index

    # Entries ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many entries the intact blocks hold."""
        return sum(block.entries for block in self._blocks)

    def __iter__(self) -> Iterator[Entry]:
        return self.entries()

    def entries(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """The entries numbered `start` to `stop` - 1 that are left; what is lost is skipped and listed in `losses`."""
        for _, entry in self.numbered(start, stop):
            yield entry

    def numbered(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Entry]]:
        """As `entries`, each with its number."""
        while True:
            block = self._block_at(start)
            if block is None or (stop is not None and block.first_entry >= stop):
                return
            entries = self._load(block)
            if entries is None:
                continue
            skip = max(0, start - block.first_entry)
            end = None if stop is None else max(skip, stop - block.first_entry)
            whole = not skip and end is None
            yield from enumerate(entries if whole else entries[skip:end], block.first_entry + skip)
            start = block.end

    def __getitem__(self, number: int) -> Entry:
        """Entry `number`. Raises `IndexError` past the end, `TraceFormatError` for an entry that is lost."""
        for found, entry in self.numbered(number, number + 1):
            if found == number:
                return entry
        if not self._scanned and number >= len(self):
            raise IndexError(number)
        for loss in self.losses:
            if loss.first_entry <= number and (loss.entries is None or number < loss.first_entry + loss.entries):
                raise TraceFormatError(f"{self.name}: entry {number} is lost: {loss}")
        raise IndexError(number)

    def at_time(self, time_ns: int) -> int:
        """Number of the first entry at or after `time_ns`; the number after the last one when there is none."""
        while True:
            latest = list(accumulate((block.max_time for block in self._blocks), max))
            position = bisect_left(latest, time_ns)
            if position == len(self._blocks):
                return self._blocks[-1].end if self._blocks else 0
            block = self._blocks[position]
            entries = self._load(block)
            if entries is not None:
                return next(n for n, entry in enumerate(entries, block.first_entry) if entry.time_ns >= time_ns)

    def check(self) -> tuple[Loss, ...]:
        """Read the whole file and say everything that is lost."""
        self._scan()
        for block in tuple(self._blocks):
            self._load(block)
        return tuple(self.losses)

    def _block_at(self, number: int) -> Block | None:
        """The block with entry `number`, else the next one."""
        position = bisect_right(self._blocks, number, key=lambda block: block.end)
        return self._blocks[position] if position < len(self._blocks) else None

    def _load(self, block: Block) -> list[Entry] | None:
        """The entries of a block; None when it is broken, and then it is in the table no more."""
        if self._cached[0] == block.number:
            return self._cached[1]
        try:
            head = read_head(self._file, block.offset)
            if head is None or (head.stream, head.number, head.first_entry, head.entries) != (
                self._stream, block.number, block.first_entry, block.entries,
            ):  # fmt: skip
                raise TraceFormatError("not the block that the index names")
            entries = self._codec.unpack(read_payload(self._file, block.offset, head))
            if len(entries) != block.entries:
                raise TraceFormatError(f"{len(entries)} entries where the head says {block.entries}")
        except TraceFormatError as error:
            if not self._scanned:
                self._scan()
            else:
                self._blocks.remove(block)
                length = frames.HEAD_BYTES + head.stored_bytes if head is not None else 0
                self.losses.append(
                    Loss(block.offset, length, block.number, 1, block.first_entry, block.entries, str(error))
                )
                self.losses.sort()
            return None
        self._cached = (block.number, entries)
        return entries

    # Files ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the file that the reader opened."""
        if self._owned:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise TraceFormatError(f"{path}: {error.strerror or error}") from error


def _installed_vocabulary(header: Header) -> Vocabulary:
    from sevlab.core.plugins import installed

    known = installed()
    names = {*header.config.plugins, *(plugin.name for plugin in header.plugins)}
    return vocabulary_of(name for name in sorted(names) if name in known)
