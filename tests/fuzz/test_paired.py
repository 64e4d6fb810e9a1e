from __future__ import annotations

from sevlab.core.events import AdvanceClock, Value
from sevlab.fuzz.paired import Paired, fill_invalid
from sevlab.fuzz.runner import Runner
from sevlab.fuzz.targets import target_named
from sevlab.plugins.sev_es import Ghcb, Vmgexit
from sevlab.plugins.sev_es.fuzzing import GHCB_GPA

CPUID = Vmgexit(0, GHCB_GPA, Ghcb.build(sw_exit_code=0x72, sw_exit_info_1=0, sw_exit_info_2=0, rax=0, rcx=0))


def test_fields_without_their_valid_bit_are_filled_and_no_others():
    page = Ghcb.build(sw_exit_code=0x72, rax=7)
    filled = Ghcb.from_bytes(fill_invalid(Ghcb, page, 0x5A))
    assert (filled.rax, filled.sw_exit_code) == (7, 0x72)
    assert filled.to_bytes()[0x318:0x320] == b"\x5a" * 8
    assert not filled.is_valid("rbx")


def test_an_answer_that_uses_what_is_not_valid_is_found():
    runner = Runner(target_named("ghcb"))
    paired = Paired(runner)
    assert paired.judge((CPUID,)) == ()
    serve = runner.machine.tables.steps[Vmgexit]

    def leaks(machine, step):
        serve(machine, step)
        machine.emit(Value(int.from_bytes(step.page[0x318:0x320], "little")))

    runner.machine.tables.steps[Vmgexit] = leaks
    (finding,) = paired.judge((CPUID,))
    assert (finding.oracle, finding.rule, finding.handler) == ("non-interference", "invalid-data", "sev_es.vmgexit")
    assert "value.value is 0 and" in finding.message


def test_what_a_run_leaves_behind_is_found():
    runner = Runner(target_named("kernel"))
    paired = Paired(runner)
    assert paired.judge((AdvanceClock(1),)) == ()
    kept = []

    def remembers(machine, step):
        kept.append(step)
        machine.emit(Value(len(kept)))

    runner.machine.tables.steps[AdvanceClock] = remembers
    (finding,) = paired.judge((AdvanceClock(1),))
    assert (finding.oracle, finding.rule) == ("differential", "second-run")


def test_a_code_that_is_not_valid_may_be_repeated_but_not_used():
    runner = Runner(target_named("ghcb"))
    page = Ghcb.build(sw_exit_info_1=0, sw_exit_info_2=0)
    assert Paired(runner).judge((Vmgexit(0, GHCB_GPA, page),)) == ()


def test_what_leaves_the_model_ends_both_runs_and_is_no_difference():
    runner = Runner(target_named("kernel"))

    def breaks(machine, step):
        machine.emit(Value(1))
        raise ZeroDivisionError

    runner.machine.tables.steps[AdvanceClock] = breaks
    assert Paired(runner).judge((AdvanceClock(1),)) == ()
    assert [finding.rule for finding in runner.run((AdvanceClock(1),)).findings] == ["ZeroDivisionError"]
    runner.machine.tables.steps[AdvanceClock] = lambda machine, step: machine.emit(Value(2))
    outcomes = []
    runner.run((AdvanceClock(1),), told=lambda _step, outcome: outcomes.append(outcome.records))
    assert outcomes == [(Value(2),)]  # nothing is left of the step that broke
