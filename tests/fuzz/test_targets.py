from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.testing import make_machine
from sevlab.core.vocabulary import spec_of
from sevlab.fuzz.targets import MAX_STEPS, decode_steps, kernel_target

VOCABULARY = make_machine("sme").vocabulary
TARGET = kernel_target(("sme",))


@given(st.binary(max_size=200))
def test_any_bytes_are_steps_and_run(data):
    steps = decode_steps(data, VOCABULARY)
    assert bool(steps) == bool(data)
    assert len(steps) <= MAX_STEPS
    TARGET(data)


def test_every_kind_of_step_can_be_reached():
    reached = {spec_of(decode_steps(bytes([kind]), VOCABULARY)[0]).kind for kind in range(256)}
    assert reached == {kind for kind, record in VOCABULARY.kinds.items() if spec_of(record).is_step}


@pytest.mark.long
def test_atheris_finds_nothing_in_a_minute(tmp_path):
    pytest.importorskip("atheris")
    command = [sys.executable, "-m", "sevlab.fuzz.kernel_fuzzer", "-max_total_time=60", "-seed=1", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    tail = result.stderr[-3000:]
    assert result.returncode == 0, tail
    assert "cov:" in tail, "no coverage: the instrumentation does not work"
    assert len(list(tmp_path.iterdir())) > 10, "the corpus did not grow"
