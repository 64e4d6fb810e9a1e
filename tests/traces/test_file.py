"""The file as documented, decoded here by hand; access by number and time; records that are not declared here."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from typing import NamedTuple

import msgpack
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core import events as ev
from sevlab.core.config import MachineConfig
from sevlab.core.errors import TraceFormatError
from sevlab.core.vocabulary import Boundary, Derived, Input, Vocabulary, outcome, spec_of, step
from sevlab.traces import frames
from sevlab.traces.reader import TraceReader
from sevlab.traces.replay_recorded import replay_recorded
from sevlab.traces.schema import Entry, Header, vocabulary_of
from sevlab.traces.writer import TraceWriter

VOCABULARY = vocabulary_of(("sme",))
HEADER = Header(config=MachineConfig(plugins=("sme",)))


def written(entries, *, vocabulary=VOCABULARY, block_bytes=60, counts=None) -> io.BytesIO:
    file = io.BytesIO()
    writer = TraceWriter(file, HEADER, vocabulary=vocabulary, block_bytes=block_bytes)
    for entry in entries:
        writer.append(entry)
    writer.close(counts)
    return file


def advance(time_ns, vcpu=-1) -> Entry:
    return Entry(time_ns, vcpu, ev.AdvanceClock(time_ns & 0xFF), (ev.Done(),))


def test_the_file_is_as_documented():
    entries = [advance(time, n) for n, time in enumerate([1000, 1500, 1200, 9000])]
    again = Entry(1000, 4, ev.AdvanceClock(1000 & 0xFF), (ev.Done(), ev.Done()))
    data = written([*entries, again], block_bytes=1 << 20, counts={"lines": 9}).getvalue()
    payloads, offset = [], 0
    while data[offset : offset + 8] == b"\x89sevtrc\n":
        kind, version, zero, stream, number, first, count, raw, stored, low, high, crc, head_crc = struct.unpack_from(
            "<cBHIQQIIIQQII", data, offset + 8
        )
        assert (version, zero) == (1, 0)
        assert head_crc == zlib.crc32(data[offset : offset + 64])
        packed = data[offset + 68 : offset + 68 + stored]
        assert crc == zlib.crc32(packed)
        payload = zstandard.ZstdDecompressor().decompress(packed)
        assert len(payload) == raw
        payloads.append((kind, stream, number, first, count, low, high, payload, offset))
        offset += 68 + stored
    assert data[offset:] == struct.pack("<Q", payloads[-1][-1]) + b"sevtrc\n\x89"
    assert [frame[0] for frame in payloads] == [b"H", b"H", b"R", b"I"]
    assert payloads[0][:-1] == payloads[1][:-1]
    assert {frame[1] for frame in payloads} == {zlib.crc32(data[68 : payloads[1][-1]])}
    header = msgpack.unpackb(payloads[0][7])
    assert header["format"] == 2
    kinds = [kind[0] for kind in header["kinds"]]
    assert header["kinds"][kinds.index("advance")] == ["advance", "scheduler", True, [["ticks", "int", "input"]]]
    assert payloads[2][2:7] == (0, 0, 5, 1000, 9000)
    step_, done = kinds.index("advance"), kinds.index("done")
    unpacker = msgpack.Unpacker()
    unpacker.feed(payloads[2][7])
    assert list(unpacker) == [
        [step_, 1000 & 0xFF], 1000, 0, [done],
        [step_, 1500 & 0xFF], 500, 1, 1,
        [step_, 1200 & 0xFF], -300, 2, 1,
        [step_, 9000 & 0xFF], 7800, 3, 1,
        0, -8000, 4, 1, 1,
    ]  # fmt: skip
    assert msgpack.unpackb(payloads[3][7]) == {
        "entries": 5,
        "blocks": [[payloads[2][-1], 0, 5, 1000, 9000]],
        "kinds": {"advance": 5, "done": 6},
        "counts": {"lines": 9},
    }
    assert payloads[3][2:4] == (1, 5)


def test_the_declared_head_is_the_one_in_use():
    assert frames.HEAD_BYTES == 68
    names = [field.name for field in frames.HEAD_FIELDS]
    assert [name for name in names if name not in {"marker", "version", "reserved"}] == list(frames.Head._fields)


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=30), st.integers(0, (1 << 64) - 1))
def test_an_entry_is_found_by_time_even_when_clocks_disagree(times, wanted):
    reader = TraceReader(written([advance(time) for time in times]), vocabulary=VOCABULARY)
    expected = next((n for n, time in enumerate(times) if time >= wanted), len(times))
    assert reader.at_time(wanted) == expected


@given(st.integers(0, 30), st.integers(0, 32), st.integers(0, 32))
def test_any_range_of_entries_can_be_read(count, start, stop):
    entries = [advance(n) for n in range(count)]
    reader = TraceReader(written(entries), vocabulary=VOCABULARY)
    assert list(reader.entries(start, stop)) == entries[start:stop]
    assert list(reader.entries(start)) == entries[start:]
    if start < count:
        assert reader[start] == entries[start]
    else:
        with pytest.raises(IndexError):
            reader[start]


def test_counts_of_the_end_are_in_the_index():
    reader = TraceReader(written([advance(1)], counts={"lines": 7}), vocabulary=VOCABULARY)
    assert reader.index.counts == {"lines": 7}
    assert reader.index.entries == 1


def test_a_trace_that_was_broken_off_has_no_index():
    file = io.BytesIO()
    writer = TraceWriter(file, HEADER, vocabulary=VOCABULARY)
    writer.append(advance(1))
    error = KeyError()
    writer.__exit__(KeyError, error, None)
    reader = TraceReader(file, vocabulary=VOCABULARY)
    assert reader.index is None
    assert list(reader) == [advance(1)]
    assert reader.check() == ()


def test_an_existing_file_is_not_replaced_unasked(tmp_path):
    path = tmp_path / "a.sevtrace"
    TraceWriter(path, HEADER).close()
    with pytest.raises(TraceFormatError, match="exists already"):
        TraceWriter(path, HEADER)
    TraceWriter(path, HEADER, overwrite=True).close()
    with pytest.raises(TraceFormatError, match="No such file"):
        TraceWriter(tmp_path / "no" / "b.sevtrace", HEADER)


@step("test.kick", Boundary.DEVICE)
class Kick(NamedTuple):
    strength: Input[int]
    note: Derived[str]


@step("test.kick", Boundary.DEVICE)
class OtherKick(NamedTuple):
    strength: Input[bytes]


@outcome("test.kick", Boundary.DEVICE)
class KickOutcome(NamedTuple):
    strength: Input[int]
    note: Derived[str]


WITH_KICK = Vocabulary(VOCABULARY.kinds | {"test.kick": Kick})


def test_records_of_a_missing_plugin_are_shown_as_declared_but_not_replayed():
    file = written([Entry(0, 0, Kick(7, "x"), ())], vocabulary=WITH_KICK)
    reader = TraceReader(file, vocabulary=VOCABULARY)
    (entry,) = reader
    assert entry.step == (7, "x")
    assert [field.name for field in spec_of(entry.step).fields] == ["strength", "note"]
    assert reader.foreign == {"test.kick": "not declared here; is a plugin missing?"}
    with pytest.raises(TraceFormatError, match=r"'test\.kick': not declared here"):
        replay_recorded(reader)


@pytest.mark.parametrize("other", [OtherKick, KickOutcome])
def test_a_changed_declaration_is_noticed_not_misread(other):
    file = written([Entry(0, 0, Kick(7, "x"), ())], vocabulary=WITH_KICK)
    reader = TraceReader(file, vocabulary=Vocabulary(VOCABULARY.kinds | {"test.kick": other}))
    (entry,) = reader
    assert type(entry.step) not in {Kick, other}
    assert reader.foreign["test.kick"].startswith("declared otherwise here: test.kick(")
    assert reader.foreign["test.kick"].endswith("in the file: test.kick(strength: int, note: str)")


def test_declarations_that_no_entry_uses_do_not_stop_a_replay():
    file = written([advance(0)], vocabulary=WITH_KICK)
    assert replay_recorded(TraceReader(file, vocabulary=VOCABULARY)).divergences == ()


MILLIONS = """
import re, sys
from sevlab.core import events as ev
from sevlab.core.config import MachineConfig
from sevlab.traces.reader import TraceReader
from sevlab.traces.schema import Entry, Header
from sevlab.traces.writer import TraceWriter

path, entries = sys.argv[1], int(sys.argv[2])
with TraceWriter(path, Header(config=MachineConfig(plugins=("sme",)))) as writer:
    for n in range(entries):
        outcome = (ev.VmExit(n % 2, 0x7B, n * n % 7919, n), ev.Resumed(n % 2, n * 31 % 100_003))
        writer.append(Entry(n * 40, n % 2, ev.CpuExit(n % 2, 0x7B, n * n % 7919, n, b"", 0), outcome))
with TraceReader(path) as reader:
    assert sum(1 for _ in reader) == entries
status = open("/proc/self/status").read()  # not getrusage, which remembers the process that forked this one
print(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
"""


def peak_kib(path, entries: int) -> int:
    command = [sys.executable, "-c", MILLIONS, str(path), str(entries)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.long
def test_memory_stays_flat(tmp_path):
    few, many = peak_kib(tmp_path / "a", 20_000), peak_kib(tmp_path / "b", 100_000)
    assert many < few + 20_000


@pytest.mark.long
def test_millions_of_records_take_no_more_memory_than_a_few(tmp_path):
    assert peak_kib(tmp_path / "a", 700_000) < 100 << 10  # 2.1 million records
