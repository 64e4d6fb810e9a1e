"""State feedback: what a run reached, as coordinates (state machine, state, message, result) and changes of state.

Two handlers that run the same lines in other states look the same to code coverage; here they do not. Whatever was not
seen before counts. Atheris gets it as counters of its own (`atheris_counters`); the built-in engine asks only whether
something was new.

This runs after every step, so the usual step costs one look-up: what it was, where it began, what it gave and where it
ended, all as they are. Only a combination that is new is put into words and compared with what was reached.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from enum import Enum
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from sevlab.core.plugins import PluginSet
from sevlab.core.state import parts
from sevlab.core.units import MASK64
from sevlab.core.vocabulary import Outcome, Record, Role, spec_of
from sevlab.fuzz.messages import Messages

if TYPE_CHECKING:
    from sevlab.core.machine import Machine
    from sevlab.core.oracle import StateCounter
    from sevlab.fuzz.atheris_counters import AtherisCounters

EXACT = 0x100
"""Numbers of a result below this, or as little below 2^64, count as they are, others by their length."""

RESULT_NUMBERS = 2
"""So many checked numbers of an outcome record belong to the result."""

RESULT_RECORDS = 3
MAX_STATES = 4
"""Of one state machine: the distinct states that count, in order."""

MAX_REMEMBERED = 1 << 15
"""Combinations that are remembered as they are; beyond, they are put into words once more."""

NOBODY: frozenset[int] = frozenset()

Raw: TypeAlias = tuple[tuple[Hashable, ...], ...]
"""The present state of every state machine, as read."""


class Coordinate(NamedTuple):
    """One thing that can be reached."""

    machine: str
    state: tuple[str, ...]
    message: str
    result: tuple[Any, ...]


class Edge(NamedTuple):
    """A change of state."""

    machine: str
    before: tuple[str, ...]
    after: tuple[str, ...]


class Feedback:
    """Watches one machine; `begin` after each reset, `step` after each step."""

    def __init__(self, machine: Machine, plugins: PluginSet, messages: Messages) -> None:
        self._machine = machine
        self._number_of = messages.number_of
        self._counters: tuple[StateCounter, ...] = tuple(
            counter for counters in plugins.call("sevlab_state_counters").values() for counter in counters
        )
        self._readers = tuple(enumerate(counter.read for counter in self._counters))
        self._always = {number for number, counter in enumerate(self._counters) if counter.of is None}
        self._readers_of: dict[int, set[int]] = {}
        """By identity of a part of the state: the numbers of the readers that look at it."""
        self._pages: list[tuple[int, set[int]]] = []
        self._getters: dict[type, Callable[[Record], Any]] = {}
        self._remembered: dict[tuple[Any, ...], tuple[int, ...]] = {}
        self.reached: dict[Coordinate | Edge, int] = {}
        """Everything that was reached, in order, with its number for atheris (0 without it)."""
        self._raws: list[Raw] = []
        """Every state that was met, as read; the first is the booted one."""
        self._numbers: dict[Raw, int] = {}
        self._worded: dict[int, tuple[tuple[str, ...], ...]] = {}
        self._now = 0
        self._live = self._always
        self._looked = 0
        self.counters: AtherisCounters | None = None

    @property
    def machines(self) -> tuple[str, ...]:
        """The state machines that are read."""
        return tuple(counter.machine for counter in self._counters)

    @property
    def coordinates(self) -> Iterator[Coordinate]:
        """Every coordinate that was reached, in order."""
        return (key for key in self.reached if isinstance(key, Coordinate))

    @property
    def edges(self) -> set[Edge]:
        """Every change of state that was reached."""
        return {key for key in self.reached if isinstance(key, Edge)}

    @property
    def states(self) -> set[tuple[str, tuple[str, ...]]]:
        """Every state that was reached."""
        return {(key.machine, key.state) for key in self.coordinates} | {
            (edge.machine, edge.after) for edge in self.edges
        }

    @property
    def state_words(self) -> str:
        """The present state of all machines in words: part of a finding's identity."""
        now = self._words(self._now)
        return " ".join(f"{name}={'+'.join(state)}" for name, state in zip(self.machines, now, strict=True) if state)

    def begin(self) -> None:
        """The machine is in its booted state again."""
        if not self._raws:
            self._watch()
        elif len(self._remembered) >= MAX_REMEMBERED or len(self._raws) >= MAX_REMEMBERED:
            del self._raws[1:]
            self._worded.clear()
            self._numbers = {self._raws[0]: 0}
            self._remembered.clear()
        self._now = 0
        self._live = self._always
        self._looked = 0

    def _watch(self) -> None:
        """Read the booted state, and note whose change makes which reader read again."""
        machine = self._machine
        self._raws.append(tuple(read(machine) for _, read in self._readers))
        self._numbers[self._raws[0]] = 0
        pages: dict[int, set[int]] = {}
        for number, counter in enumerate(self._counters):
            for item in () if counter.of is None else counter.of(machine):
                if isinstance(item, int):
                    pages.setdefault(item, set()).add(number)
                    continue
                for part in parts(item):
                    self._readers_of.setdefault(id(part), set()).add(number)
        self._pages = list(pages.items())

    def _read(self) -> int:
        """The number of the present state; what has not changed since the boot is not read."""
        machine = self._machine
        changed = machine.changed
        if len(changed) != self._looked:
            for item in changed[self._looked :]:
                self._live = self._live | self._readers_of.get(id(item), NOBODY)
            self._looked = len(changed)
        if self._pages:
            written = machine.memory.written()
            for pfn, readers in self._pages:
                if pfn in written:
                    self._live = self._live | readers
        live, booted = self._live, self._raws[0]
        if not live:
            return 0
        raw = tuple([read(machine) if number in live else booted[number] for number, read in self._readers])
        found = self._numbers.get(raw)
        if found is None:
            found = self._numbers[raw] = len(self._raws)
            self._raws.append(raw)
        return found

    def _words(self, state: int) -> tuple[tuple[str, ...], ...]:
        """The state of that number in words, made once."""
        words = self._worded.get(state)
        if words is None:
            raws = zip(self._counters, self._raws[state], strict=True)
            words = self._worded[state] = tuple(words_of(counter, raw) for counter, raw in raws)
        return words

    def step(self, step: Record, outcome: Outcome) -> int:
        """Count where a step led; returns how much of it is new."""
        getters = self._getters
        before = self._now
        self._now = now = self._read()
        results = []
        for record in outcome.records[:RESULT_RECORDS]:
            kind = type(record)
            getter = getters.get(kind) or self._getter(kind)
            results.append((kind, getter(record)))
        key = (type(step), self._number_of(step), before, now, *results)
        numbers = self._remembered.get(key)
        new = 0
        if numbers is None:
            numbers, new = self._learn(key, results)
        if self.counters is not None:
            self.counters.count(numbers)
        return new

    def _getter(self, kind: type) -> Callable[[Record], Any]:
        """Takes the first checked numbers of an outcome record."""
        places = [
            at
            for at, field in enumerate(spec_of(kind).fields)
            if field.role is Role.CHECKED and issubclass(field.type, int)
        ][:RESULT_NUMBERS]
        getter: Callable[[Record], Any] = itemgetter(*places) if places else lambda _record: ()
        self._getters[kind] = getter
        return getter

    def _learn(self, key: tuple[Any, ...], results: list[tuple[type, Any]]) -> tuple[tuple[int, ...], int]:
        """The counters of a combination that is met for the first time, and how much of it is new."""
        kind, number, before, now = spec_of(key[0]).kind, *key[1:4]
        message = kind if number is None else f"{kind}:{number:#x}"
        result = tuple(_result(*item) for item in results)
        found: list[Coordinate | Edge] = []
        for counter, was, is_ in zip(self._counters, self._words(before), self._words(now), strict=True):
            found.append(Coordinate(counter.machine, was, message, result))
            if was != is_:
                found.append(Edge(counter.machine, was, is_))
        if not self._counters:
            found.append(Coordinate("", (), message, result))
        fresh = [item for item in found if item not in self.reached]
        for item in fresh:
            self.reached[item] = 0 if self.counters is None else self.counters.of(item)
        numbers = self._remembered[key] = tuple(self.reached[item] for item in found)
        return numbers, len(fresh)


def words_of(counter: StateCounter, raw: tuple[Any, ...]) -> tuple[str, ...]:
    """What a counter read, in words: each once, in order."""
    words = counter.words(raw) if counter.words is not None else raw
    return tuple(sorted({word.name if isinstance(word, Enum) else str(word) for word in words})[:MAX_STATES])


def exact(value: int) -> int:
    """A number of a result as far as it counts: an error of a call is a small number below zero."""
    if value < EXACT:
        return value
    return -value.bit_length() if value <= MASK64 - EXACT else value


def _result(kind: type, values: Any) -> tuple[Any, ...]:
    """The kind of an outcome and its first checked numbers."""
    numbers = values if isinstance(values, tuple) else (values,)
    return (spec_of(kind).kind, *(exact(value) for value in numbers))
