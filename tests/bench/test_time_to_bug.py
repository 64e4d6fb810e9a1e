"""The benchmark's statistics against values worked out by hand, and a small run of the benchmark itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.survival import (
    a12,
    bootstrap,
    censored,
    holm,
    kaplan_meier,
    log_rank,
    mann_whitney,
    mann_whitney_u,
    mean_ratio,
    restricted_mean,
)
from tests.bench.time_to_bug import TARGET_OF, main, open_database, page


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


def weeks(words):
    """Times of remission as they are printed: a plus is a patient who was observed so long."""
    return [(int(word.rstrip("+")), not word.endswith("+")) for word in words.split()]


def test_log_rank_of_the_remissions_under_6_mp():
    """Source: Freireich and others 1963, as in Cox 1972; 16.79 is what every textbook of survival analysis has."""
    treated = weeks("6 6 6 6+ 7 9+ 10 10+ 11+ 13 16 17+ 19+ 20+ 22 23 25+ 32+ 32+ 34+ 35+")
    placebo = weeks("1 1 2 2 3 4 4 5 5 8 8 8 8 11 11 12 12 15 17 22 23")
    chi_square, p = log_rank(treated, placebo)
    assert chi_square == pytest.approx(16.79, abs=0.005)
    assert p == pytest.approx(4.17e-5, abs=1e-7)


def test_mann_whitney_of_the_permeability_of_placental_membranes():
    """Source: Hollander and Wolfe 1973, p. 69: W 35, one-sided p 0.1272."""
    at_term = [0.80, 0.83, 1.89, 1.04, 1.45, 1.38, 1.91, 1.64, 0.73, 1.46]
    early = [1.15, 0.88, 0.90, 0.74, 1.21]
    assert mann_whitney_u(at_term, early) == 35
    assert mann_whitney(at_term, early) == pytest.approx(0.2544, abs=5e-5)


def test_mann_whitney_at_its_ends():
    assert mann_whitney([1, 2, 3], [4, 5, None]) == pytest.approx(2 / 20)
    assert mann_whitney([None] * 3, [None] * 3) == 1
    assert log_rank(censored([None] * 3, 9), censored([None] * 3, 9)) == (0, 1)


def test_holm_adjusts_in_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_the_page_is_what_the_raw_data_says():
    root = Path(__file__).parents[2]
    raw = root / "tests/bench/data/time_to_bug.csv"
    assert (root / "docs/benchmark.md").read_text() == page(raw)


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
    places = ["--output", str(tmp_path / "page.md"), "--raw", str(tmp_path / "raw.csv")]
    main(["report", "--database", str(tmp_path / "b.sqlite"), *places])
    written = (tmp_path / "page.md").read_text()
    assert "| S13 hcall-mask |" in written
    main(["report", "--database", str(tmp_path / "none.sqlite"), *places])
    assert (tmp_path / "page.md").read_text() == written
