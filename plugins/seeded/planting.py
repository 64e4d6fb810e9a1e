"""How a seeded bug gets into a machine: what it declares, its canary, and one replacement for each handler.

A bug is a function that wraps correct handlers. Where the fault makes a difference it asks `mark.triggers()`: that
counts, and is True only when the bug is live. In watch mode every bug therefore behaves correctly and only counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sevlab.core.state import StateDict, Stateful, new

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.dispatch import Registrar
    from sevlab.core.machine import Machine

COMPONENT = "seeded"
LIVE, WATCH = "live", "watch"
OVER = ("snp", "xen", "io", "sev_es", "sev")
"""Features that replace each other's handlers; a bug stands over them."""


class Counts(Stateful):
    """The canary of one bug: how often the faulty line ran, and how often it made a difference."""

    reached: int = 0
    triggered: int = 0


class SeededState(Stateful):
    """The canaries of a machine by bug, and what a faulty handler remembers."""

    canaries: StateDict[str, Counts] = new(StateDict)
    unbound: tuple[int, ...] = ()
    """Handles of guests that came in and could not be bound to an ASID."""


def seeded_state(machine: Machine) -> SeededState:
    """The canaries of `machine`; it has at least one seeded bug."""
    return cast("SeededState", machine.components[COMPONENT])


class Mark:
    """What a planted bug counts with; attached to its machine at boot, since not every handler is given that."""

    __slots__ = ("_live", "_name", "machine")

    machine: Machine

    def __init__(self, name: str, *, live: bool) -> None:
        self._name = name
        self._live = live

    def attach(self, machine: Machine) -> None:
        """Belong to `machine`."""
        self.machine = machine

    @property
    def _counts(self) -> Counts:
        return seeded_state(self.machine).canaries[self._name]

    @property
    def live(self) -> bool:
        """Whether the faulty code runs; else its shared reads are only points where another party may run."""
        return self._live

    def reached(self) -> None:
        """The faulty line runs."""
        self._counts.reached += 1

    def triggers(self) -> bool:
        """The fault makes a difference here; whether to let it."""
        self._counts.triggered += 1
        return self._live


Plant = Callable[["Planter", Mark], None]


class Bug(NamedTuple):
    """One published bug: `name` and title, its number in the catalogue, and the oracle that must fire.

    `stateful`: it needs state that code coverage does not tell apart; `contexts`: it needs two parties interleaved.
    """

    name: str
    title: str
    catalogue: int
    oracle: str
    plant: Plant
    stateful: bool = False
    contexts: bool = False

    @property
    def documentation(self) -> str:
        """What is left out, and the source."""
        return " ".join((self.plant.__doc__ or "").split())


class Planter:
    """Collects what bugs replace, so that several of them may stand around one handler."""

    def __init__(self, builder: PluginBuilder) -> None:
        self.builder = builder
        self._wraps: dict[tuple[str, Any], list[Callable[[Any], Any]]] = {}

    def replace(self, registry: str, key: Any, make: Callable[[Any], Any]) -> None:
        """Put `make(handler)` around the handler of `key` in the registry of that name."""
        self._wraps.setdefault((registry, key), []).append(make)

    def event(self, code: int, make: Callable[[Any], Any]) -> None:
        """Put `make(handler)` around the handler of a NAE event, whose declaration stays."""
        self.replace("nae_events", code, lambda event: event._replace(handler=make(event.handler)))

    def command(self, number: int, make: Callable[[Any], Any]) -> None:
        """Put `make(handler)` around the handler of a SEV mailbox command."""
        self.replace("asp_commands", ("sev", int(number)), lambda entry: entry._replace(handler=make(entry.handler)))

    def apply(self) -> None:
        """Register everything."""
        for (registry, key), makes in self._wraps.items():
            registrar: Registrar[Any, Any] = getattr(self.builder, registry)
            registrar.replace(key, _chain(makes), over=OVER)


def _chain(makes: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def make(handler: Any) -> Any:
        for one in makes:
            handler = one(handler)
        return handler

    return make


def plant(builder: PluginBuilder, bugs: tuple[Bug, ...], mode: str) -> None:
    """Plant `bugs` into the machine that is being composed."""
    state = SeededState()
    planter = Planter(builder)
    for bug in bugs:
        state.canaries[bug.name] = Counts()
        mark = Mark(bug.name, live=mode == LIVE)
        builder.at_boot(mark.attach)
        bug.plant(planter, mark)
    planter.apply()
    builder.component(state, COMPONENT)
