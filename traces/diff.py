"""Where two traces part."""

from __future__ import annotations

from itertools import zip_longest
from typing import NamedTuple

from sevlab.core.vocabulary import spec_of
from sevlab.traces.compare import first_difference, one_line, show
from sevlab.traces.reader import TraceReader
from sevlab.traces.schema import Entry, config_document


class Parting(NamedTuple):
    """The first entry that differs: `what` in words, with the entries around it in both traces."""

    number: int
    what: str
    before: tuple[tuple[int, Entry], ...]
    left: tuple[tuple[int, Entry], ...]
    right: tuple[tuple[int, Entry], ...]


def header_differences(left: TraceReader, right: TraceReader) -> list[str]:
    """In what the machines of two traces differ, in words."""
    one, other = (
        config_document(trace.header.config) | {"plugin versions": [list(plugin) for plugin in trace.header.plugins]}
        for trace in (left, right)
    )
    return [f"{name}: {one[name]!r} and {other[name]!r}" for name in one if one[name] != other[name]]


def diff(left: TraceReader, right: TraceReader, *, context: int = 3) -> Parting | None:
    """The first entry whose step, vCPU or checked outcome differs, with `context` entries around; None: there is none.

    Times are not compared: two runs of one guest never agree in them.
    """
    before: list[tuple[int, Entry]] = []
    for number, (one, other) in enumerate(zip_longest(left.numbered(), right.numbered())):
        what = _difference(number, one, other)
        if what:
            until = number + 1 + context
            sides = (tuple(trace.numbered(number, until)) for trace in (left, right))
            return Parting(number, what, tuple(before), *sides)
        before = [*before, one][-context:] if context else []
    return None


def _difference(number: int, left: tuple[int, Entry] | None, right: tuple[int, Entry] | None) -> str:
    for which, side in (("first", left), ("second", right)):
        if side is None:
            return f"the {which} trace ends"
        if side[0] != number:
            return f"entries {number} to {side[0] - 1} of the {which} trace are lost"
    assert left is not None
    assert right is not None
    one, other = left[1], right[1]
    if one.vcpu != other.vcpu:
        return f"vCPU {one.vcpu} and {other.vcpu}"
    spec = spec_of(one.step)
    if spec.kind != spec_of(other.step).kind:
        return f"step {spec.kind} and {spec_of(other.step).kind}"
    for field, value, found in zip(spec.fields, one.step, other.step, strict=True):
        if value != found:
            return f"step {spec.kind}.{field.name}: {show(value)} and {show(found)}"
    outcome = first_difference(one.outcome, other.outcome)
    return "" if outcome is None else f"outcome, {outcome}"


def entry_lines(number: int, entry: Entry) -> list[str]:
    """An entry in lines: its step, and its outcome indented."""
    return [f"{number:>8}  {one_line(entry.step)}", *(f"{'':>8}    -> {one_line(record)}" for record in entry.outcome)]
