from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.errors import CampaignError
from sevlab.core.events import KERNEL_RECORDS, Party
from sevlab.core.hookspecs import hookimpl
from sevlab.core.oracle import Target
from sevlab.core.plugins import load
from sevlab.core.vocabulary import spec_of
from sevlab.fuzz.runner import Runner
from sevlab.fuzz.targets import KERNEL, all_targets, target_named

from tests.vectors import ROOT

RUNNER = Runner(KERNEL)


@given(st.binary(max_size=200))
def test_any_bytes_run_on_the_kernel_without_a_finding(data):
    assert RUNNER.run_bytes(data).findings == ()


def test_the_kernel_target_has_every_step_of_the_kernel():
    assert set(KERNEL.steps) == {spec_of(record).kind for record in KERNEL_RECORDS if spec_of(record).is_step}


def test_an_unknown_target_is_named_with_those_there_are():
    with pytest.raises(CampaignError, match=r"no target 'frob'; there are .*kernel"):
        target_named("frob")


def test_two_targets_of_one_name_are_refused():
    twin = ModuleType("twin", "A plugin with a target that exists.")
    twin.sevlab_targets = hookimpl(sevlab_targets)
    with pytest.raises(CampaignError, match="'twin' brings a target 'kernel'"):
        all_targets(load(["twin"], given={"twin": twin}))


def sevlab_targets():
    return (Target("kernel", Party.GUEST, (), (), ()),)


@pytest.mark.parametrize("name", sorted(all_targets()))
def test_every_target_takes_its_seeds_and_a_few_mutations_without_a_finding(name):
    runner = Runner(target_named(name), seed=5)
    seeds = runner.seeds()
    inputs = [*seeds, *(runner.mutator.fresh() for _ in range(10))]
    inputs += [runner.mutator.mutate(steps) for steps in inputs]
    booted = runner.machine.snapshot()
    for steps in inputs:
        assert runner.codec.decode(runner.codec.encode(steps)) == tuple(steps)
        assert runner.run(steps, learn=True).findings == ()
    assert runner.machine.snapshot() == booted
    assert runner.feedback.reached


def test_every_target_has_a_harness_of_less_than_sixty_lines():
    for name in all_targets():
        harness = ROOT / "fuzz" / f"{name.replace('.', '_')}_fuzzer.py"
        assert len(harness.read_text().splitlines()) < 60


def test_the_same_seed_gives_the_same_mutations():
    made = [[Runner(KERNEL, seed=3).mutator.fresh() for _ in range(3)] for _ in range(2)]
    assert made[0] == made[1]


@pytest.mark.long
@pytest.mark.parametrize("name", ["kernel"])
def test_atheris_finds_nothing(name, tmp_path):
    pytest.importorskip("atheris")
    command = [sys.executable, "-m", f"sevlab.fuzz.{name}_fuzzer", "-max_total_time=20", "-seed=1", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    tail = result.stderr[-3000:]
    assert result.returncode == 0, tail
    assert "cov:" in tail, "no coverage: the instrumentation does not work"
    assert len(list(tmp_path.iterdir())) > 10, "the corpus did not grow"
