"""The record vocabulary: everything that crosses a trust boundary.

A *step* is one stimulus at a boundary; applying it to a machine yields an *outcome*: the records that the other side
produced. A test case is a list of steps, a trace is steps with recorded outcomes. There is no second vocabulary.

A record is a `NamedTuple` declared once with `@step` or `@outcome`; its fields say in their type what part they play:

- `Input`: comes from outside the model (device data, time, a choice of the untrusted side); replay feeds it;
- `Checked`: the model determines it; replay compares it;
- `Derived`: follows from the others, kept for readers.

On the wire a record is the msgpack array `[kind, field, ...]`. Kinds are names with the plugin in front
(`sev_es.vmgexit`); the kernel's own have none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Annotated, Any, NamedTuple, TypeAlias, TypeVar, cast, get_args, get_origin, get_type_hints

from sevlab.core.errors import PluginError, TraceFormatError
from sevlab.core.units import MASK64

T = TypeVar("T")


class Role(Enum):
    """What part a field plays in replay."""

    INPUT = "input"
    CHECKED = "checked"
    DERIVED = "derived"


Input = Annotated[T, Role.INPUT]
Checked = Annotated[T, Role.CHECKED]
Derived = Annotated[T, Role.DERIVED]


class Boundary(Enum):
    """Where a record crosses. Source: the table of boundaries in docs/architecture.md."""

    CPU = "CPU intercept"
    GHCB = "GHCB"
    HYPERCALL = "hypercall"
    MEMORY = "memory"
    ASP = "ASP mailbox"
    DEVICE = "device"
    SCHEDULER = "scheduler"
    FAULT = "fault"


class FieldSpec(NamedTuple):
    """One field of a record."""

    name: str
    type: type
    role: Role


class RecordSpec(NamedTuple):
    """The declaration of one record kind."""

    kind: str
    boundary: Boundary
    is_step: bool
    fields: tuple[FieldSpec, ...]


Record: TypeAlias = tuple[Any, ...]
"""A value of a class made with `@step` or `@outcome`; `spec_of` gives its declaration."""


def spec_of(record: Record | type) -> RecordSpec:
    """The declaration of a record or of a record class."""
    return cast("RecordSpec", record.SPEC)  # type: ignore[union-attr]  # set by the decorators


R = TypeVar("R", bound=type)

WIRE_TYPES = (int, bytes, str, bool, tuple)
"""Field types that msgpack carries as they are; an IntEnum travels as its number."""


def _spec(cls: type, kind: str, boundary: Boundary, *, is_step: bool) -> RecordSpec:
    fields = []
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            raise PluginError(f"record {kind!r}: field {name!r} has no role; declare it Input, Checked or Derived")
        inner, role = get_args(hint)
        bare = get_origin(inner) or inner
        bare = getattr(bare, "__supertype__", bare)
        if not issubclass(bare, WIRE_TYPES):
            raise PluginError(f"record {kind!r}: field {name!r} is {bare.__name__}, expected int, bytes, str or tuple")
        fields.append(FieldSpec(name, bare, role))
    return RecordSpec(kind, boundary, is_step, tuple(fields))


def step(kind: str, boundary: Boundary) -> Callable[[R], R]:
    """Declare a NamedTuple as a step kind: something that may be applied to a machine."""

    def declare(cls: R) -> R:
        cls.SPEC = _spec(cls, kind, boundary, is_step=True)  # type: ignore[attr-defined]
        return cls

    return declare


def outcome(kind: str, boundary: Boundary) -> Callable[[R], R]:
    """Declare a NamedTuple as an outcome kind: something that a machine answers."""

    def declare(cls: R) -> R:
        cls.SPEC = _spec(cls, kind, boundary, is_step=False)  # type: ignore[attr-defined]
        return cls

    return declare


class Outcome(NamedTuple):
    """What one step led to: the records that the other side produced, in order."""

    records: tuple[Record, ...]

    def first(self, kind: type[T]) -> T | None:
        """The first record of class `kind`, or None."""
        for record in self.records:
            if isinstance(record, kind):
                return record
        return None


class Vocabulary:
    """All record kinds of a set of plugins: encodes a record to its array and back."""

    __slots__ = ("kinds",)

    def __init__(self, classes: Mapping[str, type]) -> None:
        self.kinds = dict(classes)

    def encode(self, record: Record) -> list[Any]:
        """The msgpack array of `record`: its kind and its fields."""
        return [spec_of(record).kind, *record]

    def decode(self, array: Any, *, where: str = "record") -> Record:
        """The record of a msgpack array.

        Raises `TraceFormatError` that names `where`, the kind, the field, and what was expected.
        """
        if not isinstance(array, (list, tuple)) or not array or not isinstance(array[0], str):
            raise TraceFormatError(f"{where}: expected an array that starts with a record kind, found {array!r:.80}")
        kind, *values = array
        cls = self.kinds.get(kind)
        if cls is None:
            raise TraceFormatError(f"{where}: unknown record kind {kind!r:.80}; is a plugin missing?")
        spec = spec_of(cls)
        if len(values) != len(spec.fields):
            raise TraceFormatError(f"{where}: {kind} has {len(values)} fields, expected {len(spec.fields)}")
        for index, (field, value) in enumerate(zip(spec.fields, values, strict=True)):
            if field.type is tuple and isinstance(value, (list, tuple)):
                values[index] = _tuples(value)
            elif issubclass(field.type, bool):
                if not isinstance(value, bool):
                    raise TraceFormatError(f"{where}: {kind}.{field.name} is {value!r:.40}, expected a boolean")
            elif issubclass(field.type, int):
                if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MASK64:
                    raise TraceFormatError(f"{where}: {kind}.{field.name} is {value!r:.40}, expected 0 to 2^64-1")
            elif not isinstance(value, field.type):
                raise TraceFormatError(
                    f"{where}: {kind}.{field.name} is {type(value).__name__}, expected {field.type.__name__}"
                )
        return cast("Record", cls(*values))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
