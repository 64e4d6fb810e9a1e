from __future__ import annotations

import io
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.errors import InvariantViolation
from sevlab.fuzz.import_targets import IMPORTERS
from sevlab.fuzz.trace_targets import BLOCK, ENTRIES, FILE, STATE, STORED, account, seeds, trace_target
from sevlab.traces.reader import TraceReader

TARGET = trace_target()
SEEDS = list(seeds())


@given(st.binary(max_size=200))
def test_any_bytes_are_entries_or_a_refusal(data):
    TARGET(data)


@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(1, 1 << 16), st.integers(0, 255)), max_size=4))
def test_damaged_seeds_are_accounted_for(seed, changes):
    data = bytearray(seed)
    for at, value in changes:
        data[at % len(data)] = value
    TARGET(bytes(data))


def test_there_is_a_seed_of_each_kind():
    assert {seed[0] for seed in SEEDS} == {FILE, BLOCK, STORED, STATE}
    assert list(TraceReader(io.BytesIO(SEEDS[0][1:]))) == list(ENTRIES)


def test_a_false_account_is_a_violation():
    reader = TraceReader(io.BytesIO(SEEDS[0][1:]))
    account(reader)
    readings = iter((list(enumerate(ENTRIES)), []))
    reader.numbered = lambda: iter(next(readings))
    with pytest.raises(InvariantViolation, match="two readings differ"):
        account(reader)


@pytest.mark.long
@pytest.mark.parametrize("name", ["", *IMPORTERS])
def test_atheris_finds_nothing_in_five_minutes_in_total(tmp_path, name):
    pytest.importorskip("atheris")
    command = [sys.executable, "-m", "sevlab.fuzz.trace_fuzzer", *([name] if name else [])]
    subprocess.run([*command, "--seeds", str(tmp_path)], check=True)
    before = len(list(tmp_path.iterdir()))
    assert before >= 1
    seconds = 60 if not name else 240 // len(IMPORTERS)
    options = [f"-max_total_time={seconds}", "-seed=1", "-rss_limit_mb=600", "-timeout=10", "-max_len=8192"]
    result = subprocess.run(
        [*command, *options, str(tmp_path)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "cov:" in result.stderr, "no coverage: the instrumentation does not work"
    assert len(list(tmp_path.iterdir())) > before + 10, "the corpus did not grow"
