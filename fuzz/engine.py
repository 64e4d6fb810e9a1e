"""What drives a campaign's loop: atheris where it is installed, else a loop of our own with the same state counters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple, Protocol

from sevlab.core.errors import CampaignError
from sevlab.core.plugins import PluginSet
from sevlab.core.vocabulary import Record
from sevlab.fuzz.runner import Run, Runner

ENGINES = ("atheris", "builtin")

Told = Callable[[Sequence[Record], Run], bool]
"""Called after each input with its steps and what it did; False ends the loop."""

Incoming = Callable[[], list[bytes]]


def nothing() -> list[bytes]:
    """No inputs from others."""
    return []


class Budget(NamedTuple):
    """When the loop ends: after seconds, after inputs (0: no limit); how long an input may be; the seed."""

    seconds: float = 0
    runs: int = 0
    max_bytes: int = 1 << 14
    seed: int = 1


class Engine(Protocol):
    """Makes inputs, runs them, and keeps those that reach something new. `name` is one of `ENGINES`."""

    name: str

    def prepare(self, plugins: PluginSet) -> int:
        """Instrument the handlers of `plugins`, before a machine is composed; returns how many functions were."""

    def fuzz(
        self, runner: Runner, corpus: Sequence[bytes], budget: Budget, told: Told, incoming: Incoming = nothing
    ) -> None:
        """Run until the budget is used up or `told` says so. An engine may end the process instead of returning.

        `incoming` gives inputs that others have kept meanwhile.
        """


def make_engine(name: str | None = None) -> Engine:
    """The engine of that name; None: the best there is. Raises `CampaignError` for one that is not there."""
    from sevlab.fuzz.atheris_engine import AtherisEngine
    from sevlab.fuzz.builtin_engine import BuiltinEngine

    here = find_spec("atheris") is not None
    if name == "builtin" or (name is None and not here):
        return BuiltinEngine()
    if name not in {None, "atheris"}:
        raise CampaignError(f"there is no engine {name!r}; there are {', '.join(ENGINES)}")
    if not here:
        raise CampaignError("atheris is not installed (pip install 'sevlab[fuzz]'); --engine builtin needs nothing")
    return AtherisEngine()
