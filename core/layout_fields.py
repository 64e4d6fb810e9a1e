"""Fields of a layout: what they are, and the constructors that declare them."""

from __future__ import annotations

from collections.abc import Container
from enum import Enum
from struct import Struct
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast, overload

from sevlab.core.errors import InvariantViolation

if TYPE_CHECKING:
    from sevlab.core.layout import Layout

T = TypeVar("T")

VALID_BIT_SPAN_BYTES = 8
"""A bit of a valid bitmap covers this many bytes. Source: 56421, GHCB layout (VALID_BITMAP)."""


class Kind(Enum):
    """What a field is made of."""

    UINT = "uint"
    BYTES = "bytes"
    ARRAY = "array"
    BITS = "bits"


class FieldInfo(NamedTuple):
    """The declaration of one field; offsets and widths in bytes, bit numbers within the field's word."""

    name: str
    kind: Kind
    offset: int
    width_bytes: int
    elements: int = 1
    high_bit: int = 0
    low_bit: int = 0
    big_endian: bool = False
    valid_bit: bool = False
    since: int | None = None
    values: Container[int] | None = None
    reserved: int = 0
    """Bits that must be zero (a mask); for a bytes field any non-zero value means all of it."""
    aligned: int = 1
    unit: str = ""
    doc: str = ""
    source: str = ""

    @property
    def length_bytes(self) -> int:
        """Bytes from the offset to the field's end."""
        return self.width_bytes * self.elements

    @property
    def maximum(self) -> int:
        """The largest number that fits."""
        bits = self.high_bit - self.low_bit + 1 if self.kind is Kind.BITS else self.width_bytes * 8
        return (1 << bits) - 1

    @property
    def mask(self) -> int:
        """The bits of the word that the field covers."""
        return self.maximum << self.low_bit


class Field(Generic[T]):
    """A field of a layout; on a window it reads and writes the buffer."""

    __slots__ = ("info",)

    def __init__(self, info: FieldInfo) -> None:
        self.info = info

    def __set_name__(self, owner: type, name: str) -> None:
        self.info = self.info._replace(name=name)

    @overload
    def __get__(self, window: None, owner: type) -> Field[T]: ...
    @overload
    def __get__(self, window: Layout, owner: type) -> T: ...
    def __get__(self, window: Layout | None, owner: type) -> Field[T] | T:
        if window is None:
            return self
        info = self.info
        if info.valid_bit and not window.is_valid(info.name):
            raise not_valid(type(window).__name__, info.name)
        return cast("T", window._fetch(info))  # the two halves of one mechanism

    def __set__(self, window: Layout, value: T) -> None:
        window._store(self.info, value)


class _UintField(Field[T]):
    """The common case without rules: one number, one access."""

    __slots__ = ("_offset", "_width")

    def __init__(self, info: FieldInfo) -> None:
        super().__init__(info)
        self._offset = info.offset
        self._width = info.width_bytes

    def __get__(self, window: Any, owner: type) -> Any:
        return self if window is None else window.buffer.read_uint(self._offset, self._width)


def not_valid(layout: str, field: str) -> InvariantViolation:
    """What reading a field without its valid bit raises."""
    return InvariantViolation("layout.valid-bit", f"{layout}.{field} is read although its valid bit is clear")


# Declaring fields -------------------------------------------------------------------------------------------------


class _Uint:
    """The constructor of number fields of one width; called as `u64(offset, ...)`."""

    __slots__ = ("width_bytes",)

    def __init__(self, width_bytes: int) -> None:
        self.width_bytes = width_bytes

    @overload
    def __call__(
        self,
        offset: int,
        *,
        since: int,
        big_endian: bool = ...,
        valid_bit: bool = ...,
        values: Container[int] | None = ...,
        reserved: int = ...,
        aligned: int = ...,
        unit: str = ...,
        doc: str = ...,
        source: str = ...,
    ) -> Field[int | None]: ...
    @overload
    def __call__(
        self,
        offset: int,
        *,
        big_endian: bool = ...,
        valid_bit: bool = ...,
        values: Container[int] | None = ...,
        reserved: int = ...,
        aligned: int = ...,
        unit: str = ...,
        doc: str = ...,
        source: str = ...,
    ) -> Field[int]: ...
    def __call__(
        self,
        offset: int,
        *,
        big_endian: bool = False,
        valid_bit: bool = False,
        since: int | None = None,
        values: Container[int] | None = None,
        reserved: int = 0,
        aligned: int = 1,
        unit: str = "",
        doc: str = "",
        source: str = "",
    ) -> Field[Any]:
        info = FieldInfo(
            "",
            Kind.UINT,
            offset,
            self.width_bytes,
            big_endian=big_endian,
            valid_bit=valid_bit,
            since=since,
            values=values,
            reserved=reserved,
            aligned=aligned,
            unit=unit,
            doc=doc,
            source=source,
        )
        plain = not (valid_bit or big_endian or since)
        return _UintField(info) if plain else Field(info)


u8 = _Uint(1)
u16 = _Uint(2)
u32 = _Uint(4)
u64 = _Uint(8)


def raw_bytes(
    offset: int, length_bytes: int, *, must_be_zero: bool = False, doc: str = "", source: str = ""
) -> Field[bytes]:
    """A field of `length_bytes` bytes; `must_be_zero` makes it a reserved range that validation checks."""
    reserved = int(must_be_zero)
    return Field(FieldInfo("", Kind.BYTES, offset, length_bytes, reserved=reserved, doc=doc, source=source))


def array(offset: int, count: int, element: _Uint, *, doc: str = "", source: str = "") -> Field[tuple[int, ...]]:
    """`count` numbers in a row, e.g. `array(0x340, 8, u64)` for r8 to r15."""
    return Field(FieldInfo("", Kind.ARRAY, offset, element.width_bytes, count, doc=doc, source=source))


def bits(
    offset: int,
    word: _Uint,
    high_bit: int,
    low_bit: int,
    *,
    values: Container[int] | None = None,
    must_be_zero: bool = False,
    doc: str = "",
    source: str = "",
) -> Field[int]:
    """Bits `high_bit` down to `low_bit` of the word at `offset`; fields of one word may not share bits."""
    info = FieldInfo(
        "",
        Kind.BITS,
        offset,
        word.width_bytes,
        high_bit=high_bit,
        low_bit=low_bit,
        values=values,
        doc=doc,
        source=source,
    )
    return Field(info._replace(reserved=info.maximum) if must_be_zero else info)


def flag(offset: int, word: _Uint, bit: int, *, doc: str = "", source: str = "") -> Field[int]:
    """One bit of the word at `offset`, as 0 or 1."""
    return bits(offset, word, bit, bit, doc=doc, source=source)


def valid_place(bitmap: int, info: FieldInfo) -> tuple[int, int]:
    """(offset of the byte, mask) of a field's valid bit: bit n = offset / 8, least significant first."""
    number = info.offset // VALID_BIT_SPAN_BYTES
    return bitmap + number // 8, 1 << number % 8


def array_struct(info: FieldInfo) -> Struct:
    """The struct of an array field."""
    return Struct(f"<{info.elements}{'xBHxIxxxQ'[info.width_bytes]}")
