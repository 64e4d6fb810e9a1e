"""Every seeded bug: reached, triggered and seen when live; silent in watch mode; absent without the option."""

from __future__ import annotations

import pytest
from sevlab.core.errors import ConfigError
from sevlab.core.oracle import OracleSink
from sevlab.core.plugins import load
from sevlab.core.testing import make_machine
from sevlab.plugins.seeded import BUGS, seeded_state

from tests.plugins.seeded.triggers import GIVEN, TRIGGERS

ALL = sorted(BUGS)
EXCEPTIONS = sorted(name for name, bug in BUGS.items() if bug.oracle in ("invariant", "crash"))

RACING = ("S03", "S04")


def run(name, bugs, mode="live"):
    """(outcomes, (findings, crash), canary, machine) of the bug's trigger."""
    build, act = TRIGGERS[name]
    machine = build({"seeded": {"bugs": bugs, "mode": mode}})
    sink = machine.sink = OracleSink()
    outcomes, apply = [], machine.apply

    def heard(step):
        outcomes.append(apply(step))
        return outcomes[-1]

    machine.apply = heard
    crash = ""
    try:
        act(machine)
    except AttributeError as error:
        assert (bool(bugs), BUGS[name].oracle) == (True, "crash")
        crash = str(error)
    counts = seeded_state(machine).canaries[name] if bugs else None
    return outcomes, (sink.findings, crash), counts, machine


def state_of(machine):
    """The machine's state but for the canaries."""
    state, memory = machine.snapshot()
    (components,) = [image for name, image in state.values if name == "components"]
    others = [(name, image) for name, image in state.values if name != "components"]
    return others, [(name, image) for name, image in components.values if name != "seeded"], memory


def test_there_are_twenty_four():
    assert [f"S{number:02}" for number in range(1, 25)] == ALL


@pytest.mark.parametrize("name", ALL)
def test_a_live_bug_is_reached_triggered_and_changes_what_happens(name):
    outcomes, said, counts, machine = run(name, name)
    assert (counts.reached > 0, counts.triggered > 0) == (True, True)
    clean_outcomes, clean_said, _, clean = run(name, "")
    assert clean_said == ([], "")
    assert (outcomes, said, state_of(machine)) != (clean_outcomes, clean_said, state_of(clean))


@pytest.mark.parametrize("name", ALL)
def test_in_watch_mode_it_counts_and_behaves_correctly(name):
    outcomes, said, counts, machine = run(name, name if name in RACING else "all", "watch")
    assert (counts.reached > 0, counts.triggered > 0) == (True, True)
    clean_outcomes, clean_said, _, clean = run(name, "")
    if name in RACING:  # the clean build has no second fetch at which the other party could write
        assert said == ([], "")
        return
    assert (outcomes, said, state_of(machine)) == (clean_outcomes, clean_said, state_of(clean))


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_bounds_and_crashes_are_seen_without_any_oracle(name):
    _, (findings, crash), _, _ = run(name, name)
    assert bool(findings) is (BUGS[name].oracle == "invariant")
    assert bool(crash) is (BUGS[name].oracle == "crash")


def test_without_the_option_the_machine_is_the_same_as_without_the_plugin():
    features = ("io", "sme", "sev", "sev_es", "snp", "xen")
    plain, planted = make_machine(*features, guests=1), make_machine("seeded", guests=1)
    assert planted.snapshot() == plain.snapshot()
    for name, table in plain.tables._asdict().items():
        other = getattr(planted.tables, name)
        assert [w[:2] for w in table] == [w[:2] for w in other] if name == "mmio" else list(table) == list(other)
    assert "seeded" not in planted.components
    names = [set(one.components) for one in (plain, planted)]
    assert names[0] == names[1]


def test_handlers_are_untouched_without_the_option():
    def handlers(machine):
        return [machine.tables.nae_events[code].handler for code in sorted(machine.tables.nae_events)]

    assert handlers(make_machine("seeded")) == handlers(make_machine("sev_es", "snp", "io", "xen"))


@pytest.mark.parametrize("names", ["S99", "S01,nothing", "all,S01"])
def test_a_bug_that_there_is_not_is_named(names):
    with pytest.raises(ConfigError, match=r"plugin\.seeded\.bugs: '.*': expected all, or names of S01, "):
        make_machine("seeded", options={"seeded": {"bugs": names}})


def test_only_the_bugs_that_are_named_are_planted():
    machine = make_machine("seeded", options={"seeded": {"bugs": "S02, S05"}})
    assert sorted(seeded_state(machine).canaries) == ["S02", "S05"]


def test_a_reset_clears_the_canaries():
    _, _, counts, machine = run("S02", "S02")
    assert counts.triggered == 1
    machine.reset()
    assert seeded_state(machine).canaries["S02"].triggered == 0


def test_every_bug_says_what_is_left_out_and_its_source():
    canaries = load(["seeded"], given=GIVEN).call("sevlab_canaries")["seeded"]
    assert [canary.bug for canary in canaries] == ALL
    assert all("Source: " in canary.documentation and canary.oracle for canary in canaries)
