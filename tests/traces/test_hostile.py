"""Files made to hurt the reader: refused, with a reason, and with flat memory."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import msgpack
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core import events as ev
from sevlab.core.config import MachineConfig
from sevlab.core.errors import TraceFormatError
from sevlab.traces import codec, frames
from sevlab.traces.codec import MAX_ARRAY_ITEMS, MAX_BLOCK_RECORDS, MAX_DEPTH, Codec
from sevlab.traces.reader import TraceReader
from sevlab.traces.schema import Entry, Header, declared, vocabulary_of
from sevlab.traces.writer import TraceWriter

VOCABULARY = vocabulary_of(("sme",))
CODEC = Codec(declared(VOCABULARY), VOCABULARY)
NUMBERS = {kind.spec.kind: kind.number for kind in CODEC.kinds}
COMPRESSOR = zstandard.ZstdCompressor(level=3)
ADVANCE = [NUMBERS["advance"], 0, -1]


def made_of(payload: bytes, *, entries: int = 1, raw_bytes: int | None = None, stored: bytes | None = None) -> bytes:
    """A trace of one block with whatever payload, and with checksums that are right."""
    file = io.BytesIO()
    writer = TraceWriter(file, Header(config=MachineConfig(plugins=("sme",))), vocabulary=VOCABULARY)
    start = file.getvalue()
    stream = frames.parse_head(start).stream
    assert writer.entries == 0
    if stored is None:
        return start + frames.pack_frame(frames.RECORDS, payload, stream=stream, entries=entries, compressor=COMPRESSOR)
    crc = zlib.crc32(stored)
    head = frames.HEAD.pack(
        frames.MARKER, b"R", 1, 0, stream, 0, 0, entries, raw_bytes, len(stored), 0, 0, crc
    )  # fmt: skip
    return start + head + struct.pack("<I", zlib.crc32(head)) + stored


def refused(data: bytes, reason: str) -> None:
    tracemalloc.start()
    reader = TraceReader(io.BytesIO(data), vocabulary=VOCABULARY)
    assert list(reader) == []
    losses = reader.check()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(losses) == 1
    assert reason in losses[0].reason
    assert peak < 120 << 20


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "0 entries where the head says 1"),
        (b"\xc0", "ends inside a record"),
        (msgpack.packb([NUMBERS["write"], 0, 0, 0, 0, 1, 0, False, b"xx"])[:-1], "ends inside a record"),
        (b"\0" * 1000, "TypeError"),
        (b"\xdd\xff\xff\xff\xff", "exceeds max_array_len"),
        (b"\xdc\xff\xff" * 2000, "exceeds max_array_len"),
        (b"\x93\x00\x00" + b"\xc6\xff\xff\xff\xff", "ends inside a record"),
        (b"\xdb\xff\xff\xff\xff", "ends inside a record"),
        (b"\xc9\xff\xff\xff\xff\x01", "exceeds max_ext_len"),
        (b"\xdf\xff\xff\xff\xff", "exceeds max_map_len"),
        (b"\x91" * 100_000, "StackError"),
        (b"\xdc\x10\x00" * 1023, "ends inside a record"),
        (b"\xc1", "FormatError"),
        (msgpack.packb([10_000, 0, 0]), "KeyError 10000"),
        (msgpack.packb(["exit", 0, 0]), "KeyError 'exit'"),
        (msgpack.packb([-1, 0, 0]), "KeyError -1"),
        (msgpack.packb([NUMBERS["done"]]), "an outcome before any step"),
        (msgpack.packb([*ADVANCE, -1]), "advance holds (-1,), expected advance(ticks: int)"),
        (msgpack.packb([*ADVANCE, 1.0]), "advance holds (1.0,)"),
        (msgpack.packb([*ADVANCE, True]), "advance holds (True,)"),
        (msgpack.packb([*ADVANCE, 1, 2]), "advance holds (1, 2)"),
        (msgpack.packb([ADVANCE[0], "x", 0, 1]), "TypeError"),
        (msgpack.packb([ADVANCE[0], 0, -2, 1]), "vCPU -2"),
        (msgpack.packb([[], 0, 0]), "KeyError ()"),
        (msgpack.packb([{}]), "unhashable"),
        (msgpack.packb([ADVANCE[0]]), "advance holds ()"),
        (msgpack.packb([*ADVANCE, 1]) + b"\x92", "ends inside a record"),
        (msgpack.packb([*ADVANCE, 1]) * 2, "2 entries where the head says 1"),
        (msgpack.packb([*ADVANCE, 1]) * 3001, "more than 3000 records"),
    ],
)  # fmt: skip
def test_a_block_of_nonsense_is_lost_with_its_reason(payload, reason, monkeypatch):
    monkeypatch.setattr(codec, "MAX_BLOCK_RECORDS", 3000)
    refused(made_of(payload), reason)


def nested(depth: int) -> tuple[object, ...]:
    value: tuple[object, ...] = (1,)
    for _ in range(depth):
        value = (value,)
    return value


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 500])
def test_deep_nesting_is_refused_by_both_sides(depth):
    packed = msgpack.packb([NUMBERS["registers"], 0, 0, 0, nested(depth)])
    refused(made_of(packed), "registers holds")
    with pytest.raises(TraceFormatError, match="registers holds"):
        CODEC.pack(Entry(0, 0, ev.SetRegisters(0, nested(depth)), ()), 0)


def test_nesting_to_the_limit_is_kept():
    entry = Entry(0, 0, ev.SetRegisters(0, nested(MAX_DEPTH)), ())
    assert CODEC.unpack(CODEC.pack(entry, 0)[0]) == [entry]


def test_a_tuple_to_the_limit_is_kept_and_a_longer_one_refused():
    entry = Entry(0, 0, ev.SetRegisters(0, (1,) * MAX_ARRAY_ITEMS), ())
    assert CODEC.unpack(CODEC.pack(entry, 0)[0]) == [entry]
    with pytest.raises(TraceFormatError, match="registers holds"):
        CODEC.pack(Entry(0, 0, ev.SetRegisters(0, (1,) * (MAX_ARRAY_ITEMS + 1)), ()), 0)


def test_a_bomb_is_refused_before_it_is_unpacked():
    bomb = COMPRESSOR.compress(bytes(500 << 20))
    refused(made_of(b"", raw_bytes=100, stored=bomb), "524288000 bytes where the head says 100")


def test_a_frame_without_a_size_is_refused():
    stored = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))
    refused(made_of(b"", raw_bytes=1000, stored=stored), "where the head says 1000")


def test_lengths_of_gigabytes_in_a_head_are_no_head():
    for raw_bytes in (frames.MAX_RAW_BYTES + 1, 0xFFFF_FFFF):
        refused(made_of(b"", raw_bytes=raw_bytes, stored=b"x"), "no intact block there")


@given(st.binary(max_size=300), st.integers(0, 3))
def test_any_payload_is_entries_or_a_loss(payload, entries):
    reader = TraceReader(io.BytesIO(made_of(payload, entries=entries)), vocabulary=VOCABULARY)
    found = list(reader)
    assert len(found) == (0 if reader.losses else entries)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_trace_or_refused(data):
    with pytest.raises(TraceFormatError, match="header"):
        TraceReader(io.BytesIO(data), vocabulary=VOCABULARY)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Entry(0, 0, ev.AdvanceClock(-1), ()), r"advance holds \(-1,\), expected advance\(ticks: int\)"),
        (Entry(0, 0, ev.AdvanceClock(1 << 64), ()), "ticks=18446744073709551616.: Integer value out of range"),
        (Entry(0, 0, ev.AdvanceClock(1), (ev.Data([1]),)), r"data holds \(\[1\],\)"),
        (Entry(0, 0, ev.AdvanceClock("1"), ()), "advance holds"),
        (Entry(0, 0, ev.Done(), ()), "is not a step"),
        (Entry(0, 0, ev.AdvanceClock(1), (ev.AdvanceClock(1),)), "is not an outcome record"),
        (Entry(-1, 0, ev.AdvanceClock(1), ()), "time -1"),
        (Entry(1 << 64, 0, ev.AdvanceClock(1), ()), "time 18446744073709551616"),
        (Entry(0, -2, ev.AdvanceClock(1), ()), "vCPU -2"),
        (Entry(0, 0, ev.AdvanceClock(1), (ev.Done(),) * MAX_BLOCK_RECORDS), "outcome records: expected fewer"),
    ],
)
def test_what_a_reader_would_refuse_is_not_written(entry, message):
    with pytest.raises(TraceFormatError, match=message):
        CODEC.pack(entry, 0)


def test_enumerations_travel_as_their_numbers():
    packed, _ = CODEC.pack(Entry(0, 0, ev.MemoryRead(ev.Party.DMA, 0, ev.Space.SPA, 0, False, 1), ()), 0)
    (entry,) = CODEC.unpack(packed)
    assert entry.step == ev.MemoryRead(3, 0, 0, 0, False, 1)
    assert type(entry.step.party) is int
