"""The built-in loop: pure Python, guided by state counters alone, the same inputs for the same seed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from random import Random

from sevlab.fuzz.engine import Budget, Incoming, Told, nothing, typed_mutation
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

    def fuzz(
        self, runner: Runner, corpus: Sequence[bytes], budget: Budget, told: Told, incoming: Incoming = nothing
    ) -> None:
        rng = Random(budget.seed)
        kept: list[bytes] = []
        runs = 0
        end = time.monotonic() + budget.seconds if budget.seconds else None
        waiting = list(reversed(corpus))
        while (not budget.runs or runs < budget.runs) and (end is None or time.monotonic() < end):
            if runs % LISTEN_EVERY == LISTEN_EVERY - 1:
                waiting += incoming()
            seed = bool(waiting)
            data = waiting.pop() if waiting else self._make(runner, kept, rng)
            if len(data) > budget.max_bytes:
                data = data[: budget.max_bytes]
            steps = runner.codec.decode(data)
            run = runner.run(steps, learn=True)
            runs += 1
            if run.new or (seed and steps):
                kept.append(data)
            if not told(data, steps, run):
                return

    @staticmethod
    def _make(runner: Runner, kept: list[bytes], rng: Random) -> bytes:
        if not kept or rng.random() < FRESH:
            return runner.codec.encode(runner.mutator.fresh())
        pool = kept[-NEWEST:] if rng.random() < RECENT else kept
        data = rng.choice(pool)
        if rng.random() < CROSSOVER:
            decode = runner.codec.decode
            return runner.codec.encode(runner.mutator.crossover(decode(data), decode(rng.choice(kept))))
        return typed_mutation(runner, data, rng)
