from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core import events as ev
from sevlab.core.errors import ConfigError, InvariantViolation
from sevlab.core.hookspecs import hookimpl
from sevlab.core.testing import make_machine, step_strategy
from sevlab.traces.minimise import drop_items, minimise, simpler, simplify
from sevlab.traces.minimise_trace import Wanted, findings, minimise_divergence, minimise_finding, write_part
from sevlab.traces.reader import TraceReader
from sevlab.traces.record import Recorder
from sevlab.traces.records import State
from sevlab.traces.replay_recorded import replay_recorded
from sevlab.traces.schema import vocabulary_of

VOCABULARY = make_machine("sme").vocabulary


@given(st.lists(st.integers(0, 60), unique=True, min_size=1, max_size=60), st.data())
def test_exactly_the_needed_items_are_left(items, data):
    needed = set(data.draw(st.lists(st.sampled_from(items), min_size=1, unique=True)))
    asked = []

    def shows(part):
        asked.append(part)
        return needed <= set(part)

    assert drop_items(items, shows) == tuple(item for item in items if item in needed)
    assert len(asked) == len(set(asked))


def test_a_hundred_items_for_one_take_few_questions():
    asked = []
    assert drop_items(range(1000), lambda part: asked.append(part) or 700 in part) == (700,)
    assert len(asked) < 60


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(0, 60))
def test_no_single_item_can_go(items, total):
    def shows(part):
        return sum(part) >= total

    if not shows(items):
        return
    left = drop_items(items, shows)
    assert shows(left)
    if len(left) > 1:
        assert not any(shows(left[:n] + left[n + 1 :]) for n in range(len(left)))


@given(step_strategy(VOCABULARY))
def test_a_step_becomes_as_simple_as_its_type_allows(step):
    (simple,) = simplify((step,), lambda _: True)
    assert all(value in {0, b"", "", ()} for value in simple)


@given(st.integers(1, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_a_number_above_a_limit_comes_down_to_it(start, limit):
    step = ev.AdvanceClock(max(start, limit))
    (simple,) = simplify((step,), lambda steps: steps[0].ticks >= limit)
    assert limit <= simple.ticks <= max(2 * limit, 1)


@given(st.binary(max_size=200), st.integers(0, 255))
def test_bytes_keep_only_what_is_needed(data, byte):
    def shows(steps):
        return bytes([byte]) in steps[0].data

    step = ev.MemoryWrite(0, 0, 0, 0, False, data + bytes([byte]))
    (simple,) = simplify((step,), shows)
    assert simple.data == bytes([byte])


@pytest.mark.parametrize("value", [7, 2**64 - 1, True, b"abc\0\1", "text", ((1, "a"), (2, "b"))])
def test_every_candidate_is_simpler_so_that_simplifying_ends(value):
    seen, todo = set(), [value]
    while todo:
        for other in simpler(todo.pop()):
            assert type(other) is type(value)
            assert other != value
            if other not in seen and len(seen) < 2000:
                seen.add(other)
                todo.append(other)


def test_steps_and_fields_go_together():
    steps = [ev.AdvanceClock(n) for n in (5, 900, 3)] + [ev.MemoryWrite(1, 0, 0, 0x5000, True, b"abcdef")] * 4

    def shows(left):
        ticks = sum(step.ticks for step in left if isinstance(step, ev.AdvanceClock))
        return ticks >= 600 and any(isinstance(step, ev.MemoryWrite) and b"c" in step.data for step in left)

    assert minimise(steps, shows) == (ev.AdvanceClock(600), ev.MemoryWrite(0, 0, 0, 0, False, b"c"))


class Breaking:
    """A plugin that breaks an invariant when a clock that passed 40 ticks is scheduled on."""

    REQUIRES = ()

    @staticmethod
    @hookimpl
    def sevlab_register(builder):
        def make(original):
            def handler(machine, step):
                if machine.clock.tsc > 40 and step.data.startswith(b"go"):
                    raise InvariantViolation("late.write", "too late")
                original(machine, step)

            return handler

        builder.steps.replace(ev.MemoryWrite, make)


GIVEN = {"breaking": Breaking}


def recorded(*, poke=False) -> TraceReader:
    machine = make_machine("sme", given=GIVEN, guests=1)
    file = io.BytesIO()
    with Recorder(machine, file):
        for n in range(12):
            machine.apply(ev.AdvanceClock(n))
            machine.apply(ev.HostCpuid(n, 0))
            if poke:
                machine.vcpus[0].regs.rax = n
        with pytest.raises(InvariantViolation):
            machine.apply(ev.MemoryWrite(1, 0, 0, 0x5000, True, b"go on"))
        machine.apply(ev.AdvanceClock(1))
    return TraceReader(file, vocabulary=vocabulary_of(("sme",), GIVEN))


def test_a_finding_is_reduced_to_the_steps_that_show_it():
    reader = recorded()
    assert findings(reader) == [Wanted("invariant", "late.write")]
    entries = minimise_finding(reader, findings(reader)[0], given=GIVEN)
    ticks = [entry.step.ticks for entry in entries[:-1]]
    assert sum(ticks) == 41
    assert len(ticks) <= 6
    assert entries[-1].step == ev.MemoryWrite(0, 0, 0, 0, False, b"go")
    file = io.BytesIO()
    assert write_part(reader, entries, file) == len(entries)
    small = TraceReader(file, vocabulary=vocabulary_of(("sme",), GIVEN))
    assert findings(small) == [Wanted("invariant", "late.write")]
    assert replay_recorded(small, given=GIVEN).divergences == ()


def test_states_in_a_trace_are_dropped_like_steps():
    entries = minimise_finding(recorded(poke=True), Wanted("invariant", "late.write"), given=GIVEN)
    assert {type(entry.step) for entry in entries} <= {State, ev.AdvanceClock, ev.MemoryWrite}
    assert sum(entry.step.ticks for entry in entries if type(entry.step) is ev.AdvanceClock) == 41
    assert type(entries[-1].step) is ev.MemoryWrite


def test_a_finding_that_the_trace_does_not_show_is_refused():
    with pytest.raises(ConfigError, match=r"does not show invariant no\.such; it holds invariant late\.write"):
        minimise_finding(recorded(), Wanted("invariant", "no.such"), given=GIVEN)


def test_a_divergence_keeps_the_entries_that_it_needs():
    machine = make_machine("sme", guests=1)
    file = io.BytesIO()
    with Recorder(machine, file):
        for n in range(30):
            machine.apply(ev.MemoryWrite(1, 0, 0, n << 12, False, bytes([n])))
        machine.apply(ev.MemoryRead(1, 0, 0, 7 << 12, False, 1))
    reader = TraceReader(file)
    entries = list(reader)
    entries[7] = entries[7]._replace(step=entries[7].step._replace(data=b"\x55"))
    changed = io.BytesIO()
    write_part(reader, entries, changed)
    changed = TraceReader(changed)
    (divergence,) = replay_recorded(changed).divergences
    left = minimise_divergence(changed, divergence)
    assert left == [entries[30]]  # without any write it reads 0, which is not what was recorded either
    same_value = replay_recorded(changed).divergences[0].difference
    assert same_value.found == b"\x55"
