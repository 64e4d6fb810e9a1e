"""A copy of later blocks in front of the real ones: the closing index names the real ones, and a scan lost block 0.

Found by the fuzzer of the trace reader: two readings of one file differed.
"""

from __future__ import annotations

import io

import pytest
from sevlab.core import events as ev
from sevlab.core.config import MachineConfig
from sevlab.traces.reader import TraceReader
from sevlab.traces.schema import Entry, Header, vocabulary_of
from sevlab.traces.writer import TraceWriter

VOCABULARY = vocabulary_of(("sme",))


@pytest.fixture
def made():
    """(file, entries, end of the two copies of the header, offset of each block and of the index)."""
    file = io.BytesIO()
    writer = TraceWriter(file, Header(config=MachineConfig(plugins=("sme",))), vocabulary=VOCABULARY)
    entries = [Entry(number, 0, ev.AdvanceClock(number), (ev.Done(),)) for number in range(3)]
    offsets = [file.tell()]
    for entry in entries:
        writer.append(entry)
        writer.flush()
        offsets.append(file.tell())
    writer.close()
    return file.getvalue(), entries, offsets


def spliced(data, offsets, *, first):
    """The second copy of the header overwritten by blocks `first` and later."""
    copies = data[offsets[first] : offsets[3]]
    half = offsets[0] // 2
    assert len(copies) < half
    return data[:half] + copies.ljust(half, b"\0") + data[offsets[0] :]


@pytest.mark.parametrize("first", [0, 1, 2])
def test_blocks_in_their_own_place_win_over_copies(made, first):
    data, entries, offsets = made
    reader = TraceReader(io.BytesIO(spliced(data, offsets, first=first)), vocabulary=VOCABULARY)
    assert list(reader) == entries
    assert all(loss.entries == 0 for loss in reader.check())
    assert list(reader) == entries


def test_a_copy_stands_in_for_a_block_that_is_broken_in_its_own_place(made):
    data, entries, offsets = made
    damaged = bytearray(spliced(data, offsets, first=0))
    damaged[offsets[1] - 1] ^= 1
    reader = TraceReader(io.BytesIO(bytes(damaged)), vocabulary=VOCABULARY)
    assert list(reader) == entries
    assert all(loss.entries == 0 for loss in reader.check())


def test_a_copy_of_a_broken_block_does_not_cost_the_one_before_it(made):
    """A file in order: block 0 stands in its own place, behind the only intact copy of block 1."""
    data, entries, offsets = made
    damaged = bytearray(spliced(data, offsets, first=1))
    damaged[offsets[2] - 1] ^= 1
    reader = TraceReader(io.BytesIO(bytes(damaged)), vocabulary=VOCABULARY)
    assert list(reader.numbered()) == [(0, entries[0]), (2, entries[2])]
    assert [(loss.first_entry, loss.entries) for loss in reader.check() if loss.entries] == [(1, 1)]
    assert list(reader.numbered()) == [(0, entries[0]), (2, entries[2])]
