"""Targets name steps and oracles that exist; the oracles are silent on honest runs and see what they are for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sevlab.core.events import Done, Schedule, Stopped, VmExit
from sevlab.core.memory import TAG_ASP
from sevlab.core.oracle import OracleSink
from sevlab.core.testing import step_strategy
from sevlab.core.vocabulary import Outcome
from sevlab.fuzz.feedback import words_of
from sevlab.fuzz.runner import Runner
from sevlab.fuzz.targets import target_named
from sevlab.plugins.sev_es import GhcbRequest, NaeCode
from sevlab.plugins.snp.context import SnpGuest
from sevlab.plugins.snp.fuzzing import COUNTERS
from sevlab.plugins.snp.oracles import ORACLES, ContextOwnership, FirmwareWrites, PscProgress
from sevlab.plugins.snp.psc import PscEntryValue, PscHeader, PscOperation, build_psc
from sevlab.plugins.snp.records import SetPages
from sevlab.plugins.snp.rmp import entry_address
from sevlab.plugins.snp.states import snp_state
from sevlab.plugins.snp.targets import TARGETS

from tests.plugins.snp.support import GHCB_GPA, MIB, PRIVATE_GPA, SECRETS_GPA, SHARED_GPA, context, talking_machine
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
    names = {oracle.name for oracle in ORACLES} | {"sev_es.vcpu"}
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


def test_an_asid_of_two_guests_is_seen(shared, machine):
    oracle = ContextOwnership()
    assert oracle.step_end(machine, ASK, Outcome(())) == ()
    guests = snp_state(machine).platform.guests
    guests[0x1000] = SnpGuest(gctx_spa=0x1000, asid=context(machine, shared[1]).asid)
    assert [finding.rule for finding in oracle.step_end(machine, ASK, Outcome(()))] == ["asid"]


@pytest.mark.parametrize(("gpa", "key_of_guest", "wrong"), [(PRIVATE_GPA, False, True), (PRIVATE_GPA, True, False),
                                                           (SHARED_GPA, False, False)])  # fmt: skip
def test_the_firmware_writes_to_no_validated_page_of_a_guest(gpa, key_of_guest, wrong, shared, machine):
    guest = context(machine, shared[1])
    spa = machine.hypervisor.vms[0].memory_spa + gpa
    machine.memory.write(spa + 8, b"firmware", guest.key(machine) if key_of_guest else None, TAG_ASP)
    assert bool(FirmwareWrites().sequence_end(machine)) is wrong


def psc(current, end, pages=2):
    entries = tuple(PscEntryValue(PRIVATE_GPA >> 12 | number, PscOperation.SHARED) for number in range(pages))
    data = PscHeader.build(cur_entry=current, end_entry=end) + build_psc(entries)[8:]
    return GhcbRequest(0, NaeCode.SNP_PAGE_STATE_CHANGE, 0, 0, bytes(16), (), data)


@pytest.mark.parametrize(
    ("requests", "rule"),
    [
        ((psc(0, 1), psc(1, 1)), None),
        ((psc(1, 1), psc(0, 1)), "backwards"),
        ((psc(0, 1), psc(0, 5)), "end"),
        ((psc(0, 1), psc(0, 0, 1)), None),
    ],
)
def test_progress_of_a_page_state_change_is_watched(requests, rule, machine):
    found = PscProgress().step_end(machine, SetPages(0, PRIVATE_GPA, 2, 0, False), Outcome(requests))
    assert [finding.rule for finding in found] == ([] if rule is None else [rule])


def test_done_needs_a_reply_that_says_so(machine):
    step = SetPages(0, PRIVATE_GPA, 2, 0, False)
    outcome = machine.apply(step)
    assert Done() in outcome.records
    assert PscProgress().step_end(machine, step, outcome) == ()
    spa = machine.hypervisor.vms[0].memory_spa + GHCB_GPA + 0x800
    machine.memory.write(spa, b"\x01\x00", None, 1)
    assert [finding.rule for finding in PscProgress().step_end(machine, step, outcome)] == ["undone"]


def test_targets_boot_guests_that_run_and_their_seeds_are_served():
    for target in TARGETS:
        runner = Runner(target)
        assert 0 in runner.machine.components["snp.hypervisor"].guests, target.name
        seeds = runner.seeds()
        assert seeds, target.name
        for steps in seeds:
            ran = runner.run(steps)
            assert (ran.steps, ran.findings) == (len(steps), ())


def test_a_vcpu_that_was_destroyed_stays_asleep_whatever_wakes_it():
    machine = Runner(target_named("snp.psc")).machine
    vcpu = machine.vcpus[1]
    assert vcpu.vmcb.vmsa_pa == 0
    vcpu.halted = False
    outcome = machine.apply(Schedule()).records + machine.apply(Schedule()).records
    assert vcpu.halted
    assert not any(isinstance(record, (Stopped, VmExit)) for record in outcome)


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
