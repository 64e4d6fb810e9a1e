"""The events of KVM, each declared once: its record, and the layouts in which it has been printed.

An event keeps what its line says and nothing else; a number that a version does not print is an empty tuple. Signed
numbers are 64-bit two's complement, `tsc_shift` 8-bit, as the ring buffer holds it. Kinds are the event's name with
`kvm.` in front.

Source: Linux arch/x86/kvm/trace.h and include/trace/events/kvm.h (6.1, 6.12, development tree), trace-cmd's kvm plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeVar

from sevlab.core.vocabulary import Boundary, outcome, spec_of
from sevlab.traces.importers.patterns import compile_layout

R = TypeVar("R", bound=type)


class Event(NamedTuple):
    """One tracepoint: its name, the record of it, and its layouts, the usual one first."""

    name: str
    record: type
    templates: tuple[str, ...]
    absent: dict[str, Any]
    """What the fields hold that a layout does not have."""

    def parsers(self) -> tuple[Callable[[str], Any | None], ...]:
        """A function for each layout: the record of a text, None for one of another layout."""
        return tuple(compile_layout(template).parser(self.record, self.absent) for template in self.templates)


EVENTS: dict[str, Event] = {}


def event(name: str, *templates: str, boundary: Boundary = Boundary.CPU) -> Callable[[R], R]:
    """Declare the record of tracepoint `name`, printed as one of `templates`."""

    def declare(cls: R) -> R:
        kind = f"kvm.{name.removeprefix('kvm_').replace('_', '-')}"
        record = outcome(kind, boundary)(cls)
        absent = {field.name: field.type() for field in spec_of(record).fields if field.type is not int}
        EVENTS[name] = Event(name, record, templates, absent)
        return cls

    return declare


def parse_event(name: str, text: str) -> Any | None:
    """The record of event `name` whose text is `text`; None if the event or the layout is unknown."""
    for parse in _parsers(name):
        record = parse(text)
        if record is not None:
            return record
    return None


@cache
def _parsers(name: str) -> tuple[Callable[[str], Any | None], ...]:
    known = EVENTS.get(name)
    return () if known is None else known.parsers()


Absent = tuple[int, ...]
"""A number that not every version prints: one item, or none."""
