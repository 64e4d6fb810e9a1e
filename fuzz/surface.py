"""The surface that was reached: messages by fields by outcomes, and what of the declared ones was not.

Rows come from declarations: the messages that plugins say records carry, the fields of their layouts, the rules on
each field, and the outcomes that follow from those. What is fed in - traces, or runs of a corpus - fills cells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sevlab.core.layout import FieldInfo, Kind, Layout
from sevlab.core.layout_tools import read_field
from sevlab.core.payload import Message, Payload, payload_bytes
from sevlab.core.plugins import PluginSet, load_all
from sevlab.core.vocabulary import Record, Role, Vocabulary, spec_of
from sevlab.fuzz.messages import Messages
from sevlab.fuzz.surface_outcomes import declared_outcomes, outcome_of
from sevlab.traces.reader import TraceReader

ABSENT, ZERO, OTHER, LIMIT, BREAKS = "absent", "zero", "other", "limit", "breaks"
CLASSES = {
    ABSENT: "not marked valid",
    ZERO: "zero",
    OTHER: "anything between",
    LIMIT: "all ones",
    BREAKS: "breaks a rule of the field",
}
"""What is told apart of a field's values."""

FORMAT_VERSION = 1


class Field:
    """One input field of a message: the classes of values that it has, and which led to which outcomes."""

    __slots__ = ("classes", "info", "name", "reached")

    def __init__(self, name: str, info: FieldInfo | None) -> None:
        self.name = name
        self.info = info
        self.classes = (ZERO, OTHER, LIMIT) if info is None else classes_of(info)
        self.reached: dict[str, Counter[str]] = {}

    @property
    def not_reached(self) -> tuple[str, ...]:
        """Classes of values that no message had."""
        return tuple(name for name in self.classes if name not in self.reached)


class Row:
    """One declared message: how often it was sent, what came of it, and its fields."""

    __slots__ = ("declared", "fields", "layout", "message", "outcomes", "payload", "sent")

    def __init__(self, payload: Payload, message: Message, fields: tuple[Field, ...]) -> None:
        self.payload = payload
        self.message = message
        self.layout = message.layout
        self.fields = fields
        self.declared = declared_outcomes(payload, message)
        self.sent = 0
        self.outcomes: Counter[str] = Counter()

    @property
    def not_reached(self) -> tuple[str, ...]:
        """Outcomes that the declarations promise and nothing led to."""
        return tuple(outcome for outcome in self.declared if outcome not in self.outcomes)

    def add(self, step: Record, outcome: str) -> None:
        """Count one message with its outcome."""
        self.sent += 1
        self.outcomes[outcome] += 1
        data = None if self.layout is None else _image(self.payload, step, self.layout)
        image = None if self.layout is None or data is None else self.layout.from_bytes(data)
        for field in self.fields:
            if field.info is None or data is None or image is None:
                found = number_class(getattr(step, field.name))
            else:
                found = class_of(field.info, data, marked=image.is_valid(field.name))
            field.reached.setdefault(found, Counter())[outcome] += 1


class Surface:
    """What was reached of everything that `plugins` declare (default: all that are installed)."""

    def __init__(self, plugins: PluginSet | None = None) -> None:
        plugins = load_all() if plugins is None else plugins
        self._messages = Messages.of_plugins(plugins)
        vocabulary = _vocabulary(plugins)
        self.rows = [
            Row(payload, message, _fields(payload, message, vocabulary))
            for payloads in self._messages.by_kind.values()
            for payload in payloads
            for message in payload.messages
        ]
        self._rows = {(id(row.payload), row.message.number): row for row in self.rows}
        self.undeclared: Counter[str] = Counter()
        """Messages that nobody declares, such as an unknown exit code, by the outcome that they had."""

    def add(self, step: Record, outcome: Iterable[Record]) -> None:
        """Count one step with what it led to; a step without a message is not counted."""
        carried = self._messages.of(step)
        if carried is None:
            return
        what = outcome_of(tuple(outcome))
        row = self._rows.get((id(carried.payload), carried.number))
        if row is None:
            self.undeclared[what] += 1
        else:
            row.add(step, what)

    def add_trace(self, reader: TraceReader) -> None:
        """Count every entry of a trace."""
        for entry in reader:
            self.add(entry.step, entry.outcome)

    def document(self) -> dict[str, Any]:
        """The matrix as plain data, with sums."""
        return {
            "format": "sevlab-surface",
            "version": FORMAT_VERSION,
            "totals": self.totals(),
            "undeclared": dict(self.undeclared),
            "messages": [_row_document(row) for row in self.rows],
        }

    def totals(self) -> dict[str, tuple[int, int]]:
        """Reached and declared: messages, outcomes, and classes of fields' values."""
        fields = [field for row in self.rows for field in row.fields]
        return {
            "messages": (sum(bool(row.sent) for row in self.rows), len(self.rows)),
            "outcomes": (
                sum(len(row.declared) - len(row.not_reached) for row in self.rows),
                sum(len(row.declared) for row in self.rows),
            ),
            "values": (
                sum(len(field.classes) - len(field.not_reached) for field in fields),
                sum(len(field.classes) for field in fields),
            ),
        }


def audit(traces: Iterable[str | Path], *, given: Mapping[str, Any] | None = None) -> Surface:
    """The surface that these traces reached.

    `given` maps names to plugin modules that take part without being installed. Raises `TraceFormatError` for a file
    that is no trace.
    """
    plugins = load_all(given=given)
    surface = Surface(plugins)
    for path in traces:
        with TraceReader(path, vocabulary=_vocabulary(plugins)) as reader:
            surface.add_trace(reader)
    return surface


def _vocabulary(plugins: PluginSet) -> Vocabulary:
    from sevlab.core.machine import vocabulary

    return vocabulary(plugins)


def _fields(payload: Payload, message: Message, vocabulary: Vocabulary) -> tuple[Field, ...]:
    """The inputs of a message: those that it needs, all of its layout, or those of the record that carries it."""
    layout = message.layout
    if layout is not None:
        names = message.needs or tuple(
            name for name, info in layout.FIELDS.items() if info.offset != layout.VALID_BITMAP
        )
        return tuple(Field(name, layout.FIELDS[name]) for name in names)
    specs = spec_of(vocabulary.kinds[payload.kind]).fields
    return tuple(
        Field(field.name, None)
        for field in specs
        if field.role is Role.INPUT and field.type is int and field.name not in {"vcpu", payload.field}
    )


def _image(payload: Payload, step: Record, layout: type[Layout]) -> bytes:
    return payload_bytes(payload, step)[: layout.SIZE].ljust(layout.SIZE, b"\0")


def classes_of(info: FieldInfo) -> tuple[str, ...]:
    """The classes of values that a field can have at all."""
    found = [ABSENT] if info.valid_bit else []
    found.append(ZERO)
    if info.kind in {Kind.BYTES, Kind.ARRAY}:
        found.append(BREAKS if info.reserved else OTHER)
        return tuple(found)
    if _any_between(info):
        found.append(OTHER)
    if not _breaks(info, info.maximum):
        found.append(LIMIT)
    if info.values is not None or info.reserved or info.aligned > 1:
        found.append(BREAKS)
    return tuple(found)


def class_of(info: FieldInfo, data: bytes, *, marked: bool) -> str:
    """The class of a field's value in the bytes of a message."""
    if not marked:
        return ABSENT
    value = read_field(info, data)
    if info.kind in {Kind.BYTES, Kind.ARRAY}:
        return (BREAKS if info.reserved else OTHER) if any(value) else ZERO
    if not value:
        return ZERO
    if _breaks(info, value):
        return BREAKS
    return LIMIT if value == info.maximum else OTHER


def number_class(value: int) -> str:
    """The class of a 64-bit number without a declaration."""
    return ZERO if not value else LIMIT if value == (1 << 64) - 1 else OTHER


def _breaks(info: FieldInfo, value: int) -> bool:
    outside = info.values is not None and value not in info.values
    return bool(outside or value & info.reserved or value % info.aligned)


def _any_between(info: FieldInfo) -> bool:
    """Whether any value but zero and all ones keeps the rules."""
    if info.values is not None and isinstance(info.values, (tuple, frozenset, range)):
        return any(0 < value < info.maximum and not _breaks(info, value) for value in info.values)
    return any(not _breaks(info, 1 << bit) for bit in range(info.maximum.bit_length()) if 1 << bit != info.maximum)


def _row_document(row: Row) -> dict[str, Any]:
    return {
        "kind": row.payload.kind,
        "carried_in": row.payload.field,
        "number": row.message.number,
        "name": row.message.name,
        "sent": row.sent,
        "outcomes": dict(row.outcomes),
        "outcomes_not_reached": list(row.not_reached),
        "fields": {
            field.name: {
                "reached": {name: dict(counts) for name, counts in field.reached.items()},
                "not_reached": list(field.not_reached),
            }
            for field in row.fields
        },
    }
