"""Replay our own recordings: compose the machine again, apply each step, compare each outcome.

Unlike a captured guest, a recording holds everything that went in, so every entry is checked and nothing is expected
to differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from sevlab.core.errors import ConfigError, InvariantViolation, TraceFormatError
from sevlab.core.machine import Machine
from sevlab.core.oracle import Oracle, OracleSink
from sevlab.core.plugins import load
from sevlab.core.vocabulary import Record, spec_of
from sevlab.traces.compare import Difference, first_difference
from sevlab.traces.machine_state import unpack_pages, unpack_snapshot
from sevlab.traces.reader import TraceReader
from sevlab.traces.records import End, Found, Mark, Pages, Reset, State, Unwritable, Violation
from sevlab.traces.schema import Entry, Header


class Divergence(NamedTuple):
    """An entry whose outcome came out otherwise than recorded."""

    number: int
    entry: Entry
    outcome: tuple[Record, ...]
    difference: Difference

    def __str__(self) -> str:
        return f"entry {self.number}: {self.difference}"


class Replayed(NamedTuple):
    """The result: how many entries and outcome records were compared, and every divergence."""

    entries: int
    records: int
    divergences: tuple[Divergence, ...]


def machine_of(header: Header, *, given: Mapping[str, Any] | None = None, oracles: Iterable[Oracle] = ()) -> Machine:
    """The machine that a recording was made of, with a sink when it had one.

    `given` maps plugin names to modules that are not installed, `oracles` are those that no plugin brings. Raises
    `PluginError` for a missing plugin, `ConfigError` for a missing oracle.
    """
    names = [*header.config.plugins, *(plugin.name for plugin in header.plugins)]
    plugins = load([*dict.fromkeys(names), *(given or {})], given=given)
    machine = Machine(header.config, plugins=plugins)
    if header.oracles is not None:
        known = {oracle.name: oracle for found in plugins.call("sevlab_oracles").values() for oracle in found}
        known |= {oracle.name: oracle for oracle in oracles}
        missing = [name for name in header.oracles if name not in known]
        if missing:
            raise ConfigError(f"no plugin of the trace brings the oracle {missing[0]!r}; there are {', '.join(known)}")
        machine.sink = OracleSink(tuple(known[name] for name in header.oracles))
        machine.fetches.keep_log(keep=True)  # what the oracle of single fetches looks at
    return machine


def perform(machine: Machine, step: Record) -> tuple[Record, ...]:
    """Do to `machine` what a recorded step says; returns the outcome in the words of a recording."""
    sink = machine.sink
    before = 0 if sink is None else len(sink.findings)
    control = CONTROLS.get(type(step))
    records: tuple[Record, ...] = ()
    if control is not None:
        control(machine, step)
        before = 0 if type(step) is Reset else before
    else:
        try:
            records = machine.apply(step).records
        except Exception as error:  # noqa: BLE001  # recorded as what it is, and compared
            return (
                Violation(error.rule if isinstance(error, InvariantViolation) else type(error).__name__, str(error)),
            )
    return records + (() if sink is None else tuple(Found(*finding) for finding in sink.findings[before:]))


def _end(machine: Machine, _step: Any) -> None:
    if machine.sink is not None:
        machine.sink.sequence_end(machine)


def _put_pages(machine: Machine, step: Any) -> None:
    try:
        image = machine.memory.capture()
        pages = dict(image.pages) | dict(unpack_pages(step.pages))
        machine.memory.restore(image._replace(pages=tuple(pages.items())))
    except KeyError as error:
        raise TraceFormatError(f"pages: no memory key {error} in the state that they belong to") from error


CONTROLS: Mapping[type, Callable[[Machine, Any], None]] = {
    Reset: lambda machine, _step: machine.reset(),
    Mark: lambda machine, _step: machine.mark(),
    State: lambda machine, step: machine.restore(unpack_snapshot(step.snapshot, machine.snapshot())),
    Pages: _put_pages,
    End: _end,
    Unwritable: lambda _machine, _step: None,
}


def outcomes(machine: Machine, entries: Iterable[Entry]) -> Iterator[tuple[Entry, tuple[Record, ...]]]:
    """Each entry with the outcome that `machine` gives now."""
    for entry in entries:
        yield entry, perform(machine, entry.step)


def replay_recorded(
    reader: TraceReader,
    *,
    given: Mapping[str, Any] | None = None,
    oracles: Iterable[Oracle] = (),
    stop_at_first: bool = False,
    until: int | None = None,
    only: frozenset[str] = frozenset(),
) -> Replayed:
    """Replay a recording up to entry `until`; `only` compares the outcomes of these kinds of steps, if any are named.

    Raises `TraceFormatError` when a record kind of the trace is declared otherwise here, or when entries before the
    end are lost: what follows a gap would start from another state.
    """
    used = reader.index.kinds if reader.index is not None else {}
    for kind, reason in reader.foreign.items():
        if kind in used or reader.index is None:
            raise TraceFormatError(f"{reader.name}: records of kind {kind!r}: {reason}")
    machine = machine_of(reader.header, given=given, oracles=oracles)
    divergences: list[Divergence] = []
    count = records = 0
    for number, entry in reader.numbered(0, until):
        if number != count:
            raise TraceFormatError(
                f"{reader.name}: entries {count} to {number - 1} are lost; what follows cannot replay"
            )
        outcome = perform(machine, entry.step)
        count += 1
        records += len(outcome)
        if only and spec_of(entry.step).kind not in only:
            continue
        difference = first_difference(entry.outcome, outcome)
        if difference is not None:
            divergences.append(Divergence(number, entry, outcome, difference))
            if stop_at_first:
                break
    return Replayed(count, records, tuple(divergences))
