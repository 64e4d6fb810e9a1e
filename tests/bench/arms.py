"""How inputs come about: the arms of the benchmark. They share the machine, the run function and the message table."""

from __future__ import annotations

import os
import time
from random import Random

from sevlab.fuzz.engine import Budget
from sevlab.fuzz.paired import Paired
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
        self.trial = None

    def step_end(self, machine, step, outcome):
        return ()

    def sequence_end(self, machine):
        if "seeded" in machine.components:
            for name, counts in seeded_state(machine).canaries.items():
                for count, seen in ((counts.reached, self.reached), (counts.triggered, self.triggered)):
                    if count and name not in seen:
                        seen[name] = self.trial.spent
        return ()


class Trial:
    """One arm's run on one machine; CPU seconds count from `begin`.

    `done(trial)` says that nothing more can be seen, `save(trial)` keeps the result. The paired oracles are asked as in
    a campaign: for every input that reached something new, and for every 64th other one.
    """

    def __init__(self, runner, engine, budget, seed, done, save):
        self.runner, self.engine, self.budget, self.seed = runner, engine, budget, seed
        self._done, self._save = done, save
        self._paired = Paired(runner)
        self.runs = 0
        self.detected = None
        self.by = ""
        self.start = 0.0

    def begin(self):
        self.start = time.process_time()

    @property
    def spent(self):
        return time.process_time() - self.start

    def take(self, steps, run):
        """Take the result of an input; False, and everything is saved, when the trial is over."""
        self.runs += 1
        if self.detected is None:
            findings = run.findings
            if not findings and (run.new or not self.runs % Paired.EVERY):
                findings = self._paired.judge(steps)
            if findings:
                self.detected, self.by = self.spent, f"{findings[0].oracle}:{findings[0].rule}"
        if self.spent < self.budget and not self._done(self):
            return True
        self._save(self)
        return False

    def run(self, steps):
        return self.take(steps, self.runner.run(steps))


def random_bytes(trial):
    """P0: bytes by chance, decoded as any input."""
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
    """P3: the engine that a campaign uses here, with its seeds, its mutator and its state counters."""
    runner = trial.runner
    corpus = [runner.codec.encode(steps) for steps in runner.seeds()] if seeds else []

    def told(steps, run):
        if trial.take(steps, run):
            return True
        os._exit(0)  # libFuzzer does not return

    trial.begin()
    trial.engine.fuzz(runner, corpus, Budget(seed=trial.seed), told)


def without_states(trial):
    """P3 to which nothing about states is new: code coverage alone, where the engine has that."""
    trial.runner.feedback.step = lambda _step, _outcome: 0
    ours(trial)


def without_grammar(trial):
    """P3 that changes bytes, not steps."""
    rng = Random(trial.seed)

    def mutate(data):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(changed) + 1)
            changed[place : place + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 3))
        return bytes(changed)

    codec, mutator = trial.runner.codec, trial.runner.mutator
    mutator.mutate = lambda steps: codec.decode(mutate(codec.encode(steps)))
    mutator.crossover = lambda first, _second: first
    ours(trial)


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
