"""The benchmark's statistics against values worked out by hand, and a small run of the benchmark itself."""

from __future__ import annotations

import pytest

from tests.bench.survival import a12, bootstrap, kaplan_meier, mean_ratio, restricted_mean
from tests.bench.time_to_bug import TARGET_OF, main, open_database


def test_the_curve_falls_by_the_share_of_those_at_risk():
    assert kaplan_meier([1, 3, None, None], 10) == [(0.0, 1.0), (1, 0.75), (3, 0.5)]


def test_a_trial_without_the_event_counts_to_the_cap():
    assert restricted_mean([1, 3, None, None], 10) == pytest.approx((1 + 3 + 10 + 10) / 4)
    assert restricted_mean([None], 10) == 10


def test_effect_size():
    assert a12([1, 2], [3, None]) == 1
    assert a12([None], [None]) == 0.5
    assert a12([5], [1, 9]) == 0.5


def test_the_mean_of_ratios_is_geometric_and_its_interval_holds_it():
    pairs = [([1, 1], [4, 4]), ([2, 2], [2, 2])]
    assert mean_ratio(pairs, 10) == pytest.approx(2)
    low, high = bootstrap(pairs, 10)
    assert low == pytest.approx(1)
    assert high == pytest.approx(4)


def test_every_bug_has_a_target():
    assert sorted(TARGET_OF) == [f"S{number:02}" for number in range(1, 25)]


@pytest.mark.long
def test_a_small_benchmark_runs_resumes_and_reports(tmp_path):
    words = ["run", "--database", str(tmp_path / "b.sqlite"), "--bugs", "S13", "--trials", "2", "--seconds", "3"]
    words += ["--arms", "P0,P1,P2,P3,P3-state,P3-grammar,P3-seeds"]
    main(words)
    database = open_database(tmp_path / "b.sqlite")
    assert database.execute("select count(*), min(runs) > 0 from trial").fetchone() == (14, 1)
    rows = database.execute("select * from trial order by 1, 2, 3, 4, 5").fetchall()
    main(words)
    assert database.execute("select * from trial order by 1, 2, 3, 4, 5").fetchall() == rows
    main(["report", "--database", str(tmp_path / "b.sqlite"), "--output", str(tmp_path / "page.md")])
    assert "| S13 hcall-mask |" in (tmp_path / "page.md").read_text()
