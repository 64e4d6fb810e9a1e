"""A real guest's #VC handler under lies: what going back costs, and inputs a second with feedback and all oracles.

The flat guest is built with gcc. A campaign's guest (`DIR/guest.state`) is measured beside it when `SEVLAB_GUEST_STATE`
names its file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from sevlab.core.vocabulary import Record
from sevlab.fuzz.builtin_engine import BuiltinEngine
from sevlab.fuzz.engine import Budget
from sevlab.fuzz.guest_vc import GuestRunner
from sevlab.fuzz.guest_vc_state import load
from sevlab.fuzz.runner import Run
from sevlab.plugins.engines.start import Begun, Start, begin

from tests.bench.harness import Bench, Row
from tests.guests.build import build

RESTORE_AIM, FLAT_AIM, KERNEL_AIM = 10.0, 5000.0, 2000.0


def _guests() -> list[tuple[str, Begun, float]]:
    """(name, guest, inputs a second that are aimed at)."""
    with TemporaryDirectory() as folder:
        kernel = build("hostile.c", Path(folder) / "guest.elf")
        found = [("flat guest", begin(Start(str(kernel), at="at_cpuid", memory="16 MiB")), FLAT_AIM)]
    state = os.environ.get("SEVLAB_GUEST_STATE")
    if state:
        start, begun = load(Path(state))
        found.append((Path(start.kernel).name, begun, KERNEL_AIM))
    return found


def going_back(bench: Bench) -> list[Row]:
    """The snapshot's restore after an honest run."""
    rows = []
    for name, begun, _ in _guests():
        run, count = begun.run, 500 if bench.quick else 5000
        spent = 0
        for _ in range(count):
            started = time.process_time_ns()
            run.back()
            spent += time.process_time_ns() - started
            run.play(())
        micro = spent / count / 1000
        pages = len(run.machine.memory.written())
        rows.append(
            (f"{name}: going back, to {RESTORE_AIM:.0f} us", micro / RESTORE_AIM, f"{micro:.1f} us, {pages} pages")
        )
    return rows


def inputs(bench: Bench) -> list[Row]:
    """The built-in loop: mutation, run, oracles, feedback; and the share of the guest's run in it."""
    rows = []
    for name, begun, aim in _guests():
        runner, runs = GuestRunner(begun), 1000 if bench.quick else 10_000
        seeds = [runner.codec.encode(steps) for steps in runner.seeds()]

        def told(_steps: Sequence[Record], _run: Run) -> bool:
            return True

        started = time.process_time()
        BuiltinEngine().fuzz(runner, seeds, Budget(runs=runs, seed=1), told)
        rate = runs / (time.process_time() - started)
        rows.append((f"{name}: inputs a CPU second, to {aim:.0f}", rate / aim, f"{rate:.0f} a second"))
        started = time.process_time()
        for _ in range(runs):
            begun.run.play(())
        honest = (time.process_time() - started) / runs * 1e6
        rows.append((f"{name}: an honest run, of an input in the loop", honest * rate / 1e6, f"{honest:.0f} us"))
    return rows


GROUPS = (going_back, inputs)
