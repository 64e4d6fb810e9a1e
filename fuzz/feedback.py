"""State feedback: what a run reached, as coordinates (state machine, state, message, result).

Two handlers that run the same lines in other states look the same to code coverage; here they do not. Each coordinate
that was not seen before counts. Atheris gets them as its own counters, which is the one place that touches its private
interface (`AtherisCounters`); the built-in engine asks only whether something was new.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

from sevlab.core.plugins import PluginSet
from sevlab.core.vocabulary import Outcome, Record, Role, spec_of
from sevlab.fuzz.messages import Messages

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

EXACT_BELOW = 0x1000
"""Numbers of a result below this count as they are, larger ones by their length."""

RESULT_NUMBERS = 2
"""So many checked numbers of an outcome record belong to the result."""

RESULT_RECORDS = 3
MAX_STATES = 4
"""Of one state machine: the distinct states that count, in order."""

COUNTERS = 1 << 13
"""Counters that atheris is asked for."""


class Coordinate(NamedTuple):
    """One thing that can be reached."""

    machine: str
    state: tuple[str, ...]
    message: str
    result: tuple[Any, ...]


class Feedback:
    """Watches one machine; `begin` after each reset, `step` after each step."""

    def __init__(self, machine: Machine, plugins: PluginSet, messages: Messages) -> None:
        self._machine = machine
        self._messages = messages
        self._readers = [
            (counter.machine, counter.read)
            for counters in plugins.call("sevlab_state_counters").values()
            for counter in counters
        ]
        self._numbers: dict[type, tuple[int, ...]] = {}
        self.seen: dict[Coordinate, int] = {}
        """Every coordinate that was reached, with how often a step reached it."""
        self.transitions: set[tuple[str, tuple[str, ...], tuple[str, ...]]] = set()
        self._now: list[tuple[str, ...]] = []
        self._booted: list[tuple[str, ...]] | None = None
        self.counters: AtherisCounters | None = None

    @property
    def machines(self) -> tuple[str, ...]:
        """The state machines that are read."""
        return tuple(name for name, _ in self._readers)

    @property
    def states(self) -> set[tuple[str, tuple[str, ...]]]:
        """Every state that was reached."""
        return {(key.machine, key.state) for key in self.seen}

    @property
    def state_words(self) -> str:
        """The present state of all machines in words: part of a finding's identity."""
        return " ".join(
            f"{name}={'+'.join(state)}" for (name, _), state in zip(self._readers, self._now, strict=True) if state
        )

    def begin(self) -> None:
        """The machine is in its booted state again."""
        if self._booted is None:
            self._booted = self._read()
        self._now = self._booted

    def _read(self) -> list[tuple[str, ...]]:
        machine = self._machine
        return [tuple(sorted(set(read(machine)))[:MAX_STATES]) for _, read in self._readers]

    def step(self, step: Record, outcome: Outcome) -> int:
        """Count where a step led; returns how many coordinates are new."""
        number = self._messages.number_of(step)
        kind = spec_of(step).kind
        message = kind if number is None else f"{kind}:{number:#x}"
        result = tuple(self._result(record) for record in outcome.records[:RESULT_RECORDS])
        before = self._now
        now = self._now = self._read()
        new = 0
        seen, counters = self.seen, self.counters
        for position, (name, _) in enumerate(self._readers):
            state = before[position]
            key = Coordinate(name, state, message, result)
            count = seen.get(key, 0)
            seen[key] = count + 1
            if not count:
                new += 1
                if now[position] != state:
                    self.transitions.add((name, state, now[position]))
            if counters is not None:
                counters.hit(key)
        if not self._readers:
            key = Coordinate("", (), message, result)
            new += key not in seen
            seen[key] = seen.get(key, 0) + 1
            if counters is not None:
                counters.hit(key)
        return new

    def _result(self, record: Record) -> tuple[Any, ...]:
        """The kind of an outcome and its first checked numbers."""
        kind = type(record)
        places = self._numbers.get(kind)
        if places is None:
            fields = spec_of(record).fields
            chosen = [
                at for at, field in enumerate(fields) if field.role is Role.CHECKED and issubclass(field.type, int)
            ]
            places = self._numbers[kind] = tuple(chosen[:RESULT_NUMBERS])
        values = [record[at] for at in places]
        return (spec_of(record).kind, *(value if value < EXACT_BELOW else -value.bit_length() for value in values))


class AtherisCounters:
    """Hands coordinates to atheris as if each were a branch of the code.

    Uses `atheris._reserve_counter` and `atheris._trace_branch`, what its own instrumentation calls; both are private,
    so `__init__` tries them. Raises `ImportError` that says what is missing.
    """

    def __init__(self) -> None:
        import atheris

        try:
            self._trace = atheris._trace_branch  # noqa: SLF001  # there is no public way to add a counter
            reserve = atheris._reserve_counter  # noqa: SLF001
        except AttributeError as error:
            raise ImportError(f"this atheris has no counters to give: {error}") from error
        self._counters = [reserve() for _ in range(COUNTERS)]
        if len(set(self._counters)) != COUNTERS:
            raise ImportError("this atheris gives the same counter twice")
        self._indices: dict[Coordinate, int] = {}

    def hit(self, key: Coordinate) -> None:
        """Count one coordinate; which counter it has depends on nothing but the coordinate."""
        index = self._indices.get(key)
        if index is None:
            index = self._indices[key] = self._counters[crc32(repr(key).encode()) % COUNTERS]
        self._trace(index)
