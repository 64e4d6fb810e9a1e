"""Campaigns: minimisation, a second worker, and a large corpus."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from random import Random

from sevlab.fuzz.campaign import Plan, run
from sevlab.fuzz.runner import Runner
from sevlab.fuzz.store import Store
from sevlab.fuzz.targets import target_named
from sevlab.fuzz.triage import smallest

from tests.bench.harness import Bench, Row
from tests.fuzz import faulty
from tests.fuzz.test_campaign import BAD

STEPS = 40
CORPUS = 20_000


def minimisation(bench: Bench) -> list[Row]:
    """A finding of forty steps, of which one is at fault, made small."""
    runner = Runner(target_named("ghcb"), given={"faulty": faulty}, seed=1)
    rows: list[Row] = []
    for seed in range(1 if bench.quick else 5):
        rng = Random(seed)
        while True:
            steps = [runner.mutator.step() for _ in range(STEPS)]
            steps[rng.randrange(STEPS // 2, STEPS)] = BAD
            if any(finding.rule == "buffer.bounds" for finding in runner.run(steps).findings):
                break
        started = time.process_time()
        small = smallest(runner, tuple(steps), "invariant", "buffer.bounds")
        took = time.process_time() - started
        rows.append(
            (f"a finding of {STEPS} steps made small", took / 5, f"{took:.2f} s, {len(small)} steps; limit 5 s")
        )
    return [max(rows, key=lambda row: row[1])]


def workers(bench: Bench) -> list[Row]:
    """Two workers on two cores, to one; by CPU time too, which other work on the machine does not change."""
    seconds = 6 if bench.quick else 30
    wall, cpu = [], []
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            store = run(
                Path(folder, "c"), Plan(targets=("ghcb",), workers=count, seconds=seconds), lambda _status: None
            )
            status = store.status()["targets"]["ghcb"]
            wall.append(status["inputs"] / seconds)
            cpu.append(count * status["inputs"] / status["cpu_seconds"])
            store.close()
    return [
        ("two workers, to one", wall[1] / wall[0], f"{wall[1]:.0f}/s and {wall[0]:.0f}/s; target 1.8"),
        ("the same by CPU time", cpu[1] / cpu[0], f"{cpu[1]:.0f}/s and {cpu[0]:.0f}/s on cores of their own"),
    ]


def corpus(bench: Bench) -> list[Row]:
    """A corpus of twenty thousand inputs read from its campaign and decoded, and all of it run once."""
    runner = Runner(target_named("ghcb"), seed=1)
    number = CORPUS // 10 if bench.quick else CORPUS
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder, "c"), create=True)
        with store.together():
            for _ in range(number):
                store.add_input("ghcb", runner.codec.encode(runner.mutator.fresh()))
        store.close()
        runner = Runner(target_named("ghcb"), seed=1)  # one that remembers nothing
        started = time.process_time()
        store = Store(Path(folder, "c"))
        kept = [runner.codec.decode(data) for _, data in store.inputs("ghcb")]
        loaded = time.process_time() - started
        for steps in kept:
            runner.run(steps)
        ran = time.process_time() - started
        store.close()
    return [
        (f"corpus of {number} inputs read and decoded", loaded / 5 * CORPUS / number, f"{loaded:.2f} s; limit 5 s"),
        ("the same with every input run once", ran / loaded, f"{ran:.2f} s"),
    ]


GROUPS = (minimisation, workers, corpus)
"""Rows whose limit is in seconds have the share of it that they use as ratio."""
