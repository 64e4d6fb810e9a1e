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
from sevlab.traces.codec import MAX_ARRAY_ITEMS, MAX_BLOCK_RECORDS, MAX_DEPTH, MAX_REPEATED_BYTES, BlockPacker, Codec
from sevlab.traces.reader import TraceReader
from sevlab.traces.schema import Entry, Header, declared, vocabulary_of
from sevlab.traces.writer import TraceWriter

VOCABULARY = vocabulary_of(("sme",))
CODEC = Codec(declared(VOCABULARY), VOCABULARY)
NUMBERS = {kind.spec.kind: kind.number for kind in CODEC.kinds}
COMPRESSOR = zstandard.ZstdCompressor(level=3)
ADVANCE = NUMBERS["advance"]


def packed(*values: object) -> bytes:
    return b"".join(map(msgpack.packb, values))


def pack(entry: Entry) -> bytes:
    return BlockPacker(CODEC).pack(entry)


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
        (msgpack.packb([NUMBERS["write"], 0, 0, 1, 0, False, b"xx"])[:-1], "TypeError"),
        (packed([ADVANCE, 1]), "TypeError"),
        (packed([ADVANCE, 1], 0), "vCPU None"),
        (packed([ADVANCE, 1], 0, -1)[:-1] + b"\xcd\0", "ends inside a record"),
        (b"\0" * 1000, "KeyError 0"),
        (packed([ADVANCE, 1], 0, -1, 1), "KeyError 1"),
        (packed([ADVANCE, 1], 0, -1, -1), "KeyError -1"),
        (packed([ADVANCE, 1], 0, -1, 0.0), "TypeError"),
        (packed([ADVANCE, 1], 0, -1, False), "TypeError"),
        (packed([NUMBERS["write"], 0, 0, 0, 1, False, bytes(MAX_REPEATED_BYTES + 1)], 0, -1, 0), "KeyError 0"),
        (b"\xdd\xff\xff\xff\xff", "exceeds max_array_len"),
        (b"\xdc\xff\xff" * 2000, "exceeds max_array_len"),
        (b"\x93\x00\x00" + b"\xc6\xff\xff\xff\xff", "ends inside a record"),
        (b"\xdb\xff\xff\xff\xff", "ends inside a record"),
        (b"\xc9\xff\xff\xff\xff\x01", "exceeds max_ext_len"),
        (b"\xdf\xff\xff\xff\xff", "exceeds max_map_len"),
        (b"\x91" * 100_000, "StackError"),
        (b"\xdc\x10\x00" * 1023, "ends inside a record"),
        (b"\xc1", "FormatError"),
        (packed([10_000]), "KeyError 10000"),
        (packed(["exit"]), "KeyError 'exit'"),
        (packed([-1]), "KeyError -1"),
        (packed([NUMBERS["done"]]), "an outcome before any step"),
        (packed([ADVANCE, -1]), "advance holds (-1,), expected advance(ticks: int)"),
        (packed([ADVANCE, 1.0]), "advance holds (1.0,)"),
        (packed([ADVANCE, True]), "advance holds (True,)"),
        (packed([ADVANCE, 1], 0, -1, [ADVANCE, True], 0, -1), "advance holds (True,)"),
        (packed([ADVANCE, 1, 2]), "advance holds (1, 2)"),
        (packed([ADVANCE, 1], "x", 0), "TypeError"),
        (packed([ADVANCE, 1], 0, -2), "vCPU -2"),
        (packed([ADVANCE, 1], 0, True), "vCPU True"),
        (packed([[]]), "KeyError ()"),
        (packed([{}]), "unhashable"),
        (packed([ADVANCE]), "advance holds ()"),
        (packed([ADVANCE, 1], 0, -1) + b"\x92", "ends inside a record"),
        (packed([ADVANCE, 1], 0, -1, 0, 0, -1), "2 entries where the head says 1"),
        (packed([ADVANCE, 1], 0, -1) * 3001, "more than 3000 records"),
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
    refused(made_of(packed([NUMBERS["registers"], 0, nested(depth)], 0, 0)), "registers holds")
    with pytest.raises(TraceFormatError, match="registers holds"):
        pack(Entry(0, 0, ev.SetRegisters(0, nested(depth)), ()))


def test_nesting_to_the_limit_is_kept():
    entry = Entry(0, 0, ev.SetRegisters(0, nested(MAX_DEPTH)), ())
    assert CODEC.unpack(pack(entry)) == [entry]


def test_a_tuple_to_the_limit_is_kept_and_a_longer_one_refused():
    entry = Entry(0, 0, ev.SetRegisters(0, (1,) * MAX_ARRAY_ITEMS), ())
    assert CODEC.unpack(pack(entry)) == [entry]
    with pytest.raises(TraceFormatError, match="registers holds"):
        pack(Entry(0, 0, ev.SetRegisters(0, (1,) * (MAX_ARRAY_ITEMS + 1)), ()))


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
        pack(entry)


def test_enumerations_travel_as_their_numbers():
    (entry,) = CODEC.unpack(pack(Entry(0, 0, ev.MemoryRead(ev.Party.DMA, 0, ev.Space.SPA, 0, False, 1), ())))
    assert entry.step == ev.MemoryRead(3, 0, 0, 0, False, 1)
    assert type(entry.step.party) is int


def test_equal_values_of_other_types_are_other_records():
    packer = BlockPacker(CODEC)
    entries = [Entry(0, 0, ev.SetRegisters(0, value), ()) for value in ((1,), (True,), (0,), (False,), (1,))]
    found = CODEC.unpack(b"".join(map(packer.pack, entries)))
    assert [type(entry.step[1][0]) for entry in found] == [int, bool, int, bool, int]
    with pytest.raises(TraceFormatError, match="advance holds"):
        list(map(packer.pack, (Entry(0, 0, ev.AdvanceClock(value), ()) for value in (1, True))))


@pytest.mark.parametrize("count", [1, MAX_REPEATED_BYTES - 20, MAX_REPEATED_BYTES, MAX_REPEATED_BYTES + 1])
def test_a_record_that_comes_again_is_a_number_unless_it_is_long(count):
    packer = BlockPacker(CODEC)
    entry = Entry(0, 0, ev.AdvanceClock(1), (ev.Data(bytes(count)),) * 2)
    block = packer.pack(entry) + packer.pack(entry)
    assert CODEC.unpack(block) == [entry, entry]
    assert (len(block) < 2 * count + 40) == (count <= MAX_REPEATED_BYTES - 20)


def test_an_entry_that_is_refused_costs_no_other():
    file = io.BytesIO()
    good = Entry(0, 0, ev.AdvanceClock(1), (ev.Data(b"x"),))
    with TraceWriter(file, Header(config=MachineConfig(plugins=("sme",))), vocabulary=VOCABULARY) as writer:
        writer.append(good)
        with pytest.raises(TraceFormatError, match="data holds"):
            writer.append(Entry(0, 0, ev.AdvanceClock(1), (ev.Data(b"new"), ev.Data(b"other"), ev.Data([1]))))
        with pytest.raises(TraceFormatError, match="advance holds"):
            writer.append(Entry(0, 0, ev.AdvanceClock(-1), ()))
        writer.append(Entry(0, 0, ev.AdvanceClock(1), (ev.Data(b"other"),)))
        writer.append(good)
    reader = TraceReader(file, vocabulary=VOCABULARY)
    assert [entry.outcome[0] for entry in reader] == [(b"x",), (b"other",), (b"x",)]
    assert reader.index.kinds == {"advance": 3, "data": 3}
