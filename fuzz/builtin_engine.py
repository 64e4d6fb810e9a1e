"""The built-in loop: pure Python, guided by state counters alone, the same inputs for the same seed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from random import Random

from sevlab.core.plugins import PluginSet
from sevlab.fuzz.engine import Budget, Incoming, Told, nothing
from sevlab.fuzz.mutators import Steps
from sevlab.fuzz.runner import Runner

CROSSOVER, FRESH = 0.12, 0.05
"""How often two inputs are joined, and how often one begins from nothing."""

RECENT = 0.5
"""How often the input to change is one of the newest."""

NEWEST = 32
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
        kept: list[Steps] = []
        runs = 0
        end = time.monotonic() + budget.seconds if budget.seconds else None
        decode = runner.codec.decode
        waiting = list(reversed(corpus))
        while (not budget.runs or runs < budget.runs) and (end is None or time.monotonic() < end):
            if runs % LISTEN_EVERY == LISTEN_EVERY - 1:
                waiting += incoming()
            seed = bool(waiting)
            steps = decode(waiting.pop()) if seed else self._make(runner, kept, rng)
            run = runner.run(steps, learn=True)
            runs += 1
            if (run.new or seed) and steps:
                kept.append(steps)
            if not told(steps, run):
                return

    @staticmethod
    def _make(runner: Runner, kept: list[Steps], rng: Random) -> Steps:
        mutator = runner.mutator
        if not kept or rng.random() < FRESH:
            return mutator.fresh()
        steps = rng.choice(kept[-NEWEST:] if rng.random() < RECENT else kept)
        return mutator.crossover(steps, rng.choice(kept)) if rng.random() < CROSSOVER else mutator.mutate(steps)
