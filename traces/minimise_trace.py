"""The smallest sub-trace that still shows a finding or a divergence of a recording."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sevlab.core.errors import ConfigError, TraceFormatError
from sevlab.core.oracle import Oracle
from sevlab.core.vocabulary import Record
from sevlab.traces.compare import first_difference
from sevlab.traces.minimise import drop_items, minimise
from sevlab.traces.reader import TraceReader
from sevlab.traces.record import vcpu_of
from sevlab.traces.records import Found, Violation
from sevlab.traces.replay_recorded import Divergence, machine_of, perform
from sevlab.traces.schema import Entry
from sevlab.traces.writer import TraceWriter


class Wanted(NamedTuple):
    """What the smaller trace must still show: a finding's oracle and rule. A violation's oracle is `invariant`."""

    oracle: str
    rule: str


def findings(entries: Iterable[Entry]) -> list[Wanted]:
    """What a trace shows, in order, each once."""
    return list(dict.fromkeys(found for entry in entries for found in _shown(entry.outcome)))


def _shown(outcome: tuple[Record, ...]) -> list[Wanted]:
    found = [Wanted(record.oracle, record.rule) for record in outcome if isinstance(record, Found)]
    return found + [Wanted("invariant", record.rule) for record in outcome if isinstance(record, Violation)]


def minimise_finding(
    reader: TraceReader,
    wanted: Wanted,
    *,
    given: Mapping[str, Any] | None = None,
    oracles: Iterable[Oracle] = (),
) -> list[Entry]:
    """The fewest and simplest steps of `reader` that show `wanted`, with the outcomes they have now.

    Raises `ConfigError` when replaying the whole trace does not show it.
    """
    machine = machine_of(reader.header, given=given, oracles=tuple(oracles))
    booted = machine.snapshot()

    def run(steps: Iterable[Record]) -> list[tuple[Record, tuple[Record, ...]]]:
        machine.reset()
        if machine.snapshot() != booted:  # a step of the trace moved the mark
            machine.restore(booted)
            machine.mark()
        return [(step, perform(machine, step)) for step in steps]

    def shows(steps: tuple[Record, ...]) -> bool:
        try:
            return any(wanted in _shown(outcome) for _, outcome in run(steps))
        except TraceFormatError:  # a state that needs what a dropped step made
            return False

    entries = list(reader)
    steps = tuple(entry.step for entry in entries)
    if not shows(steps):
        known = ", ".join(f"{found.oracle} {found.rule}" for found in findings(entries)) or "no finding"
        raise ConfigError(f"{reader.name}: replaying it does not show {wanted.oracle} {wanted.rule}; it holds {known}")
    return [Entry(0, vcpu_of(step), step, outcome) for step, outcome in run(minimise(steps, shows))]


def minimise_divergence(
    reader: TraceReader, wanted: Divergence, *, given: Mapping[str, Any] | None = None, oracles: Iterable[Oracle] = ()
) -> list[Entry]:
    """The fewest entries of `reader` whose replay still differs as `wanted` does, in the same entry and field."""
    oracles = tuple(oracles)

    def shows(entries: tuple[Entry, ...]) -> bool:
        machine = machine_of(reader.header, given=given, oracles=oracles)
        try:
            found = [perform(machine, entry.step) for entry in entries]
        except TraceFormatError:
            return False
        difference = first_difference(target.outcome, found[-1])
        return entries[-1] is target and difference is not None and difference[:3] == wanted.difference[:3]

    entries = list(reader.entries(0, wanted.number + 1))
    target = entries[-1]
    return list(drop_items(entries, shows))


def write_part(
    reader: TraceReader, entries: Iterable[Entry], target: str | Path | BinaryIO, *, overwrite: bool = False
) -> int:
    """Write `entries` as a trace with the header of `reader`; returns their number."""
    with TraceWriter(target, reader.header, vocabulary=reader.vocabulary, overwrite=overwrite) as writer:
        for entry in entries:
            writer.append(entry)
    return writer.entries
