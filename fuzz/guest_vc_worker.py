"""The process that fuzzes a campaign's guest: `python -m sevlab.fuzz.guest_vc_worker DIR JSON`, by the campaign."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from sevlab.fuzz.engine import Budget, make_engine
from sevlab.fuzz.guest_vc import NAME, GuestRunner
from sevlab.fuzz.guest_vc_state import FILE, load
from sevlab.fuzz.store import Store
from sevlab.fuzz.worker import INPUT_SECONDS, Worker, too_slow


def main() -> None:
    """Run until the budget is used up."""
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    signal.signal(signal.SIGALRM, too_slow)
    engine = make_engine(options["engine"])
    _, begun = load(folder / FILE)
    runner = GuestRunner(begun, seed=options["seed"])
    store = Store(folder)
    if not store.inputs(NAME):
        for steps in runner.seeds():
            store.add_input(NAME, runner.codec.encode(steps))
    store.start_worker(NAME, 0, os.getpid())
    worker = Worker(store, runner, 0)
    corpus = [data for _, data in store.inputs(NAME)]
    budget = Budget(seconds=options["seconds"], runs=options["runs"], seed=options["seed"])
    signal.setitimer(signal.ITIMER_REAL, INPUT_SECONDS)
    try:
        engine.fuzz(runner, corpus, budget, worker.told, worker.incoming)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        worker.report()
        store.close()


if __name__ == "__main__":
    main()
