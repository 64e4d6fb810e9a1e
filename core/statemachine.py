"""State machines as tables: every legal pair of state and message, and nothing else.

The theory is short. A machine is in one state; a message either has a row there, and then the row says the next
state, or it has none, and then the architecture's rejection status is the answer and nothing changes. The table holds
*every* legal pair, also those that stay where they are. Guards and effects are named functions beside the table; they
may refuse a message for other reasons, but they never add a pair.

The table knows no machine: the current state is a field of machine state, and `next` is a pure look-up. From the same
table come the handlers' first check, the documentation's diagrams, the test that walks every pair, and the
coordinates of state feedback.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from types import MappingProxyType
from typing import Generic, NamedTuple, NoReturn, TypeVar

from sevlab.core.errors import PluginError

S = TypeVar("S", bound=Enum)
M = TypeVar("M", bound=Enum)
R = TypeVar("R")


class Pair(NamedTuple, Generic[S, M]):
    """One cell: `target` is None when the message is rejected in this state."""

    state: S
    message: M
    target: S | None


class StateMachine(Generic[S, M, R]):
    """An immutable table. `reject` is the status of every pair that the table does not hold.

    Look-ups hash the members: an IntEnum hashes as its number (0.1 us a look-up), a plain Enum in Python (0.25 us).
    `messages` lists the messages that the machine knows; left out, it is those that occur in the table.
    Raises `PluginError` for a target without a row, mixed enumerations, or an initial state without a row.
    """

    __slots__ = ("_flat", "initial", "messages", "name", "reject", "states", "table")

    name: str
    initial: S
    reject: R
    table: Mapping[S, Mapping[M, S]]
    states: tuple[S, ...]
    messages: tuple[M, ...]
    _flat: dict[tuple[S, M], S]

    def __init__(
        self,
        *,
        name: str,
        initial: S,
        reject: R,
        table: Mapping[S, Mapping[M, S]],
        messages: tuple[M, ...] = (),
    ) -> None:
        rows = {state: MappingProxyType(dict(row)) for state, row in table.items()}
        occurring = (message for row in rows.values() for message in row)
        settle = super().__setattr__  # our own refuses
        settle("name", name)
        settle("initial", initial)
        settle("reject", reject)
        settle("table", MappingProxyType(rows))
        settle("states", tuple(rows))
        settle("messages", tuple(dict.fromkeys((*messages, *occurring))))
        settle("_flat", {(state, message): target for state, row in rows.items() for message, target in row.items()})
        if initial not in self.table:
            raise PluginError(f"state machine {name!r}: the initial state {initial!r} has no row")
        for (state, message), target in self._flat.items():
            if target not in self.table:
                raise PluginError(
                    f"state machine {name!r}: {state!r} on {message!r} leads to {target!r}, which has no row"
                )
        for kind, members in (("state", self.states), ("message", self.messages)):
            if len({type(member) for member in members}) > 1:
                raise PluginError(f"state machine {name!r}: the {kind}s come from more than one enumeration")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"state machine {self.name!r} is immutable; use extended(...)")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"state machine {self.name!r} is immutable; use extended(...)")

    def next(self, state: S, message: M) -> S | None:
        """The state after `message`, or None when it is rejected (answer `reject`, change nothing)."""
        return self._flat.get((state, message))

    def allows(self, state: S, message: M) -> bool:
        """Whether the table holds this pair."""
        return (state, message) in self._flat

    def pairs(self) -> Iterator[Pair[S, M]]:
        """Every state with every message, legal or not."""
        for state in self.states:
            for message in self.messages:
                yield Pair(state, message, self._flat.get((state, message)))

    def rejected_pairs(self) -> Iterator[tuple[S, M]]:
        """Every state with every message that it rejects: what `reject` answers."""
        return ((pair.state, pair.message) for pair in self.pairs() if pair.target is None)

    def unreachable(self) -> tuple[S, ...]:
        """States that no sequence of messages reaches from the initial one."""
        reached = {self.initial}
        todo = [self.initial]
        while todo:
            for target in self.table[todo.pop()].values():
                if target not in reached:
                    reached.add(target)
                    todo.append(target)
        return tuple(state for state in self.states if state not in reached)

    def extended(self, name: str, table: Mapping[S, Mapping[M, S]]) -> StateMachine[S, M, R]:
        """This machine with more pairs. Raises `PluginError` when a pair is there already with another target."""
        merged = {state: dict(row) for state, row in self.table.items()}
        for state, row in table.items():
            for message, target in row.items():
                before = merged.setdefault(state, {}).setdefault(message, target)
                if before is not target:
                    raise PluginError(
                        f"state machine {name!r}: {state!r} on {message!r} leads to {target!r},"
                        f" but in {self.name!r} to {before!r}"
                    )
        return StateMachine(name=name, initial=self.initial, reject=self.reject, table=merged, messages=self.messages)

    def mermaid(self) -> str:
        """The diagram of the table as Mermaid text; messages between the same two states share an arrow."""
        arrows: dict[tuple[S, S], list[str]] = {}
        for (state, message), target in self._flat.items():
            arrows.setdefault((state, target), []).append(message.name)
        lines = ["stateDiagram-v2", f"    [*] --> {self.initial.name}"]
        lines += [
            f"    {state.name} --> {target.name}: {', '.join(names)}" for (state, target), names in arrows.items()
        ]
        return "\n".join(lines)

    def markdown_table(self) -> str:
        """The table for documentation: a row for each message, a column for each state; a dash is a rejection."""
        head = ["Message", *(state.name for state in self.states)]
        rows = [head, ["---"] * len(head)]
        for message in self.messages:
            cells = [self._flat.get((state, message)) for state in self.states]
            rows.append([message.name, *("-" if target is None else target.name for target in cells)])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
