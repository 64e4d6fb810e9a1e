from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
from sevlab.core.config import GuestConfig
from sevlab.core.events import AdvanceClock, Done, MemoryWrite, Party, SetRegisters, Space, Value
from sevlab.core.hookspecs import hookimpl
from sevlab.core.machine import Machine
from sevlab.core.oracle import StateCounter, Target
from sevlab.core.vocabulary import Outcome
from sevlab.fuzz import feedback as module
from sevlab.fuzz.feedback import Coordinate, Edge
from sevlab.fuzz.runner import Runner

from tests.vectors import ROOT

DONE = Outcome((Done(),))
WATCHED_SPA = 0x4000
LOOKED: list[str] = []


def _clock(machine: Machine):
    LOOKED.append("clock")
    return (machine.clock.tsc,)


def _page(machine: Machine):
    LOOKED.append("page")
    return (machine.memory.read(WATCHED_SPA, 1, None)[0],)


def sevlab_state_counters():
    return (
        StateCounter("clock", _clock, lambda raw: ("late" if raw[0] >= 100 else "early",), lambda m: (m.clock,)),
        StateCounter("page", _page, of=lambda _machine: (WATCHED_SPA >> 12,)),
    )


@pytest.fixture
def runner():
    plugin = ModuleType("watching", "A plugin with two state machines.")
    plugin.REQUIRES = ()
    plugin.sevlab_state_counters = hookimpl(sevlab_state_counters)
    steps = ("advance", "registers", "write")
    runner = Runner(
        Target("t", Party.HYPERVISOR, steps, (), (), guests=(GuestConfig(name="one"),)), given={"watching": plugin}
    )
    LOOKED.clear()
    return runner


def write(value):
    return MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, WATCHED_SPA, False, bytes((value,)))


def test_what_is_new_counts_once(runner):
    assert runner.run((AdvanceClock(1),)).new
    assert not runner.run((AdvanceClock(1),)).new
    assert not runner.run((AdvanceClock(2),)).new  # other words would be needed
    assert runner.run((AdvanceClock(200),)).new
    assert not runner.run((AdvanceClock(300),)).new


def test_a_change_of_state_is_an_edge_and_both_ends_are_states(runner):
    runner.run((AdvanceClock(200),))
    assert runner.feedback.edges == {Edge("clock", ("early",), ("late",))}
    assert {("clock", ("early",)), ("clock", ("late",))} <= runner.feedback.states


def test_the_same_step_in_another_state_is_new(runner):
    runner.run((AdvanceClock(1), AdvanceClock(200)))
    assert runner.run((AdvanceClock(200), AdvanceClock(1))).new
    assert {key.state for key in runner.feedback.coordinates if key.machine == "clock"} == {("early",), ("late",)}


def test_what_has_not_changed_is_not_read(runner):
    runner.run((SetRegisters(0, (("rax", 1),)),) * 3)
    assert LOOKED == []
    runner.run((AdvanceClock(1), AdvanceClock(1)))
    assert set(LOOKED) == {"clock"}
    LOOKED.clear()
    runner.run((write(7), SetRegisters(0, (("rax", 1),))))
    assert LOOKED == ["page", "page"]
    assert ("page", ("7",)) in runner.feedback.states


def test_a_reset_returns_to_the_booted_state(runner):
    runner.run((AdvanceClock(200), write(7)))
    LOOKED.clear()
    runner.run((SetRegisters(0, (("rax", 1),)),))
    assert LOOKED == []
    assert ("clock", ("early",), "registers") in {key[:3] for key in runner.feedback.coordinates}


def test_numbers_of_results_count_exactly_when_small_and_by_length_when_large(runner):
    step, feedback = AdvanceClock(1), runner.feedback
    assert feedback.step(step, Outcome((Value(1),)))
    assert feedback.step(step, Outcome((Value(2),)))
    assert feedback.step(step, Outcome((Value(1 << 40),)))
    assert not feedback.step(step, Outcome((Value((1 << 40) + 1),)))


def test_what_is_forgotten_is_not_new_again(runner, monkeypatch):
    monkeypatch.setattr(module, "MAX_REMEMBERED", 4)
    for tsc in range(10):
        runner.run((AdvanceClock(tsc), SetRegisters(0, (("rax", tsc),))))
    reached = dict(runner.feedback.reached)
    for tsc in range(10):
        assert not runner.run((AdvanceClock(tsc),)).new
    assert runner.feedback.reached == reached


def test_without_state_machines_messages_and_results_count():
    runner = Runner(Target("t", Party.HYPERVISOR, ("advance",), (), ()))
    assert runner.feedback.step(AdvanceClock(1), DONE) == 1
    assert list(runner.feedback.coordinates) == [Coordinate("", (), "advance", (("done",),))]
    assert runner.feedback.state_words == ""


SCRIPT = """
import sys
from sevlab.fuzz.atheris_engine import AtherisEngine
from sevlab.fuzz.engine import Budget
from sevlab.fuzz.runner import Runner
from sevlab.fuzz.targets import target_named
runner = Runner(target_named("kernel"))
AtherisEngine().fuzz(runner, [], Budget(runs=400), lambda steps, run: True)
"""


@pytest.mark.slow
def test_libfuzzer_keeps_inputs_for_their_states_alone():
    """Nothing is instrumented here: without our counters libFuzzer's corpus has one input."""
    pytest.importorskip("atheris")
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-2000:]
    last = next(line for line in ran.stderr.splitlines() if "DONE" in line)
    assert int(last.split("corp: ")[1].split("/")[0]) > 20, last
