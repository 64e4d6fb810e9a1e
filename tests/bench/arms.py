"""How inputs come about: the arms of the benchmark. They share the machine, the run function and the message table."""

from __future__ import annotations

import time
from random import Random

from sevlab.fuzz.builtin_engine import BuiltinEngine
from sevlab.fuzz.engine import Budget
from sevlab.plugins.seeded import seeded_state

MAX_RANDOM_BYTES = 1024
HYPOTHESIS_EXAMPLES = 20
HYPOTHESIS_STEPS = 16


class Canaries:
    """Stands among the oracles to look at the canaries before the reset; says nothing."""

    name = "canaries"
    documentation = "Notes when each seeded bug was first reached and triggered."

    def __init__(self):
        self.reached = {}
        self.triggered = {}
        self.start = 0.0

    def step_end(self, machine, step, outcome):
        return ()

    def sequence_end(self, machine):
        if "seeded" in machine.components:
            for name, counts in seeded_state(machine).canaries.items():
                for count, seen in ((counts.reached, self.reached), (counts.triggered, self.triggered)):
                    if count and name not in seen:
                        seen[name] = time.process_time() - self.start
        return ()


class Trial:
    """One arm's run; `told(run)` returns False when it is over. CPU seconds count from `begin`."""

    def __init__(self, runner, budget, seed, done):
        self.runner, self.budget, self.seed, self.done = runner, budget, seed, done
        self.runs = 0
        self.detected = None
        self.by = ""
        self.start = 0.0

    def begin(self):
        self.start = time.process_time()

    @property
    def spent(self):
        return time.process_time() - self.start

    def take(self, run):
        self.runs += 1
        if run.findings and self.detected is None:
            self.detected, self.by = self.spent, f"{run.findings[0].oracle}:{run.findings[0].rule}"
        return self.spent < self.budget and not self.done(self)

    def run(self, steps):
        return self.take(self.runner.run(steps))


def random_bytes(trial):
    """P0: bytes by chance."""
    rng = Random(trial.seed)
    while trial.run(trial.runner.codec.decode(rng.randbytes(rng.randint(1, MAX_RANDOM_BYTES)))):
        pass


def grammar(trial):
    """P1: sequences from the message table, without feedback."""
    while trial.run(trial.runner.mutator.fresh()):
        pass


def hypothesis_stateful(trial):
    """P2: a rule-based state machine of Hypothesis that draws from the same table."""
    import hypothesis
    from hypothesis import stateful
    from hypothesis import strategies as st

    going = True
    mutator = trial.runner.mutator

    class Conversation(stateful.RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.steps = []

        @stateful.rule(choice=st.integers(0, (1 << 32) - 1))
        def step(self, choice):
            mutator.reseed(choice)
            self.steps.append(mutator.step())

        def teardown(self):
            nonlocal going
            if going:
                going = trial.run(self.steps)

    settings = hypothesis.settings(
        max_examples=HYPOTHESIS_EXAMPLES,
        stateful_step_count=HYPOTHESIS_STEPS,
        phases=[hypothesis.Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    number = trial.seed << 20
    while going:
        hypothesis.seed(number)(Conversation)
        stateful.run_state_machine_as_test(Conversation, settings=settings)
        number += 1


def ours(trial, *, seeds=True):
    """P3: the campaign's loop, guided by states."""
    runner = trial.runner
    corpus = [runner.codec.encode(steps) for steps in runner.seeds()] if seeds else []
    trial.begin()
    BuiltinEngine().fuzz(runner, corpus, Budget(seed=trial.seed), lambda _steps, run: trial.take(run))


def without_states(trial):
    """P3 whose feedback never says that anything is new."""
    trial.runner.feedback.step = lambda _step, _outcome: 0
    ours(trial)


def without_grammar(trial):
    """P3 that changes bytes, not steps."""
    runner, rng = trial.runner, Random(trial.seed)
    kept = [runner.codec.encode(steps) for steps in runner.seeds()] or [b"\0"]
    trial.begin()
    going = True
    while going:
        data = bytearray(rng.choice(kept))
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data) + 1)
            data[place : place + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 3))
        run = runner.run(runner.codec.decode(bytes(data)), learn=True)
        if run.new and data:
            kept.append(bytes(data))
        going = trial.take(run)


def without_seeds(trial):
    """P3 that begins from nothing."""
    ours(trial, seeds=False)


ARMS = {
    "P0": random_bytes,
    "P1": grammar,
    "P2": hypothesis_stateful,
    "P3": ours,
    "P3-state": without_states,
    "P3-grammar": without_grammar,
    "P3-seeds": without_seeds,
}
PEERS = ("P0", "P1", "P2")
