"""What follows from a layout's declaration: validation, differences, JSON, documentation, mutation, strategies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sevlab.core.errors import FormatError
from sevlab.core.layout import FieldInfo, Kind, Layout
from sevlab.core.layout_fields import VALID_BIT_SPAN_BYTES, valid_place

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

PROBE_LIMIT = 1 << 12
"""How far to look for a number outside a field's legal values."""


class Problem(NamedTuple):
    """One broken rule. `rule` is "values", "reserved" or "aligned"; `expected` is in words."""

    field: str
    offset: int
    rule: str
    found: int
    expected: str


class Difference(NamedTuple):
    """One field, or one run of unnamed bytes, in which two images differ."""

    field: str
    offset: int
    before: Any
    after: Any


class Mutation(NamedTuple):
    """An image in which exactly one rule is broken."""

    field: str
    rule: str
    data: bytes


def read_field(info: FieldInfo, data: bytes) -> Any:
    """The value of one field in `data`, without any rule."""
    piece = data[info.offset : info.offset + info.length_bytes]
    if info.kind is Kind.BYTES:
        return piece
    if info.kind is Kind.ARRAY:
        width = info.width_bytes
        return tuple(int.from_bytes(piece[start : start + width], "little") for start in range(0, len(piece), width))
    word = int.from_bytes(piece, "big" if info.big_endian else "little")
    return (word & info.mask) >> info.low_bit if info.kind is Kind.BITS else word


def reserved_ranges(layout: type[Layout]) -> tuple[tuple[int, int], ...]:
    """(offset, length in bytes) of the bytes that no field names."""
    named = bytearray(layout.SIZE)
    for info in layout.FIELDS.values():
        named[info.offset : info.offset + info.length_bytes] = b"\1" * info.length_bytes
    if layout.VALID_BITMAP is not None:
        named[layout.VALID_BITMAP : layout.VALID_BITMAP + 16] = b"\1" * 16
    ranges = []
    start = None
    for offset in range(layout.SIZE + 1):
        free = offset < layout.SIZE and not named[offset]
        if free and start is None:
            start = offset
        elif not free and start is not None:
            ranges.append((start, offset - start))
            start = None
    return tuple(ranges)


def validate(layout: type[Layout], data: bytes) -> tuple[Problem, ...]:
    """The rules that `data` breaks; fields whose valid bit is clear are not looked at."""
    item = layout.from_bytes(data)
    problems = []
    for name, info in layout.FIELDS.items():
        if not item.is_valid(name):
            continue
        value = read_field(info, data)
        if info.kind is Kind.BYTES:
            if info.reserved and any(value):
                problems.append(Problem(name, info.offset, "reserved", int.from_bytes(value, "little"), "all zero"))
            continue
        if info.kind is Kind.ARRAY:
            continue
        if info.values is not None and value not in info.values:
            problems.append(Problem(name, info.offset, "values", value, _legal_words(info)))
        if value & info.reserved:
            problems.append(Problem(name, info.offset, "reserved", value & info.reserved, "zero in these bits"))
        if value % info.aligned:
            problems.append(Problem(name, info.offset, "aligned", value, f"a multiple of {info.aligned:#x}"))
    return tuple(problems)


AnyLayout = TypeVar("AnyLayout", bound=Layout)


def read_file_part(layout: type[AnyLayout], data: bytes, name: str, offset: int = 0) -> AnyLayout:
    """The structure at `offset` of the bytes of file `name`, which must be whole and keep every rule of its fields.

    Raises `FormatError` with the file's offset, the field, what was expected and what was found.
    """
    part = data[offset : offset + layout.SIZE]
    if len(part) < layout.SIZE:
        cut = next((info for info in layout.FIELDS.values() if info.offset + info.length_bytes > len(part)), None)
        raise FormatError(
            name,
            offset + len(part),
            f"{layout.__name__}.{cut.name if cut else 'end'}",
            expected=f"{layout.SIZE:#x} bytes from offset {offset:#x}",
            found=f"the end of the file after {len(part):#x}",
        )
    for problem in validate(layout, part):
        found = f"{problem.found:#x}"
        raise FormatError(
            name,
            offset + problem.offset,
            f"{layout.__name__}.{problem.field}",
            expected=problem.expected,
            found=found if len(found) < 40 else f"{found[:36]}...",
        )
    return layout.from_bytes(part)


def _legal_words(info: FieldInfo) -> str:
    values = info.values
    if isinstance(values, range):
        return f"{values.start:#x} to {values.stop - 1:#x}"
    if isinstance(values, (tuple, frozenset, type)):
        return "one of " + ", ".join(f"{value:#x}" for value in sorted(values))
    return "a legal value"


def diff(layout: type[Layout], before: bytes, after: bytes) -> tuple[Difference, ...]:
    """Where two images differ, by field; runs of unnamed bytes are called `reserved_` and their offset."""
    found = [
        Difference(name, info.offset, read_field(info, before), read_field(info, after))
        for name, info in layout.FIELDS.items()
        if read_field(info, before) != read_field(info, after)
    ]
    ranges = reserved_ranges(layout)
    if layout.VALID_BITMAP is not None and "valid_bitmap" not in layout.FIELDS:
        bitmap = slice(layout.VALID_BITMAP, layout.VALID_BITMAP + 16)
        if before[bitmap] != after[bitmap]:
            found.append(Difference("valid_bitmap", layout.VALID_BITMAP, before[bitmap], after[bitmap]))
    for offset, length in ranges:
        old, new = before[offset : offset + length], after[offset : offset + length]
        if old != new:
            found.append(Difference(f"reserved_{offset:x}", offset, old, new))
    return tuple(sorted(found, key=lambda difference: difference.offset))


def to_json(layout: type[Layout], data: bytes) -> dict[str, Any]:
    """Named fields for `--json`: numbers as numbers, bytes as hex, None for a field whose valid bit is clear."""
    item = layout.from_bytes(data)
    out: dict[str, Any] = {}
    for name, info in layout.FIELDS.items():
        value = read_field(info, data) if item.is_valid(name) else None
        out[name] = value.hex() if isinstance(value, bytes) else value
    return out


def markdown_table(layout: type[Layout]) -> str:
    """The layout for documentation, reserved ranges included."""
    rows: list[tuple[int, int, str]] = []
    for name, info in layout.FIELDS.items():
        size = f"{info.length_bytes}" if info.kind is not Kind.BITS else f"[{info.high_bit}:{info.low_bit}]"
        if info.kind is Kind.BITS and info.high_bit == info.low_bit:
            size = f"[{info.low_bit}]"
        notes = [info.doc] if info.doc else []
        if info.valid_bit:
            notes.append(f"valid bit {info.offset // VALID_BIT_SPAN_BYTES}")
        if info.aligned > 1:
            notes.append(f"multiple of {info.aligned:#x}")
        if info.values is not None:
            notes.append(_legal_words(info))
        if info.since is not None:
            notes.append(f"since version {info.since}")
        rows.append(
            (
                info.offset,
                info.low_bit,
                f"| {info.offset:#05x} | {size} | `{name}` | {'; '.join(notes)} | {info.source} |",
            )
        )
    rows += [(offset, 0, f"| {offset:#05x} | {length} | reserved | | |") for offset, length in reserved_ranges(layout)]
    head = ["| Offset | Bytes or [bits] | Field | Notes | Source |", "| --- | --- | --- | --- | --- |"]
    return "\n".join(head + [row for _, _, row in sorted(rows)])


def dictionary(layout: type[Layout]) -> tuple[bytes, ...]:
    """Byte strings worth trying: legal values and the edges of every constrained number, in the field's width."""
    tokens: dict[bytes, None] = {}
    for info in layout.FIELDS.values():
        if info.kind not in (Kind.UINT, Kind.BITS):
            continue
        numbers = {0, info.maximum, info.aligned, info.aligned - 1, info.reserved & -info.reserved}
        if isinstance(info.values, (tuple, frozenset, type)):
            numbers.update(int(value) for value in info.values)
        elif isinstance(info.values, range):
            numbers.update((info.values.start, info.values.stop - 1, info.values.stop))
        for number in sorted(numbers):
            if 0 <= number <= info.maximum:
                word = number << info.low_bit
                tokens[word.to_bytes(info.width_bytes, "big" if info.big_endian else "little")] = None
    return tuple(tokens)


def mutations(layout: type[Layout], data: bytes) -> Iterator[Mutation]:
    """Images that break exactly one rule of the valid image `data`: one for each rule of each field.

    For a field with a valid bit that is set, "valid" clears the bit.
    """
    item = layout.from_bytes(data)
    for name, info in layout.FIELDS.items():
        if not item.is_valid(name):
            continue
        if info.valid_bit and layout.VALID_BITMAP is not None:
            offset, mask = valid_place(layout.VALID_BITMAP, info)
            cleared = bytearray(data)
            cleared[offset] &= ~mask & 0xFF
            yield Mutation(name, "valid", bytes(cleared))
        for rule, value in breaking(info, read_field(info, data)):
            yield Mutation(name, rule, item.replace(**{name: value}).to_bytes())


def breaking(info: FieldInfo, value: Any) -> Iterator[tuple[str, Any]]:
    """Rules of a field, each with a value like `value` that breaks only this one."""
    if info.kind is Kind.BYTES:
        if info.reserved:
            yield "reserved", b"\1" + value[1:]
        return
    if info.kind is Kind.ARRAY:
        return
    if info.values is not None:
        outside = next((number for number in _outside(info) if number not in info.values), None)
        if outside is not None:
            yield "values", outside
    if info.reserved:
        yield "reserved", value | info.reserved & -info.reserved
    if info.aligned > 1:
        yield "aligned", value | 1


def _outside(info: FieldInfo) -> Iterator[int]:
    """Numbers that may be illegal but break neither alignment nor reserved bits."""
    for number in (info.maximum & -info.aligned & ~info.reserved, *range(0, PROBE_LIMIT * info.aligned, info.aligned)):
        if number <= info.maximum and not number & info.reserved:
            yield number


def strategy(layout: type[Layout]) -> SearchStrategy[bytes]:
    """A Hypothesis strategy of valid images; needs the package hypothesis."""
    from hypothesis import strategies as st

    fields = {}
    for name, info in layout.FIELDS.items():
        if info.kind is Kind.BYTES:
            length = info.width_bytes
            fields[name] = st.just(bytes(length)) if info.reserved else st.binary(min_size=length, max_size=length)
        elif info.kind is Kind.ARRAY:
            fields[name] = st.tuples(*[st.integers(0, info.maximum)] * info.elements)  # type: ignore[assignment]
        else:
            fields[name] = _numbers(info)
    return (
        st.fixed_dictionaries({}, optional=fields)
        .map(lambda chosen: layout.build(**chosen))
        .filter(lambda data: not validate(layout, data))
    )


def _numbers(info: FieldInfo) -> Any:
    from hypothesis import strategies as st

    if isinstance(info.values, (tuple, frozenset, type)):
        legal = sorted(int(value) for value in info.values if not value & info.reserved)
        return st.sampled_from(legal)
    if isinstance(info.values, range):
        return st.sampled_from(info.values)
    keep = info.maximum & ~info.reserved
    return st.integers(0, info.maximum // info.aligned).map(lambda number: number * info.aligned & keep)
