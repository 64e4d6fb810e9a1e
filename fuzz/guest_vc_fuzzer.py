"""Fuzz a real guest's #VC handler: `python -m sevlab.fuzz.guest_vc_fuzzer KERNEL[,AT] [libFuzzer options] [CORPUS...]`.

`--builtin` runs the loop that needs no atheris. A finding ends the run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sevlab.core.vocabulary import Record
from sevlab.fuzz.atheris_engine import AtherisEngine
from sevlab.fuzz.builtin_engine import BuiltinEngine
from sevlab.fuzz.engine import Budget
from sevlab.fuzz.guest_vc import GuestRunner
from sevlab.fuzz.harness import Found
from sevlab.fuzz.runner import Run
from sevlab.plugins.engines.start import Start, begin


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the harness."""
    guest, *options = sys.argv[1:] if arguments is None else arguments
    kernel, _, place = guest.partition(",")
    runner = GuestRunner(begin(Start(kernel, at=place or "cpuid")))
    seeds = [runner.codec.encode(steps) for steps in runner.seeds()]

    def told(*what: object) -> bool:
        run = what[-1]
        if isinstance(run, Run) and run.findings:
            steps: tuple[Record, ...] = next(item for item in what if isinstance(item, tuple))
            raise Found(run.findings[0], steps)
        return True

    if "--builtin" in options:
        runs = next((int(option.partition("=")[2]) for option in options if option.startswith("-runs=")), 1000)
        BuiltinEngine().fuzz(runner, seeds, Budget(runs=runs), told)
        return
    AtherisEngine(options).fuzz(runner, seeds, Budget(), told)


if __name__ == "__main__":
    main()
