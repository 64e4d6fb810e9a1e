"""Every seeded bug is seen by an oracle that knows nothing of it, and all of them are silent on the clean build."""

from __future__ import annotations

from functools import cache

import pytest
from sevlab.core.events import Party
from sevlab.core.listening import listening
from sevlab.core.oracle import Target
from sevlab.core.vocabulary import spec_of
from sevlab.fuzz.paired import Paired
from sevlab.fuzz.runner import Runner
from sevlab.plugins.seeded import BUGS

from tests.plugins.seeded.triggers import GIVEN, TRIGGERS

SEEN_BY = {
    "S01": ("invariant", "buffer.bounds"),
    "S02": ("invariant", "buffer.bounds"),
    "S03": ("single-fetch", "twice"),
    "S04": ("single-fetch", "twice"),
    "S05": ("invariant", "buffer.bounds"),
    "S06": ("crash", "AttributeError"),
    "S07": ("sev_es.vcpu", "xcr0"),
    "S08": ("sev_es.vcpu", "vmsa"),
    "S09": ("non-interference", "invalid-data"),
    "S10": ("invariant", "buffer.poison"),
    "S11": ("invariant", "buffer.bounds"),
    "S12": ("invariant", "buffer.bounds"),
    "S13": ("invariant", "buffer.bounds"),
    "S14": ("sev_es.provenance", "privilege"),
    "S15": ("sev_es.provenance", "opcode"),
    "S16": ("sev_es.event", "type"),
    "S17": ("sev_es.private-mmio", "private"),
    "S18": ("snp.psc", "undone"),
    "S19": ("snp.firmware-writes", "owner"),
    "S20": ("invariant", "buffer.bounds"),
    "S21": ("snp.contexts", "asid"),
    "S22": ("invariant", "buffer.poison"),
    "S23": ("invariant", "crypto.point"),
    "S24": ("sev.balance", "context"),
}
"""The oracle and the rule that the trigger of each bug breaks."""


def all_oracles(plugins):
    return tuple(oracle for found in plugins.call("sevlab_oracles").values() for oracle in found)


@cache
def trigger(name):
    """(the machine before the trigger, its snapshot, the steps), of the clean build."""
    build, act = TRIGGERS[name]
    machine = build({})
    before, steps = machine.snapshot(), []
    with listening(machine, lambda step, _outcome: steps.append(step)):
        act(machine)
    return machine, before, tuple(steps)


def runner_of(name, bugs):
    """A runner whose inputs begin where the trigger begins, with every oracle there is; `bugs` are live."""
    machine, before, _ = trigger(name)
    if bugs:
        build, _ = TRIGGERS[name]
        before = build({"seeded": {"bugs": bugs}}).snapshot()
    kinds = tuple(sorted(spec_of(kind).kind for kind in machine.vocabulary.kinds.values() if spec_of(kind).is_step))
    options = {**machine.config.options, "seeded": {"bugs": bugs}}
    target = Target(
        "trigger", Party.GUEST, kinds, (), machine.config.plugins, guests=machine.config.guests, options=options,
        boot=lambda made: made.restore(before),
    )  # fmt: skip
    runner = Runner(target, given=GIVEN)
    runner.sink.oracles = runner.oracles = all_oracles(runner.plugins)
    return runner


def said(name, bugs):
    """What all oracles say of the trigger, those that need a second run included."""
    runner, (_, _, steps) = runner_of(name, bugs), trigger(name)
    findings = runner.run(steps).findings
    return {(one.oracle, one.rule) for one in findings or Paired(runner).judge(steps)}


def test_every_bug_has_an_oracle_and_names_it():
    assert sorted(SEEN_BY) == sorted(BUGS)
    assert {name: bug.oracle for name, bug in BUGS.items()} == {name: oracle for name, (oracle, _) in SEEN_BY.items()}


@pytest.mark.parametrize("name", sorted(BUGS))
def test_a_live_bug_is_seen(name):
    assert SEEN_BY[name] in said(name, name)


@pytest.mark.parametrize("name", sorted(BUGS))
def test_the_clean_build_is_silent(name):
    assert said(name, "") == set()
