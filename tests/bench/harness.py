"""What every benchmark module uses: rows, and a clock that gives medians.

A module `bench_<feature>.py` has `GROUPS`: functions that take a `Bench` and return rows. `python -m tests.bench`
runs them all, `python -m tests.bench <feature>` one.
"""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable

Row = tuple[str, float, str]
"""What was measured, its ratio to something of the same run, the median in words."""


class Bench:
    """Times a call: median over rounds of the mean in a round, microseconds."""

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self.rounds, self.number = (3, 300) if quick else (9, 5000)

    def __call__(self, call: Callable[[], object], number: int | None = None) -> float:
        number = number or self.number
        return statistics.median(timeit.repeat(call, number=number, repeat=self.rounds)) / number * 1e6
