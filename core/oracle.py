"""What fuzzing needs from plugins, as plain data: oracles, targets, canaries, state counters, and the finding sink.

No engine and no campaign here: a plugin brings these without importing `sevlab.fuzz`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from sevlab.core.config import GuestConfig, Scalar
from sevlab.core.errors import InvariantViolation
from sevlab.core.events import Party
from sevlab.core.vocabulary import Outcome, Record, spec_of

if TYPE_CHECKING:
    from sevlab.core.machine import Machine
    from sevlab.core.state import StateDict, Stateful


class Finding(NamedTuple):
    """What an oracle saw. `oracle` and `rule` group findings; `handler` and `state` refine the group."""

    oracle: str
    rule: str
    message: str
    handler: str = ""
    state: str = ""


class Oracle(Protocol):
    """Looks at a machine at the end of each step and of each sequence, and says what is wrong with it.

    `name` is unique; `documentation` is one paragraph: the rule and its source. Both methods leave the machine as it
    is and return findings, none when all is well. An oracle whose `step_end` has something to say only after some
    kinds of steps names them in an attribute `after`, a tuple of kinds; without it, it is asked after every step.
    """

    name: str
    documentation: str

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        """Judge the machine after one step."""

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        """Judge the machine after a whole test case."""


class Target(NamedTuple):
    """Something to fuzz: who attacks, with which steps, judged by whom.

    `steps` are record kinds, `oracles` names of oracles, `plugins` what the machine is composed of, with `guests` and
    plugin `options`. `boot` brings the machine to the state in which every input starts. `seeds` gives sequences of
    benign steps for a booted machine, which it may use up. `words` are strings that steps may hold.
    """

    name: str
    adversary: Party
    steps: tuple[str, ...]
    oracles: tuple[str, ...]
    plugins: tuple[str, ...]
    documentation: str = ""
    guests: tuple[GuestConfig, ...] = (GuestConfig(name="first"), GuestConfig(name="second"))
    options: Mapping[str, Mapping[str, Scalar]] = MappingProxyType({})
    boot: Callable[[Machine], None] | None = None
    seeds: Callable[[Machine], tuple[tuple[Record, ...], ...]] | None = None
    words: tuple[str, ...] = ()


class Canary(NamedTuple):
    """A seeded bug's two counters: `reached` (faulty line ran) and `triggered` (the fault made a difference)."""

    bug: str
    documentation: str
    oracle: str
    """The oracle that must fire."""


class StateCounter(NamedTuple):
    """A counted coordinate of state feedback: the present state of one state machine.

    `read` gives it as a short tuple, at every step: it must be quick, so it gives what it finds. `words` puts such a
    tuple into words, once for each that occurs; without it, members of enumerations go by their names. `of` says what
    it looks at, parts of the state tree and numbers of pages (SPA / 4096) that no change of those moves: a machine in
    which none of them changed since the mark is not read again.
    """

    machine: str
    read: Callable[[Machine], tuple[Hashable, ...]]
    words: Callable[[tuple[Any, ...]], Iterable[str]] | None = None
    of: Callable[[Machine], tuple[Stateful | StateDict[Any, Any] | int, ...]] | None = None


class _Every:
    """The kinds of an oracle that looks after every step."""

    def __contains__(self, _kind: object) -> bool:
        return True


_EVERY = _Every()


class OracleSink:
    """Turns what an `InvariantViolation` or an oracle says into findings, at the step boundary and nowhere else.

    Attached to a machine by fuzzing and recording. After the first violation the machine is `tainted`: the oracles
    look once more, and the sequence is over.
    """

    __slots__ = ("_asked", "findings", "oracles", "tainted")

    def __init__(self, oracles: tuple[Oracle, ...] = ()) -> None:
        self.oracles = oracles
        self._asked: dict[type, tuple[Callable[[Machine, Record, Outcome], tuple[Finding, ...]], ...]] = {}
        self.findings: list[Finding] = []
        self.tainted = False

    def begin(self) -> None:
        """Start a sequence on a clean machine."""
        self.findings = []
        self.tainted = False

    def violation(self, error: InvariantViolation, step: Record) -> None:
        """Take a violation that ended a step."""
        self.findings.append(Finding("invariant", error.rule, error.message, spec_of(step).kind))
        self.tainted = True

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> None:
        """Let every oracle look that has something to say after such a step; none stops the others."""
        asked = self._asked.get(type(step))
        if asked is None:
            asked = self._asked[type(step)] = tuple(
                oracle.step_end for oracle in self.oracles if spec_of(step).kind in getattr(oracle, "after", _EVERY)
            )
        for step_end in asked:
            if found := step_end(machine, step, outcome):
                self.findings += found

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        """Let every oracle look at the end; returns all findings of the sequence."""
        for oracle in self.oracles:
            self.findings += oracle.sequence_end(machine)
        return tuple(self.findings)
