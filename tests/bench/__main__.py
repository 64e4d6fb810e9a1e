"""`python -m tests.bench [FEATURE...] [--quick]`: the numbers of docs/performance.md, as medians and ratios of one run.

Not tests: nothing here fails. Each row compares with something of the same run, since machines differ and drift.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from tests.bench.harness import Bench

FEATURES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("feature", nargs="*", help=f"one of {', '.join(FEATURES)}; all if none is named")
    parser.add_argument("--quick", action="store_true", help="few rounds: only whether it runs")
    arguments = parser.parse_args()
    bench = Bench(quick=arguments.quick)
    print(f"{'what':<58} {'ratio':>8}  median")
    for feature in arguments.feature or FEATURES:
        for group in import_module(f"tests.bench.bench_{feature}").GROUPS:
            for name, ratio, note in group(bench):
                print(f"{name:<58} {ratio:>8.2f}  {note}", flush=True)


if __name__ == "__main__":
    main()
