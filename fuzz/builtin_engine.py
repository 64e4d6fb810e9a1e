"""The built-in loop: pure Python, guided by state counters alone, the same inputs for the same seed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from random import Random

from sevlab.core.plugins import PluginSet
from sevlab.fuzz.corpus import StateCorpus
from sevlab.fuzz.engine import Budget, Incoming, Told, nothing
from sevlab.fuzz.runner import Runner

LISTEN_EVERY = 512
"""So many inputs between two looks at what other workers found."""


class BuiltinEngine:
    """Choose, change, run, keep."""

    name = "builtin"

    def prepare(self, _plugins: PluginSet) -> int:
        """There is nothing to instrument."""
        return 0

    def fuzz(
        self, runner: Runner, corpus: Sequence[bytes], budget: Budget, told: Told, incoming: Incoming = nothing
    ) -> None:
        rng = Random(budget.seed)
        kept = StateCorpus()
        runs = 0
        end = time.monotonic() + budget.seconds if budget.seconds else None
        decode = runner.codec.decode
        waiting = list(reversed(corpus))
        while (not budget.runs or runs < budget.runs) and (end is None or time.monotonic() < end):
            if runs % LISTEN_EVERY == LISTEN_EVERY - 1:
                waiting += incoming()
            seed = bool(waiting)
            steps = decode(waiting.pop()) if seed else kept.make(runner.mutator, rng)
            run = runner.run(steps, learn=True)
            runs += 1
            if run.new:
                kept.add(tuple(steps[: run.useful]), run.state)
            elif seed and steps:
                kept.add(steps, run.state)
            if not told(steps, run):
                return
