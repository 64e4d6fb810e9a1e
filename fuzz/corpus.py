"""A corpus: what to go on from, and keeping it small."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from sevlab.fuzz.mutators import Mutator, Steps
from sevlab.fuzz.runner import Runner

FRESH, EXTEND, CROSSOVER = 0.2, 0.35, 0.07
"""How often an input begins from nothing, goes on behind one that is kept, or joins two; else one is changed."""


class StateCorpus:
    """Inputs by the state that they lead to, so that rare states are gone on from as often as common ones."""

    def __init__(self) -> None:
        self._by_state: dict[str, list[Steps]] = {}
        self._all: list[Steps] = []
        self._states: list[str] = []

    def __len__(self) -> int:
        return len(self._all)

    def add(self, steps: Steps, state: str) -> None:
        """Keep an input that ends in `state`."""
        if state not in self._by_state:
            self._by_state[state] = []
            self._states.append(state)
        self._by_state[state].append(steps)
        self._all.append(steps)

    def pick(self, rng: Random) -> Steps:
        """One of a state, or one of all: of two, the shorter, since what is long seldom needs to be."""
        pool = self._all if rng.random() < 0.5 else self._by_state[self._states[int(rng.random() * len(self._states))]]
        one, other = (pool[int(rng.random() * len(pool))] for _ in range(2))
        return one if len(one) <= len(other) else other

    def make(self, mutator: Mutator, rng: Random) -> Steps:
        """The next input to try."""
        way = rng.random()
        if way < FRESH or not self._all:
            return mutator.fresh()
        steps = self.pick(rng)
        if way < FRESH + EXTEND:
            return mutator.extend(steps)
        if way < FRESH + EXTEND + CROSSOVER:
            return mutator.crossover(steps, self.pick(rng))
        return mutator.mutate(steps)


def minimal(runner: Runner, inputs: Sequence[bytes]) -> list[bytes]:
    """Those inputs, shortest first, that reach a coordinate which no shorter one reaches."""
    return [data for data in sorted(inputs, key=lambda data: (len(data), data)) if runner.run_bytes(data).new]
