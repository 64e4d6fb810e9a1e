"""Replay of an imported log: every exchange through `Machine.apply`, every checked value compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from sevlab.core.config import GuestConfig, MachineConfig
from sevlab.core.events import GuestExit
from sevlab.core.machine import Machine
from sevlab.core.svm import exit_name
from sevlab.traces.importers.catalogue import GUEST_BYTES, MAX_VCPUS
from sevlab.traces.importers.log_records import Entered, XenEvent
from sevlab.traces.replay import xen_checks
from sevlab.traces.replay.kvm_checks import (
    COMPARATORS,
    HOST_BUSINESS,
    Comparison,
    Context,
    Exchange,
    lines_set,
    remember,
)
from sevlab.traces.replay.rules import explanation
from sevlab.traces.replay.tally import Divergence, Tally
from sevlab.traces.schema import Entry


def machine_config(vcpus: int = MAX_VCPUS) -> MachineConfig:
    """The machine that replays a log of KVM."""
    return MachineConfig(plugins=("captured",), guests=(GuestConfig(vcpus=vcpus, memory_bytes=GUEST_BYTES),))


CHECKS: dict[type, Callable[[Exchange, Any], Iterator[Comparison]]] = {**COMPARATORS, XenEvent: xen_checks.event}
"""What compares which record."""

KEEP_EVERY = 10_000

NONE = frozenset(("",))
"""Classes that no exit has."""


class Replay:
    """Replays entries one by one; `tally` counts."""

    def __init__(self, machine: Machine | None = None) -> None:
        self.machine = machine or Machine(machine_config())
        self.tally = Tally()
        self.context = Context()
        self.entries = 0
        """How many entries of the log are behind it."""
        self._x = Exchange(self.context, self.tally.reads)
        self._classes: dict[int, str] = {}

    def run(
        self,
        entries: Iterable[Entry],
        *,
        until: int | None = None,
        only: frozenset[str] = frozenset(),
        stop_at_first: bool = False,
        start: int = 0,
        progress: Callable[[int], None] | None = None,
        keep: Callable[[Replay], None] | None = None,
    ) -> Tally:
        """Replay `entries` from the one numbered `self.entries` on, up to exchange number `until`.

        `only` compares exits of these classes, `start` those from this exchange on. Every exchange is applied, compared
        or not: the next ones depend on its state. `keep` is called every so many exchanges while nothing diverges.
        """
        tally, done = self.tally, self.done
        for number, entry in enumerate(entries, self.entries + 1):
            if type(entry.step) is GuestExit:
                if until is not None and done >= until:
                    break
                self.exchange(entry, NONE if done < start else only)
                done += 1
                if progress is not None and not done % 1000:
                    progress(done)
                if keep is not None and not done % KEEP_EVERY and not tally.divergences:
                    self.entries = number
                    keep(self)
                if stop_at_first and tally.divergences:
                    break
            else:
                self._host(entry)
        return tally

    @property
    def done(self) -> int:
        """How many exchanges were applied."""
        return self._x.number + 1

    @done.setter
    def done(self, exchanges: int) -> None:
        self._x.number = exchanges - 1

    def _host(self, entry: Entry) -> None:
        for record in entry.outcome:
            self.tally.host_lines += 1
            for check, recorded, computed in lines_set(self._x.context, record):
                self._compare("host", check, recorded, computed, entry, ())

    def exchange(self, entry: Entry, only: frozenset[str] = frozenset()) -> None:
        """Apply one exchange and compare."""
        step, recorded = cast("GuestExit", entry.step), entry.outcome
        outcome = self.machine.apply(step).records
        exit_class = self._classes.get(step.exit_code)
        if exit_class is None:
            exit_class = self._classes[step.exit_code] = exit_name(step.exit_code).lower()
        x, tally = self._x, self.tally
        x.begin(step, recorded, outcome)
        tally.exchanges[exit_class] += 1
        for what in x.supplied:
            tally.inputs[exit_class, what] += 1
        if not only or exit_class in only:
            before = tally.checked
            compared = 0
            for record in recorded:
                kind = type(record)
                comparator = CHECKS.get(kind)
                if comparator is not None:
                    begun = compared
                    for check, was, now in comparator(x, record):
                        compared += 1
                        before[exit_class, check] += 1
                        if was != now:
                            self._differs(exit_class, check, was, now, entry, outcome)
                    if kind is XenEvent and compared == begun:
                        self._account(exit_class, record)
                elif kind not in HOST_BUSINESS and kind is not Entered:
                    tally.unchecked[exit_class, kind.SPEC.kind] += 1  # type: ignore[attr-defined]  # a record
                for check, was, now in lines_set(x.context, record):
                    self._compare(exit_class, check, was, now, entry, outcome)
            if not compared:
                tally.bare[exit_class] += 1
        remember(x)

    def _account(self, exit_class: str, record: Any) -> None:
        """A record of Xen's of which nothing was compared."""
        how, name = xen_checks.account(self._x, record)
        if how:
            counter = self.tally.inputs if how == "input" else self.tally.unchecked
            counter[exit_class, name] += 1

    def _compare(self, exit_class: str, check: str, was: Any, now: Any, entry: Entry, outcome: Any) -> None:
        self.tally.checked[exit_class, check] += 1
        if was != now:
            self._differs(exit_class, check, was, now, entry, outcome)

    def _differs(self, exit_class: str, check: str, was: Any, now: Any, entry: Entry, outcome: Any) -> None:
        rule = explanation(self._x, check, was, now) if exit_class != "host" else ""
        if rule:
            self.tally.explained[rule] += 1
        else:
            self.tally.diverges(
                Divergence(self._x.number, exit_class, check, was, now, entry.step, (entry.outcome, outcome))
            )
