"""Whatever happens to a file: every intact block is read, and what is gone is said exactly."""

from __future__ import annotations

import io
import os
import random
import signal
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from sevlab.core import events as ev
from sevlab.core.config import MachineConfig
from sevlab.core.errors import TraceFormatError
from sevlab.traces import frames
from sevlab.traces.reader import TraceReader
from sevlab.traces.schema import Entry, Header, vocabulary_of
from sevlab.traces.writer import TraceWriter

VOCABULARY = vocabulary_of(("sme",))
HEADER = Header(config=MachineConfig(plugins=("sme",)))
POINTS = 200


def entry(number: int) -> Entry:
    data = random.Random(number).randbytes(12)
    return Entry(number * 1000, number % 2, ev.MemoryWrite(0, number % 2, 1, number << 12, False, data), (ev.Done(),))


class Made(NamedTuple):
    data: bytes
    entries: list[Entry]
    blocks: list[tuple[int, int, int, int]]
    """Start and end in bytes, first entry, entries."""
    header_end: int
    index_offset: int


@pytest.fixture(scope="module")
def made() -> Made:
    file = io.BytesIO()
    writer = TraceWriter(file, HEADER, vocabulary=VOCABULARY, block_bytes=350)
    entries = [entry(number) for number in range(500)]
    starts = []
    for item in entries:
        before = file.tell()
        writer.append(item)
        if file.tell() != before:
            starts.append(before)
    header_end = starts[0]
    before = file.tell()
    writer.flush()
    starts.append(before)
    index_offset = file.tell()
    writer.close()
    data = file.getvalue()
    blocks = []
    for start, end in pairwise([*starts, index_offset]):
        head = frames.parse_head(data[start : start + frames.HEAD_BYTES])
        blocks.append((start, end, head.first_entry, head.entries))
    assert len(blocks) > 40
    assert blocks[-1][2] + blocks[-1][3] == len(entries)
    return Made(data, entries, blocks, header_end, index_offset)


def read(data: bytes) -> tuple[TraceReader, list[tuple[int, Entry]]]:
    reader = TraceReader(io.BytesIO(data), vocabulary=VOCABULARY)
    return reader, list(reader.numbered())


def assert_left(made: Made, data: bytes, damaged: list[tuple[int, int, int, int]]) -> TraceReader:
    """What is read of `data` is everything but the entries of the blocks `damaged`, and these are the losses."""
    gone = {n for _, _, first, count in damaged for n in range(first, first + count)}
    reader, found = read(data)
    assert found == [(n, item) for n, item in enumerate(made.entries) if n not in gone]
    losses = reader.check()
    lost = [n for loss in losses for n in range(loss.first_entry, loss.first_entry + loss.entries)]
    assert sorted(lost) == sorted(gone)
    assert [n for n, _ in reader.numbered()] == [n for n, _ in found]
    for number in random.Random(0).sample(range(len(made.entries)), 8):
        if number in gone:
            with pytest.raises(TraceFormatError, match=f"entry {number} is lost"):
                reader[number]
        else:
            assert reader[number] == made.entries[number]
    return reader


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_costs_its_block_and_nothing_else(made, seed):
    rng = random.Random(seed)
    for _ in range(POINTS // 4):
        at = rng.randrange(len(made.data))
        data = bytearray(made.data)
        data[at] ^= 1 << rng.randrange(8)
        damaged = [block for block in made.blocks if block[0] <= at < block[1]]
        reader = assert_left(made, bytes(data), damaged)
        (loss,) = reader.losses
        assert loss.offset <= at < loss.offset + loss.length_bytes
        if damaged:
            start, end, first, count = damaged[0]
            number = made.blocks.index(damaged[0])
            assert loss[:6] == (start, end - start, number, 1, first, count)
        else:
            assert (loss.blocks, loss.entries) == (0, 0)


def expect_cut(made: Made, data: bytes) -> None:
    """`data` is the start of a trace: all before the first torn block is there, the rest is accounted for."""
    cut = len(data)
    whole = [block for block in made.blocks if block[1] <= cut]
    kept = whole[-1][2] + whole[-1][3] if whole else 0
    reader, found = read(data)
    assert found == list(enumerate(made.entries[:kept]))
    assert reader.index is None or cut > made.index_offset
    end = whole[-1][1] if whole else made.header_end if cut >= made.header_end else made.header_end // 2
    if reader.index is not None:  # cut in the trailer, so that no entry is lost
        end = len(made.data) - frames.TRAILER.size
    if cut == end:
        assert reader.check() == ()
        return
    (loss,) = reader.check()
    assert (loss.offset, loss.length_bytes, loss.first_block, loss.first_entry) == (end, cut - end, len(whole), kept)
    if end >= made.index_offset or cut - end < frames.HEAD_BYTES or (not whole and cut < made.header_end):
        assert (loss.blocks, loss.entries) in {(None, None), (0, 0)}
    else:
        assert (loss.blocks, loss.entries) == (1, made.blocks[len(whole)][3])


@pytest.mark.parametrize("seed", range(4))
def test_a_cut_file_gives_every_whole_block(made, seed):
    rng = random.Random(seed)
    for _ in range(POINTS // 4):
        expect_cut(made, made.data[: rng.randrange(made.header_end // 2, len(made.data))])


def test_a_cut_at_every_boundary_is_exact(made):
    trailer = len(made.data) - frames.TRAILER.size
    for cut in (*range(made.index_offset, trailer, 97), *range(trailer - 1, len(made.data))):
        expect_cut(made, made.data[:cut])
    for start, end, _, _ in made.blocks[:3] + made.blocks[-2:]:
        for cut in (start, start + 1, start + frames.HEAD_BYTES - 1, start + frames.HEAD_BYTES, end - 1, end):
            expect_cut(made, made.data[:cut])


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 60, 500])
def test_without_any_header_the_file_is_refused(made, cut):
    with pytest.raises(TraceFormatError, match="header"):
        TraceReader(io.BytesIO(made.data[:cut]))


class Killed(BaseException):
    pass


class DyingFile(io.BytesIO):
    """Takes `life` bytes, and then the process is gone in the middle of a write."""

    def __init__(self, life: int) -> None:
        super().__init__()
        self.life = life

    def write(self, data: bytes) -> int:
        taken = super().write(data[: self.life])
        self.life -= taken
        if taken < len(data):
            raise Killed
        return taken


@pytest.mark.parametrize("seed", range(4))
def test_a_writer_killed_at_any_byte_loses_no_whole_block(made, seed):
    rng = random.Random(100 + seed)
    for _ in range(POINTS // 4):
        file = DyingFile(rng.randrange(made.header_end, made.index_offset))
        writer = TraceWriter(file, HEADER, vocabulary=VOCABULARY, block_bytes=350)
        try:
            for item in made.entries:
                writer.append(item)
            writer.close()
        except Killed:
            pass
        assert not file.life
        expect_cut(made, file.getvalue())


@pytest.mark.slow
def test_a_process_killed_while_it_writes_leaves_a_readable_trace(tmp_path: Path):
    rng = random.Random(5)
    for number in range(10):
        path = tmp_path / f"{number}.sevtrace"
        ready, told = os.pipe()
        child = os.fork()
        if not child:
            writer = TraceWriter(path, HEADER, vocabulary=VOCABULARY, block_bytes=350)
            os.write(told, b"!")
            for count in range(1 << 30):
                writer.append(entry(count))
        os.read(ready, 1)
        while path.stat().st_size < 10_000:
            pass
        for _ in range(rng.randrange(1000)):
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(told)
        with TraceReader(path, vocabulary=VOCABULARY) as reader:
            found = list(reader.numbered())
            assert reader.index is None
            assert all(loss.first_entry == len(found) for loss in reader.check())
        assert len(found) > 100
        assert found == [(n, entry(n)) for n in range(len(found))]


@pytest.mark.parametrize("seed", range(6))
def test_missing_inserted_and_zeroed_bytes_cost_only_the_blocks_they_touch(made, seed):
    rng = random.Random(seed)
    for _ in range(8):
        at = rng.randrange(made.header_end, made.index_offset)
        length = rng.randrange(1, 4000)
        hit = [block for block in made.blocks if block[0] < at + length and at < block[1]]
        assert_left(made, made.data[:at] + made.data[min(at + length, made.index_offset) :], hit)
        if any(made.data[at : min(at + length, made.index_offset)]):
            end = min(at + length, made.index_offset)
            assert_left(made, made.data[:at] + bytes(end - at) + made.data[end:], hit)
        inside = [block for block in made.blocks if block[0] < at < block[1]]
        assert_left(made, made.data[:at] + rng.randbytes(length) + made.data[at:], inside)


def test_a_block_of_another_file_is_no_part_of_this_one(made):
    other = io.BytesIO()
    with TraceWriter(other, Header(config=MachineConfig(seed=b"other")), vocabulary=VOCABULARY, block_bytes=350) as w:
        for number in range(500):
            w.append(entry(number + 5000))
    blocks = TraceReader(other, vocabulary=VOCABULARY).index.blocks
    start, end, *_ = made.blocks[7]
    foreign = other.getvalue()[blocks[7].offset : blocks[8].offset]
    assert_left(made, made.data[:start] + foreign + made.data[end:], [made.blocks[7]])


def test_a_block_that_comes_twice_counts_once(made):
    start, end, *_ = made.blocks[7]
    reader, found = read(made.data[:end] + made.data[start:end] + made.data[end:])
    assert [item for _, item in found] == made.entries
    (loss,) = reader.check()
    assert loss[:6] == (end, end - start, 8, 0, made.blocks[8][2], 0)


def test_a_loss_says_bytes_blocks_entries_and_why(made):
    start, end, first, count = made.blocks[3]
    data = bytearray(made.data)
    data[end - 1] ^= 1
    reader, _ = read(bytes(data))
    assert str(reader.losses[0]) == (
        f"bytes {start:#x} to {end:#x}: blocks 3, entries {first} to {first + count - 1} lost;"
        f" the checksum does not match (frame at {start:#x})"
    )
