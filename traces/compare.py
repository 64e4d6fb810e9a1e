"""Compare outcomes by what the declarations say: the checked fields."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any, NamedTuple

from sevlab.core.vocabulary import Record, Role, spec_of


class Difference(NamedTuple):
    """The first place where two outcomes differ.

    `record` counts from 0 in the outcome. `field` is "" when the records are of different kinds or one is missing;
    then `expected` and `found` are records (None: missing), else the two values.
    """

    record: int
    kind: str
    field: str
    expected: Any
    found: Any

    def __str__(self) -> str:
        if self.field:
            return (
                f"record {self.record}, {self.kind}.{self.field}:"
                f" expected {show(self.expected)}, found {show(self.found)}"
            )
        expected, found = ("nothing" if value is None else one_line(value) for value in (self.expected, self.found))
        return f"record {self.record}: expected {expected}, found {found}"


def first_difference(expected: tuple[Record, ...], found: tuple[Record, ...]) -> Difference | None:
    """Where `found` first differs from `expected` in number, kinds, or checked fields of records; None: nowhere."""
    if expected == found:
        return None
    for number, (want, have) in enumerate(zip_longest(expected, found)):
        if want is None or have is None or spec_of(want).kind != spec_of(have).kind:
            kind = spec_of(have if want is None else want).kind
            return Difference(number, kind, "", want, have)
        for field, value, other in zip(spec_of(want).fields, want, have, strict=True):
            if value != other and field.role is not Role.DERIVED:
                return Difference(number, spec_of(want).kind, field.name, value, other)
    return None


def show(value: Any) -> str:
    """A field's value as the field writes it: numbers in hexadecimal, bytes as digits, long ones cut."""
    if isinstance(value, bool) or not isinstance(value, (int, bytes)):
        return repr(value)
    if isinstance(value, int):
        return f"{value:#x}" if value > 9 else str(value)
    return value.hex() if len(value) <= 64 else f"{value[:64].hex()}... ({len(value)} bytes)"


def one_line(record: Record) -> str:
    """A record on one line."""
    fields = zip(spec_of(record).fields, record, strict=True)
    return f"{spec_of(record).kind}({', '.join(f'{field.name}={show(value)}' for field, value in fields)})"
