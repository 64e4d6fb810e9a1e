"""A campaign: worker processes over one store, started again when they die, and a view of what they do."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sevlab.core.errors import CampaignError
from sevlab.fuzz.engine import make_engine
from sevlab.fuzz.setup import NOTHING, Setup
from sevlab.fuzz.store import FILE, Store

POLL_SECONDS = 0.5
RESTART_SECONDS = 1.0
"""A worker that dies sooner than this after its start, three times in a row, is not started again."""

EARLY_DEATHS = 3
GRACE_SECONDS = 15.0
"""How long past its budget a worker may take to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a campaign does. `seconds` and `runs` are each worker's budget, 0: none; `setup` counts when it begins."""

    targets: tuple[str, ...]
    workers: int = 1
    seconds: float = 60
    runs: int = 0
    seed: int = 1
    engine: str | None = None
    setup: Setup = NOTHING


class _Process:
    """One worker's process."""

    def __init__(self, folder: Path, target: str, number: int, options: dict[str, Any]) -> None:
        self.target = target
        self.number = number
        self.done = False
        self.deaths = 0
        self._folder = folder
        self._options = options
        self._log = (folder / f"worker-{target}-{number}.log").open("ab")
        self.start()

    def start(self) -> None:
        """Start the process, with what is left of its time."""
        self.started = time.monotonic()
        command = [sys.executable, "-m", "sevlab.fuzz.worker", str(self._folder), self.target, str(self.number)]
        self.process = subprocess.Popen(  # noqa: S603  # our own module
            [*command, json.dumps(self._options)], stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL
        )

    def look(self, left: float | None) -> None:
        """Start a worker that died again; one that ended by itself is done."""
        code = self.process.poll()
        if self.done or code is None:
            if left is not None and left < -GRACE_SECONDS:
                self.process.kill()
            return
        if code == 0 or (left is not None and left <= 1):
            self.done = True
            return
        self.deaths = self.deaths + 1 if time.monotonic() - self.started < RESTART_SECONDS else 0
        if self.deaths >= EARLY_DEATHS:
            raise CampaignError(
                f"worker {self.number} of {self.target} dies at its start; the reason is in {self._log.name}"
            )
        if left is not None:
            self._options = self._options | {"seconds": left}
        self.start()

    def stop(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()


def prepare(folder: Path, plan: Plan, *, fresh: bool) -> Store:
    """Open or make the campaign, with the targets' seeds. Raises `CampaignError`; `fresh` wants a new directory."""
    if fresh and (folder / FILE).exists():
        raise CampaignError(f"{folder}: there is a campaign here; --resume goes on with it, or name a new directory")
    make_engine(plan.engine)
    targets = [plan.setup.target(name) for name in plan.targets]
    store = Store(folder, create=True)
    setup = Setup.of(store) if store.meta("given") is not None else plan.setup
    if plan.setup not in (NOTHING, setup):
        raise CampaignError(f"{folder}: began with {setup.words}, and cannot go on with {plan.setup.words}")
    setup.keep(store)
    for target in targets:
        shape = [list(target.steps), list(target.words)]
        known = store.meta(f"shape:{target.name}")
        if known not in (None, shape):
            raise CampaignError(f"{folder}: its corpus of {target.name} has other steps than this version's target")
        store.set_meta(f"shape:{target.name}", shape)
        if not store.inputs(target.name):
            runner = setup.runner(target.name)
            for steps in runner.seeds():
                store.add_input(target.name, runner.codec.encode(steps))
    return store


def run(folder: Path, plan: Plan, view: Callable[[dict[str, Any]], None], *, fresh: bool = False) -> Store:
    """Run a campaign to the end of its budget, or until Ctrl-C; what was found is in the store that comes back."""
    store = prepare(folder, plan, fresh=fresh)
    options = {
        "engine": plan.engine,
        "seed": plan.seed,
        "seconds": plan.seconds,
        "runs": plan.runs,
    }
    end = time.monotonic() + plan.seconds if plan.seconds else None
    processes: list[_Process] = []
    try:
        for target in plan.targets:
            processes += [_Process(folder, target, number, options) for number in range(plan.workers)]
        while not all(process.done for process in processes):
            time.sleep(POLL_SECONDS)
            left = None if end is None else end - time.monotonic()
            for process in processes:
                process.look(left)
            view(store.status())
    except KeyboardInterrupt:
        pass
    finally:
        for process in processes:
            process.stop()
    view(store.status())
    return store


def line_of(status: dict[str, Any]) -> str:
    """The view as one line."""
    parts: list[str] = []
    for name, target in status["targets"].items():
        rate = target["inputs"] / target["cpu_seconds"] if target["cpu_seconds"] else 0
        ago = time.time() - target["last_new"] if target["last_new"] else 0
        parts.append(
            f"{name}: {target['inputs']} inputs ({rate:.0f}/CPU s), corpus {target['corpus']}, states"
            f" {target['states']}, coordinates {target['coordinates']}, last new {ago:.0f} s ago"
        )
    found: Sequence[str] = [f"{count} {oracle}" for oracle, count in status["findings"].items()]
    return "; ".join((*parts, f"findings: {', '.join(found) or 'none'}"))
