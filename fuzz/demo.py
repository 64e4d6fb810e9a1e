"""The demo chapter of fuzzing: a published bug is planted, found, made small and told."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sevlab.core.vocabulary import Record
from sevlab.fuzz.builtin_engine import BuiltinEngine
from sevlab.fuzz.engine import Budget
from sevlab.fuzz.runner import Run
from sevlab.fuzz.setup import Setup
from sevlab.fuzz.store import Store
from sevlab.fuzz.triage import Triage

TARGET, BUG = "ghcb", "S07"
WHAT = "the XCR0 that a guest reports becomes the vCPU's without a check (Linux, sev_es_sync_from_ghcb)"
SECONDS, RUNS, SEED = 20.0, 60_000, 1


def chapter(echo: Callable[[str], object]) -> None:
    """Fuzz the GHCB until the bug is found, with the loop that needs nothing installed."""
    setup = Setup(settings=(f"seeded.bugs={BUG}",))
    runner = setup.runner(TARGET, seed=SEED)
    echo(f"A hypervisor with one bug planted, {BUG}: {WHAT}.")
    echo(f"A hostile guest sends GHCB messages, at most {SECONDS:g} seconds of them:")
    inputs = 0
    found: list[tuple[Sequence[Record], Run]] = []
    started = time.perf_counter()

    def told(steps: Sequence[Record], run: Run) -> bool:
        nonlocal inputs
        inputs += 1
        if run.findings:
            found.append((steps, run))
        return not found

    seeds = [runner.codec.encode(steps) for steps in runner.seeds()]
    BuiltinEngine().fuzz(runner, seeds, Budget(seconds=SECONDS, runs=RUNS, seed=SEED), told)
    took = time.perf_counter() - started
    feedback = runner.feedback
    echo(
        f"  {inputs} inputs, {runner.executed} messages in {took:.1f} s;"
        f" {len(feedback.states)} states, {len(feedback.edges)} ways between them"
    )
    if not found:
        echo(f"  nothing found this time; longer: sevlab fuzz run {TARGET} --campaign DIR --set {setup.settings[0]}")
        return
    steps, run = found[0]
    echo(f"  found in {len(steps)} steps, made small:\n")
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder, "campaign"), create=True)
        setup.keep(store)
        store.add_finding(TARGET, run.findings[0], runner.codec.encode(steps), flaky=False)
        work = Triage(store)
        for stored in work.all():
            for line in work.story(stored):
                echo(f"  {line}")
        store.close()
    echo(f"\n  The same as a campaign: sevlab fuzz run {TARGET} --campaign DIR --set {setup.settings[0]}")
