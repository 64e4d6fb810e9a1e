"""The target of the trace reader: whatever the bytes, entries or a `TraceFormatError`, and a true account of losses."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator

import zstandard
from sevlab.core.config import MachineConfig
from sevlab.core.errors import InvariantViolation, TraceFormatError
from sevlab.core.events import AdvanceClock, Done, MemoryWrite, SetRegisters
from sevlab.core.machine import Machine
from sevlab.traces import frames
from sevlab.traces.machine_state import pack_snapshot, unpack_snapshot
from sevlab.traces.reader import TraceReader
from sevlab.traces.schema import Entry, Header, vocabulary_of
from sevlab.traces.writer import TraceWriter

PLUGINS = ("sme",)
FILE, BLOCK, STORED, STATE = range(4)
"""What an input is, by its first byte: a whole file, the payload of a block, the same compressed, a machine state."""

ENTRIES = (
    Entry(5, 0, SetRegisters(0, (("rax", 1),)), (Done(),)),
    Entry(9, 1, MemoryWrite(1, 0, 0, 0x1000, False, b"data"), (Done(),)),
    Entry(7, -1, AdvanceClock(1 << 40), (Done(), Done())),
)


def _file() -> bytes:
    file = io.BytesIO()
    with TraceWriter(file, Header(config=MachineConfig(plugins=PLUGINS)), block_bytes=8) as writer:
        for entry in ENTRIES:
            writer.append(entry)
    return file.getvalue()


def seeds() -> Iterator[bytes]:
    """An input of each kind that is as it should be."""
    data = _file()
    yield bytes((FILE,)) + data
    block = TraceReader(io.BytesIO(data)).index
    assert block is not None
    for place in block.blocks:
        head = frames.parse_head(data[place.offset : place.offset + frames.HEAD_BYTES])
        assert head is not None
        stored = data[place.offset + frames.HEAD_BYTES :][: head.stored_bytes]
        yield bytes((STORED,)) + stored
        yield bytes((BLOCK,)) + frames.open_payload(head, stored)
    yield bytes((STATE,)) + pack_snapshot(Machine(MachineConfig(plugins=PLUGINS)).snapshot())


def trace_target() -> Callable[[bytes], None]:
    """A function that reads its bytes as one of the four things. Raises `InvariantViolation` for a false account."""
    vocabulary = vocabulary_of(PLUGINS)
    start = _file()
    head = frames.parse_head(start)
    assert head is not None
    header = start[: 2 * (frames.HEAD_BYTES + head.stored_bytes)]
    compressor = zstandard.ZstdCompressor(level=1)

    def block_of(payload: bytes, stored: bytes) -> bytes:
        crc = zlib.crc32(stored)
        packed = frames.HEAD.pack(
            frames.MARKER, frames.RECORDS, 1, 0, head.stream, 0, 0, 1, len(payload), len(stored), 0, 0, crc
        )
        return header + packed + frames.HEAD_CRC.pack(zlib.crc32(packed)) + stored

    def run(data: bytes) -> None:
        kind, content = (data[0] % 4, data[1:]) if data else (FILE, b"")
        try:
            if kind == STATE:
                unpack_snapshot(content)
                return
            if kind == BLOCK:
                content = block_of(content, compressor.compress(content))
            elif kind == STORED:
                content = block_of(content, content)
            reader = TraceReader(io.BytesIO(content), vocabulary=vocabulary)
        except TraceFormatError:
            return
        account(reader)

    return run


def account(reader: TraceReader) -> None:
    """Read everything twice. Raises `InvariantViolation` unless each entry is either read or lost."""
    first = list(reader.numbered())
    losses = reader.check()
    numbers = [number for number, _ in first]
    if list(reader.numbered()) != first or len(reader) != len(first) or numbers != sorted(set(numbers)):
        raise InvariantViolation("trace.reader", "two readings differ")
    found = set(numbers)
    for loss in losses:
        lost = range(loss.first_entry, loss.first_entry + (loss.entries or 0))
        if any(number in found for number in lost[:1000]):
            raise InvariantViolation("trace.losses", f"an entry is read and lost: {loss}")
