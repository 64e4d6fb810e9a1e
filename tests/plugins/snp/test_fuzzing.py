"""Targets name steps and oracles that exist; the oracles are silent on honest runs and see what they are for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sevlab.core.oracle import OracleSink
from sevlab.core.testing import step_strategy
from sevlab.fuzz.feedback import words_of
from sevlab.plugins.snp.fuzzing import COUNTERS, ORACLES, TARGETS
from sevlab.plugins.snp.rmp import entry_address
from sevlab.plugins.snp.states import snp_state

from tests.plugins.snp.support import MIB, PRIVATE_GPA, SECRETS_GPA, SHARED_GPA, context, talking_machine
from tests.plugins.snp.test_hostile import ASK


@pytest.fixture(scope="module")
def shared():
    machine, (guest,) = talking_machine(memory=4 * MIB, memory_bytes=32 * MIB)
    return machine, guest


@pytest.fixture
def machine(shared):
    shared[0].reset()
    shared[0].sink = None
    return shared[0]


def test_targets_name_steps_and_oracles(machine):
    names = {oracle.name for oracle in ORACLES}
    for target in TARGETS:
        assert set(target.steps) <= set(machine.vocabulary.kinds), target.name
        assert set(target.oracles) <= names


def test_counters_read_short_tuples(machine):
    for counter in COUNTERS:
        values = words_of(counter, counter.read(machine))
        assert values
        assert all(isinstance(value, str) and len(value) < 80 for value in values)


def test_an_honest_run_is_silent(machine):
    machine.sink = OracleSink(ORACLES)
    for _ in range(3):
        machine.apply(ASK)
    assert machine.sink.sequence_end(machine) == ()


def test_a_counter_that_went_back_is_seen(shared, machine):
    machine.sink = OracleSink(ORACLES)
    context(machine, shared[1]).message_counts = (1, 0, 0, 0)
    machine.apply(ASK._replace(vmpck=1))
    assert {finding.oracle for finding in machine.sink.findings} == {"snp.sequence"}


def test_a_table_that_disagrees_is_seen(shared, machine):
    machine.sink = OracleSink(ORACLES)
    spa = machine.hypervisor.vms[0].memory_spa + PRIVATE_GPA
    machine.memory.write(entry_address(machine, spa), bytes(16), None, 2)
    assert {finding.rule for finding in machine.sink.sequence_end(machine)} == {"counter"}
    machine.memory.write(entry_address(machine, shared[1].gctx_spa), bytes(16), None, 2)
    machine.apply(ASK)
    assert "state" in {finding.rule for finding in machine.sink.findings}


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_step_raises_and_no_oracle_fires(shared, data):
    machine = shared[0]
    machine.reset()
    machine.sink = OracleSink(ORACLES)
    places = (SECRETS_GPA, SHARED_GPA, PRIVATE_GPA, snp_state(machine).rmp_base)
    steps = data.draw(st.lists(step_strategy(machine.vocabulary), min_size=1, max_size=8))
    for step in steps:
        spec = type(step).SPEC
        numbers = [n for n, field in enumerate(spec.fields) if field.type is int]
        if numbers and data.draw(st.booleans()):
            place = data.draw(st.sampled_from(places))
            chosen = data.draw(st.sampled_from(numbers))
            step = type(step)(*(place if n == chosen else value for n, value in enumerate(step)))
        machine.apply(step)
    findings = machine.sink.sequence_end(machine)
    assert [finding for finding in findings if finding.oracle.startswith("snp.")] == []
    machine.sink = None
