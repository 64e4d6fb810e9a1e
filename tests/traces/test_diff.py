from __future__ import annotations

import io

import pytest
from sevlab.core import events as ev
from sevlab.core.config import MachineConfig
from sevlab.traces.compare import first_difference
from sevlab.traces.diff import diff, header_differences
from sevlab.traces.reader import TraceReader
from sevlab.traces.schema import Entry, Header
from sevlab.traces.writer import TraceWriter

BASE = [Entry(n, n % 2, ev.AdvanceClock(n), (ev.Done(), ev.Value(n))) for n in range(10)]


def trace(entries, *, block_bytes=1 << 20, **config) -> TraceReader:
    file = io.BytesIO()
    header = Header(config=MachineConfig(plugins=("sme",), **config))
    with TraceWriter(file, header, block_bytes=block_bytes) as writer:
        for entry in entries:
            writer.append(entry)
    return TraceReader(file)


def changed(number, **fields):
    return [entry._replace(**fields) if n == number else entry for n, entry in enumerate(BASE)]


def test_equal_traces_do_not_part():
    assert diff(trace(BASE), trace(BASE)) is None


def test_times_are_not_compared():
    assert diff(trace(BASE), trace(changed(3, time_ns=77))) is None


@pytest.mark.parametrize(
    ("other", "number", "what"),
    [
        (changed(4, step=ev.AdvanceClock(0x99)), 4, "step advance.ticks: 4 and 0x99"),
        (changed(4, step=ev.Schedule()), 4, "step advance and schedule"),
        (changed(4, vcpu=7), 4, "vCPU 0 and 7"),
        (
            changed(9, outcome=(ev.Done(), ev.Value(8))),
            9,
            "outcome, record 1, value.value: expected 9, found 8",
        ),
        (changed(0, outcome=(ev.Done(),)), 0, "outcome, record 1: expected value(value=0), found nothing"),
        (BASE[:6], 6, "the second trace ends"),
        ([*BASE, BASE[0]], 10, "the first trace ends"),
    ],
)
def test_the_first_difference_is_named_with_its_context(other, number, what):
    parting = diff(trace(BASE), trace(other), context=2)
    assert (parting.number, parting.what) == (number, what)
    assert list(parting.before) == list(enumerate(BASE))[max(0, number - 2) : number]
    assert list(parting.left) == list(enumerate(BASE))[number : number + 3]
    assert list(parting.right) == list(enumerate(other))[number : number + 3]


def test_lost_entries_are_a_difference():
    whole = trace(BASE, block_bytes=10)
    data = bytearray(whole._file.getvalue())
    data[whole.index.blocks[2].offset + 80] ^= 1
    block = whole.index.blocks[2]
    parting = diff(whole, TraceReader(io.BytesIO(bytes(data))))
    assert parting.number == block.first_entry
    assert parting.what == f"entries {block.first_entry} to {block.end - 1} of the second trace are lost"


def test_headers_are_compared_by_machine():
    assert header_differences(trace(BASE), trace(BASE)) == []
    assert header_differences(trace(BASE), trace(BASE, seed=b"x")) == [r"seed: b'\x00' and b'x'"]


def test_derived_fields_are_not_compared():
    assert first_difference((ev.Resumed(0, 5),), (ev.Resumed(1, 5),)) is None
    assert first_difference((ev.Resumed(0, 5),), (ev.Resumed(0, 6),)).field == "rip"
    assert first_difference((ev.Value(5),), (ev.Data(b"x"),)).field == ""
