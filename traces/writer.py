"""Write a `.sevtrace` file: append-only, block by block, so that whatever kills the writer costs one block at most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import msgpack
import zstandard
from sevlab.core.errors import TraceFormatError
from sevlab.core.vocabulary import Vocabulary
from sevlab.traces import frames
from sevlab.traces.codec import MAX_BLOCK_RECORDS, BlockPacker, Codec
from sevlab.traces.schema import Entry, Header, declared, pack_header, vocabulary_of, with_trace_records

BLOCK_BYTES = 256 << 10
"""A block is written when its records reach this size before compression."""

COMPRESSION_LEVEL = 3


class TraceWriter:
    """Appends entries to a trace.

    `target` is a path, which must not exist unless `overwrite`, or a binary file; `vocabulary` defaults to that of the
    configuration's plugins. `flush` ends the present block early. A trace that was not closed is readable up to its
    last block; closing adds the index and `counts`, numbers by name that only the end knows.
    """

    def __init__(
        self,
        target: str | Path | BinaryIO,
        header: Header,
        *,
        vocabulary: Vocabulary | None = None,
        overwrite: bool = False,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        if vocabulary is None:
            vocabulary = vocabulary_of(header.config.plugins)
        vocabulary = with_trace_records(vocabulary)
        self.header = replace(header, kinds=declared(vocabulary))
        self.entries = 0
        self._codec = Codec(self.header.kinds, vocabulary)
        self._block_bytes = block_bytes
        self._compressor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL, write_checksum=False)
        self._kind_counts = [0] * len(self.header.kinds)
        self._index: list[tuple[int, ...]] = []
        self._block = bytearray()
        self._packer = BlockPacker(self._codec)
        self._block_entries = 0
        self._min_time = self._max_time = 0
        self._offset = 0
        self._closed = False
        self._owned = isinstance(target, (str, Path))
        self._file: BinaryIO = _open(Path(target), overwrite) if isinstance(target, (str, Path)) else target
        first = frames.pack_frame(frames.HEADER, pack_header(self.header), compressor=self._compressor)
        head = frames.parse_head(first)
        assert head is not None
        self._stream = head.stream
        self._put(first)
        self._put(first)  # a second copy: one damaged place never costs the header

    def append(self, entry: Entry) -> None:
        """Add an entry. Raises `TraceFormatError` for a record that the vocabulary does not have or allow."""
        time_ns = entry.time_ns
        records = len(self._packer)
        try:
            packed = self._packer.pack(entry)
        except TraceFormatError:
            self._end_block(records)
            raise
        if self._block_entries and (
            len(self._block) + len(packed) > frames.MAX_RAW_BYTES or len(self._packer) > MAX_BLOCK_RECORDS
        ):
            self._end_block(records)
            packed = self._packer.pack(entry)
        if not self._block_entries:
            self._min_time = self._max_time = time_ns
        elif time_ns < self._min_time:
            self._min_time = time_ns
        elif time_ns > self._max_time:
            self._max_time = time_ns
        self._block += packed
        self._block_entries += 1
        self.entries += 1
        if len(self._block) >= self._block_bytes:
            self.flush()

    def flush(self) -> None:
        """End the present block, if it holds anything, and give it to the operating system."""
        self._end_block(len(self._packer))

    def _end_block(self, records: int) -> None:
        """Write the first `records` of the packer's records, which the block holds, and start anew."""
        packer, self._packer = self._packer, BlockPacker(self._codec)
        if not self._block_entries:
            return
        for number, count in packer.kinds(records).items():
            self._kind_counts[number] += count
        first = self.entries - self._block_entries
        frame = frames.pack_frame(
            frames.RECORDS,
            bytes(self._block),
            stream=self._stream,
            number=len(self._index),
            first_entry=first,
            entries=self._block_entries,
            times=(self._min_time, self._max_time),
            compressor=self._compressor,
        )
        self._index.append((self._offset, first, self._block_entries, self._min_time, self._max_time))
        self._put(frame)
        self._block.clear()
        self._block_entries = 0

    def close(self, counts: Mapping[str, int] | None = None) -> None:
        """Write what is left, the index and `counts`; a second call does nothing."""
        if self._closed:
            return
        self.flush()
        kinds = {spec.kind: count for spec, count in zip(self.header.kinds, self._kind_counts, strict=True) if count}
        index = {"entries": self.entries, "blocks": self._index, "kinds": kinds, "counts": dict(counts or {})}
        offset = self._offset
        frame = frames.pack_frame(
            frames.INDEX,
            msgpack.packb(index),
            stream=self._stream,
            number=len(self._index),
            first_entry=self.entries,
            compressor=self._compressor,
        )
        self._put(frame + frames.TRAILER.pack(offset, frames.TRAILER_MARKER))
        self._end()

    def _end(self) -> None:
        self._closed = True
        if self._owned:
            self._file.close()

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        self._offset += len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close; after an exception without the index, so that a broken-off trace is seen to be one."""
        if error is None:
            self.close()
        elif not self._closed:
            self.flush()
            self._end()


def _open(path: Path, overwrite: bool) -> BinaryIO:  # noqa: FBT001  # private, one caller
    try:
        return path.open("wb" if overwrite else "xb")
    except FileExistsError as error:
        raise TraceFormatError(f"{path}: exists already; a trace is never overwritten unasked") from error
    except OSError as error:
        raise TraceFormatError(f"{path}: {error.strerror or error}") from error
