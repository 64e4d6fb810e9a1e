"""One worker of a campaign: a process that fuzzes one target and writes what it finds into the campaign's store.

`python -m sevlab.fuzz.worker DIR TARGET NUMBER JSON`; the campaign starts it, and starts it again when it dies.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import FrameType

from sevlab.core.oracle import Finding
from sevlab.core.vocabulary import Record
from sevlab.fuzz.engine import Budget, make_engine
from sevlab.fuzz.feedback import Coordinate
from sevlab.fuzz.paired import Paired
from sevlab.fuzz.runner import Run, Runner
from sevlab.fuzz.setup import Setup
from sevlab.fuzz.store import Store, identity_of

REPORT_SECONDS = 1.0
INPUT_SECONDS = 10.0
"""An input that takes longer is a finding."""

MEMORY_BYTES = 4 << 30


class InputTooSlow(Exception):
    """An input used up its time."""


def too_slow(_signal: int, _frame: FrameType | None) -> None:
    """The alarm's handler."""
    raise InputTooSlow(f"an input ran for more than {INPUT_SECONDS:g} s")


class Worker:
    """Keeps the books of one worker."""

    def __init__(self, store: Store, runner: Runner, number: int) -> None:
        self._store = store
        self._runner = runner
        self._number = number
        self._target = runner.target.name
        self._paired = Paired(runner)
        self._parent = os.getppid()
        self._at = time.monotonic()
        self._cpu = time.process_time()
        self._inputs = self._steps = 0
        self._new = False
        self._known = 0
        self._seen_again: dict[str, int] = {}
        """By identity: how often what is stored already was found since the last report."""
        self._last = max((number for number, _ in store.inputs(self._target)), default=0)

    def told(self, steps: Sequence[Record], run: Run) -> bool:
        """Take the result of one input."""
        signal.setitimer(signal.ITIMER_REAL, INPUT_SECONDS)
        self._inputs += 1
        self._steps += run.steps
        findings = run.findings
        if run.new:
            self._new = True
            data = self._runner.codec.encode(steps[: run.useful])
            self._store.add_input(self._target, data, worker=self._number, new=run.new)
        if not findings and (run.new or not self._inputs % self._paired.EVERY):
            findings = self._paired.judge(steps)
        if findings:
            self._keep(steps, findings)
        if time.monotonic() - self._at >= REPORT_SECONDS:
            self.report()
            return os.getppid() == self._parent  # a campaign that was killed leaves no worker behind
        return True

    def _keep(self, steps: Sequence[Record], findings: Sequence[Finding]) -> None:
        """Store what is found at once; what was found before is only counted, until the next report."""
        fresh = [finding for finding in findings if identity_of(finding) not in self._seen_again]
        for finding in findings:
            identity = identity_of(finding)
            self._seen_again[identity] = self._seen_again.get(identity, -1) + 1
        if not fresh:
            return
        again = {
            (found.oracle, found.rule) for found in (*self._runner.run(steps).findings, *self._paired.judge(steps))
        }
        data = self._runner.codec.encode(steps)
        for finding in fresh:  # what a second run does not show is flaky
            flaky = (finding.oracle, finding.rule) not in again
            self._store.add_finding(self._target, finding, data, flaky=flaky)

    def report(self) -> None:
        """Write the numbers since the last report."""
        now, cpu, feedback = time.monotonic(), time.process_time(), self._runner.feedback
        fresh = [key for key in islice(feedback.reached, self._known, None) if isinstance(key, Coordinate)]
        self._known = len(feedback.reached)
        if fresh:
            self._store.add_reached(self._target, (json.dumps(key) for key in fresh))
        self._store.saw_again(self._target, {identity: count for identity, count in self._seen_again.items() if count})
        self._seen_again = dict.fromkeys(self._seen_again, 0)
        self._store.count(
            self._target,
            self._number,
            inputs=self._inputs,
            steps=self._steps,
            seconds=cpu - self._cpu,
            states=len(feedback.states),
            coordinates=sum(1 for _ in feedback.coordinates),
            new=self._new,
        )
        self._at, self._cpu, self._inputs, self._steps, self._new = now, cpu, 0, 0, False

    def incoming(self) -> list[bytes]:
        """Inputs that other workers have kept since the last call."""
        found = self._store.inputs(self._target, after=self._last, not_worker=self._number)
        if found:
            self._last = found[-1][0]
        return [data for _, data in found]


def main() -> None:
    """Run one worker as its arguments say."""
    folder, name, number, options = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, too_slow)
    engine = make_engine(options["engine"])
    store = Store(Path(folder))
    setup = Setup.of(store)
    engine.prepare(setup.plugins(name))
    seed = options["seed"] * 1000 + number
    runner = setup.runner(name, seed=seed)
    store.start_worker(name, number, os.getpid())
    worker = Worker(store, runner, number)
    corpus = [data for _, data in store.inputs(name)]
    budget = Budget(seconds=options["seconds"], runs=options["runs"], seed=seed)
    signal.setitimer(signal.ITIMER_REAL, INPUT_SECONDS)
    try:
        engine.fuzz(runner, corpus, budget, worker.told, worker.incoming)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        worker.report()
        store.close()


if __name__ == "__main__":
    main()
