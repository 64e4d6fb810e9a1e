"""One target, ready to run: a booted machine, its codec, its oracles, and what a run shows.

Harness, campaign, minimisation, benchmark and tests all run inputs here, so that what one of them sees the others see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

from sevlab.core.config import MachineConfig
from sevlab.core.errors import CampaignError, InvariantViolation
from sevlab.core.listening import listening
from sevlab.core.machine import Machine
from sevlab.core.oracle import Finding, Oracle, OracleSink, Target
from sevlab.core.plugins import PluginSet, load
from sevlab.core.vocabulary import Outcome, Record, spec_of
from sevlab.fuzz.codec import Codec
from sevlab.fuzz.feedback import Feedback
from sevlab.fuzz.messages import Messages
from sevlab.fuzz.mutators import Mutator
from sevlab.fuzz.pools import Pools

EVERYWHERE = "oracles"
"""The plugin whose oracles judge every target."""


Told = Callable[[Record, Outcome], object]


class Run(NamedTuple):
    """What one input did: how many steps ran, what the oracles say, and whether it reached something new.

    `useful` is how many steps the last new thing took: what comes after them adds nothing; `state` the state of all
    machines then, in words (empty when nothing was new).
    """

    steps: int
    findings: tuple[Finding, ...]
    new: int
    useful: int = 0
    state: str = ""


class Runner:
    """Runs inputs of `target`, each from the booted state.

    `given` are plugin modules that take part without being installed (a seeded bug), `extra` names of more plugins;
    `options` go over the target's. Raises `CampaignError`, `ConfigError` or `PluginError` for what cannot be composed.
    """

    pairs = True
    """Whether the machine alone says what an input does, so that two runs of it can be compared."""

    def __init__(
        self,
        target: Target,
        *,
        given: Mapping[str, Any] | None = None,
        extra: Sequence[str] = (),
        oracles: Iterable[Oracle] | None = None,
        seed: int = 0,
    ) -> None:
        self.target = target
        names = tuple(dict.fromkeys((*target.plugins, EVERYWHERE, *extra)))
        self.plugins: PluginSet = load([*names, *(given or {})], given=given)
        self.config = MachineConfig(plugins=names, guests=target.guests, options=target.options)
        self.machine = Machine(self.config, plugins=self.plugins)
        self.messages = Messages.of_plugins(self.plugins)
        self.codec = Codec(self.machine.vocabulary, target.steps, target.words)
        self.pools = Pools()
        self._boot()
        self.oracles = tuple(oracles) if oracles is not None else chosen_oracles(target, self.plugins)
        self.sink = self.machine.sink = OracleSink(self.oracles)
        self.machine.fetches.keep_log(keep=True)
        self.feedback = Feedback(self.machine, self.plugins, self.messages)
        self.feedback.begin()
        self.mutator = Mutator(self.machine, self.codec, self.messages, self.pools, Random(seed))
        self.executed = 0
        """Steps that have run."""

    def _boot(self) -> None:
        """Bring the machine to the target's state, and keep what that names."""
        machine = self.machine
        self.pools.harvest_machine(machine)
        if self.target.boot is not None:
            with listening(machine, lambda step, outcome: self.pools.harvest(self.messages, step, outcome)):
                self.target.boot(machine)
        machine.mark()

    def seeds(self) -> list[tuple[Record, ...]]:
        """The target's benign sequences, as far as its kinds hold them."""
        if self.target.seeds is None:
            return []
        machine = Machine(self.config, plugins=self.plugins)
        if self.target.boot is not None:
            self.target.boot(machine)
        found = self.target.seeds(machine)
        kept = [tuple(step for step in steps if self.codec.accepts(step))[:64] for steps in found]
        return [steps for steps in kept if steps]

    def run(self, steps: Sequence[Record], *, learn: bool = False, told: Told | None = None) -> Run:
        """Run a sequence and reset; with `learn`, resources that it names are kept when it reached something new.

        `told` gets each step with its outcome once the sequence is over.
        """
        machine, sink, feedback = self.machine, self.sink, self.feedback
        seen: list[tuple[Record, Outcome]] = []
        new = useful = 0
        state = ""
        try:
            for step in steps:
                outcome = machine.apply(step)
                seen.append((step, outcome))
                if found := feedback.step(step, outcome):
                    new += found
                    useful = len(seen)
                    state = feedback.state_words
                if sink.tainted:
                    break
        except Exception as error:  # noqa: BLE001  # whatever leaves the model is the finding
            sink.findings.append(crash(error, steps[min(len(seen), len(steps) - 1)]))
            sink.tainted = True
        findings = sink.sequence_end(machine)
        if findings:
            findings = tuple(finding._replace(state=finding.state or feedback.state_words) for finding in findings)
        machine.reset()
        feedback.begin()
        self.executed += len(seen)
        if learn and new:
            for step, outcome in seen:
                self.pools.harvest(self.messages, step, outcome)
        if told is not None:
            for step, outcome in seen:
                told(step, outcome)
        return Run(len(seen), findings, new, useful, state)

    def run_bytes(self, data: bytes) -> Run:
        """Decode and run."""
        return self.run(self.codec.decode(data), learn=True)


def crash(error: Exception, step: Record) -> Finding:
    """The finding that an exception is."""
    if isinstance(error, InvariantViolation):
        return Finding("invariant", error.rule, error.message, spec_of(step).kind)
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    where = "" if at is None else at.tb_frame.f_code.co_name
    return Finding("crash", type(error).__name__, f"{error} in {where}", f"{spec_of(step).kind}:{where}")


def chosen_oracles(target: Target, plugins: PluginSet) -> tuple[Oracle, ...]:
    """The oracles that the target names, and those for every target. Raises `CampaignError` for one that is missing."""
    brought = plugins.call("sevlab_oracles")
    known = {oracle.name: oracle for found in brought.values() for oracle in found}
    names = tuple(dict.fromkeys((*target.oracles, *(oracle.name for oracle in brought.get(EVERYWHERE, ())))))
    for name in names:
        if name not in known:
            raise CampaignError(f"target {target.name!r}: no oracle {name!r}; there are {', '.join(sorted(known))}")
    return tuple(known[name] for name in names)
