"""Declare a binary structure once; everything else derives from it.

```python
class Ghcb(Layout, size=4096, valid_bitmap=0x3F0):
    \"\"\"GHCB page.\"\"\"
    sw_exit_code = u64(0x390, valid_bit=True, values=ExitCode, source="56421, GHCB layout")
    protocol_version = u16(0xFFA, source="56421, GHCB layout")
```

A layout class is used in two ways. `Ghcb(buffer)` is a *live* window: each attribute access is exactly one access to
the buffer. `Ghcb.snapshot(buffer)` and `Ghcb.from_bytes(data)` take all bytes at once and give an immutable value whose
fields are plain attributes, decoded by one generated `struct` call.

Three cases, three types: a field with `valid_bit` reads as int and raises `InvariantViolation` when its bit is clear
(test the mask first, or use `value_or_zero`); a field with `since` reads as None when the version does not define it;
`raw` gives the bytes without rules. `core.layout_tools` derives documentation, validation, mutation and strategies.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from enum import Enum
from struct import Struct
from struct import error as StructError
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar, cast, overload

from sevlab.core.buffers import UINT, Buffer
from sevlab.core.errors import InvariantViolation, LayoutError

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
            raise _not_valid(type(window).__name__, info.name)
        return cast("T", window._fetch(info))  # noqa: SLF001  # the two halves of one mechanism

    def __set__(self, window: Layout, value: T) -> None:
        window._store(self.info, value)  # noqa: SLF001


class _UintField(Field[T]):
    """The common case without rules: one number, one access."""

    __slots__ = ("_offset", "_width")

    def __init__(self, info: FieldInfo) -> None:
        super().__init__(info)
        self._offset = info.offset
        self._width = info.width_bytes

    def __get__(self, window: Any, owner: type) -> Any:
        return self if window is None else window.buffer.read_uint(self._offset, self._width)


def _not_valid(layout: str, field: str) -> InvariantViolation:
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


# The structure ----------------------------------------------------------------------------------------------------


class Layout:
    """A binary structure of `size` bytes; see the module's documentation.

    Class keywords: `size` in bytes, `valid_bitmap` the offset of the bitmap in which bit n stands for the eight bytes
    at 8 n. Raises `LayoutError` at class creation for overlaps, fields past the end and misplaced rules.
    """

    __slots__ = ("buffer",)

    SIZE: ClassVar[int] = 0
    FIELDS: ClassVar[dict[str, FieldInfo]] = {}
    VALID_BITMAP: ClassVar[int | None] = None
    _snapshot_class: ClassVar[type]
    _decode: ClassVar[Any]
    _writers: ClassVar[dict[str, tuple[Any, int, int, int]]] = {}

    def __init_subclass__(cls, *, size: int | None = None, valid_bitmap: int | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if "_is_snapshot" in cls.__dict__:
            return
        if size is None:
            raise LayoutError(f"{cls.__name__}: give the size in bytes, as class {cls.__name__}(Layout, size=...)")
        infos = sorted(
            (item.info for item in vars(cls).values() if isinstance(item, Field)),
            key=lambda info: (info.offset, info.low_bit),
        )
        cls.SIZE = size
        cls.VALID_BITMAP = valid_bitmap
        cls.FIELDS = {info.name: info for info in infos}
        _check(cls, infos)
        cls._writers = {info.name: _writer(cls, info) for info in infos}
        cls._decode, cls._snapshot_class = _make_snapshot(cls, infos)

    def __init__(self, buffer: Buffer) -> None:
        if buffer.size < self.SIZE:
            raise LayoutError(f"{type(self).__name__}: a buffer of {buffer.size} bytes, expected {self.SIZE}")
        self.buffer = buffer

    # Live -------------------------------------------------------------------------------------------------------

    def _fetch(self, info: FieldInfo) -> Any:
        buffer = self.buffer
        if info.kind is Kind.BYTES:
            return buffer.read(info.offset, info.width_bytes)
        if info.kind is Kind.ARRAY:
            return _array_struct(info).unpack(buffer.read(info.offset, info.length_bytes))
        if info.big_endian:
            return int.from_bytes(buffer.read(info.offset, info.width_bytes), "big")
        word = buffer.read_uint(info.offset, info.width_bytes)
        return (word & info.mask) >> info.low_bit if info.kind is Kind.BITS else word

    def _store(self, info: FieldInfo, value: Any) -> None:
        if info.kind is Kind.BITS:
            _encode(type(self), info, value)
            word = self.buffer.read_uint(info.offset, info.width_bytes)
            self.buffer.write_uint(info.offset, info.width_bytes, word & ~info.mask | value << info.low_bit)
            return
        self.buffer.write(info.offset, _encode(type(self), info, value))
        if info.valid_bit and self.VALID_BITMAP is not None:
            offset, mask = _valid_place(self.VALID_BITMAP, info)
            self.buffer.write_uint(offset, 1, self.buffer.read_uint(offset, 1) | mask)

    def is_valid(self, name: str) -> bool:
        """Whether the valid bit of field `name` is set; True for a field without one."""
        info = self.FIELDS[name]
        if not info.valid_bit or self.VALID_BITMAP is None:
            return True
        offset, mask = _valid_place(self.VALID_BITMAP, info)
        return bool(self.buffer.read_uint(offset, 1) & mask)

    def value_or_zero(self, name: str) -> int:
        """The field's number, 0 when its valid bit is clear: KVM's rule. Source: Linux arch/x86/kvm/svm/sev.c."""
        return cast("int", self._fetch(self.FIELDS[name])) if self.is_valid(name) else 0

    def clear_valid(self) -> None:
        """Clear the whole valid bitmap."""
        if self.VALID_BITMAP is not None:
            self.buffer.write(self.VALID_BITMAP, bytes(16))

    def raw(self) -> bytes:
        """All bytes, without any rule: one fetch."""
        return self.buffer.read(0, self.SIZE)

    # Snapshots --------------------------------------------------------------------------------------------------

    @classmethod
    def snapshot(cls, buffer: Buffer, *, version: int | None = None) -> Self:
        """One fetch of all bytes, decoded; fields that `version` does not define read None (default: all defined)."""
        return cast("Self", cls._decode(buffer.read(0, cls.SIZE), version))

    @classmethod
    def from_bytes(cls, data: bytes, *, version: int | None = None) -> Self:
        """The decoded value of exactly `SIZE` bytes. Raises `LayoutError` for another length."""
        if len(data) != cls.SIZE:
            raise LayoutError(f"{cls.__name__}: {len(data)} bytes, expected {cls.SIZE}")
        return cast("Self", cls._decode(bytes(data), version))

    @classmethod
    def build(cls, **fields: Any) -> bytes:
        """The bytes with these fields set and all else zero; fields with a valid bit get it.

        Raises `LayoutError` for an unknown field or a value that does not fit.
        """
        return bytes(_write(cls, bytearray(cls.SIZE), fields))

    def to_bytes(self) -> bytes:
        """All bytes, reserved ones as they were found."""
        return self.raw()

    def replace(self, **fields: Any) -> Self:
        """A snapshot with these fields changed (and marked valid); the bytes of all others stay."""
        return self.from_bytes(bytes(_write(type(self), bytearray(self.to_bytes()), fields)))


def _check(cls: type[Layout], infos: Iterable[FieldInfo]) -> None:
    """Refuse what cannot be a structure. Bits are compared, so that bit fields may share a word."""
    taken = 0
    owners: list[FieldInfo] = []
    for info in infos:
        where = f"{cls.__name__}.{info.name} at {info.offset:#x}"
        if info.offset < 0 or info.width_bytes <= 0 or info.elements <= 0:
            raise LayoutError(f"{where}: offset, width and number of elements must be positive")
        if info.offset + info.length_bytes > cls.SIZE:
            raise LayoutError(
                f"{where}: {info.length_bytes} bytes reach past the size {cls.SIZE:#x} of {cls.__name__}"
            )
        if info.kind is Kind.BITS and not 0 <= info.low_bit <= info.high_bit < info.width_bytes * 8:
            raise LayoutError(f"{where}: bits {info.high_bit}:{info.low_bit} of a {info.width_bytes}-byte word")
        if info.valid_bit and (cls.VALID_BITMAP is None or info.offset >= 16 * 8 * VALID_BIT_SPAN_BYTES):
            raise LayoutError(f"{where}: valid_bit, but {cls.__name__} has no valid_bitmap that covers it")
        if info.reserved > info.maximum:
            raise LayoutError(f"{where}: reserved mask {info.reserved:#x} is wider than the field")
        bits_mask = info.mask if info.kind is Kind.BITS else (1 << info.length_bytes * 8) - 1
        place = bits_mask << info.offset * 8
        if taken & place:
            other = next(o for o in owners if o.offset < info.offset + info.length_bytes and info.offset < o.offset + o.length_bytes)
            raise LayoutError(f"{where}: overlaps {other.name} at {other.offset:#x}")
        taken |= place
        owners.append(info)
    if cls.VALID_BITMAP is not None and cls.VALID_BITMAP + 16 > cls.SIZE:
        raise LayoutError(f"{cls.__name__}: the valid bitmap at {cls.VALID_BITMAP:#x} reaches past the end")


def _valid_place(bitmap: int, info: FieldInfo) -> tuple[int, int]:
    """(offset of the byte, mask) of a field's valid bit: bit n = offset / 8, least significant first."""
    number = info.offset // VALID_BIT_SPAN_BYTES
    return bitmap + number // 8, 1 << number % 8


def _array_struct(info: FieldInfo) -> Struct:
    return Struct(f"<{info.elements}{'xBHxIxxxQ'[info.width_bytes]}")


def _encode(cls: type[Layout], info: FieldInfo, value: Any) -> bytes:
    """The bytes of one field (of a bit field: nothing, only the check)."""
    where = f"{cls.__name__}.{info.name}"
    if info.kind is Kind.BYTES:
        if not isinstance(value, (bytes, bytearray)) or len(value) != info.width_bytes:
            raise LayoutError(f"{where}: {value!r:.40}, expected {info.width_bytes} bytes")
        return bytes(value)
    if info.kind is Kind.ARRAY:
        if len(value) != info.elements or not all(0 <= item <= info.maximum for item in value):
            raise LayoutError(f"{where}: {value!r:.60}, expected {info.elements} numbers up to {info.maximum:#x}")
        return _array_struct(info).pack(*value)
    if not isinstance(value, int) or not 0 <= value <= info.maximum:
        raise LayoutError(f"{where}: {value!r:.40}, expected a number from 0 to {info.maximum:#x}")
    if info.kind is Kind.BITS:
        return b""
    return value.to_bytes(info.width_bytes, "big" if info.big_endian else "little")


def _write(cls: type[Layout], data: bytearray, fields: dict[str, Any]) -> bytearray:
    writers = cls._writers
    for name, value in fields.items():
        writer = writers.get(name)
        if writer is None:
            raise LayoutError(f"{cls.__name__} has no field {name!r}; it has {', '.join(cls.FIELDS)}")
        pack_into, offset, valid_offset, valid_mask = writer
        if pack_into is None:
            _write_slowly(cls, data, cls.FIELDS[name], value)
        else:
            try:
                pack_into(data, offset, value)
            except StructError:
                _encode(cls, cls.FIELDS[name], value)
        if valid_mask:
            data[valid_offset] |= valid_mask
    return data


def _write_slowly(cls: type[Layout], data: bytearray, info: FieldInfo, value: Any) -> None:
    encoded = _encode(cls, info, value)
    end = info.offset + info.length_bytes
    if info.kind is Kind.BITS:
        word = int.from_bytes(data[info.offset : end], "little")
        encoded = (word & ~info.mask | value << info.low_bit).to_bytes(info.width_bytes, "little")
    data[info.offset : end] = encoded


def _writer(cls: type[Layout], info: FieldInfo) -> tuple[Any, int, int, int]:
    """How `build` writes a field: a struct's pack_into (None: the slow way), its offset, its valid bit's place."""
    plain = info.kind is Kind.UINT and not info.big_endian
    pack_into = UINT[info.width_bytes].pack_into if plain else None
    valid = _valid_place(cls.VALID_BITMAP, info) if info.valid_bit and cls.VALID_BITMAP is not None else (0, 0)
    return pack_into, info.offset, *valid


def _make_snapshot(cls: type[Layout], infos: list[FieldInfo]) -> tuple[Any, type]:
    """The class of snapshots and the function that decodes bytes into one.

    The class has a slot for each field, which hides the field's descriptor, so that a read is a plain slot read. A
    field whose valid bit is clear is left unset; `__getattr__`, which Python calls only then, raises.
    """
    words: dict[int, FieldInfo] = {}
    for info in infos:
        words.setdefault(info.offset, info)
    # One struct item for each word; bit fields of one word share it. Different words never overlap (see `_check`),
    # except bit fields of words with different widths, which decode on their own.
    pattern, position, items, alone = "<", 0, {}, []
    for offset, info in sorted(words.items()):
        if offset < position or info.kind is Kind.ARRAY or info.big_endian:
            alone.append(info.name)
            continue
        pattern += f"{offset - position}x" if offset > position else ""
        pattern += f"{info.width_bytes}s" if info.kind is Kind.BYTES else "xBHxIxxxQ"[info.width_bytes]
        items[offset, info.width_bytes] = f"w{offset}"
        position = offset + info.width_bytes
    lines = ["def decode(data, version):", "    item = new(snapshot_class)", "    put(item, '_raw', data)"]
    lines.append("    put(item, 'version', version)")
    if items:
        lines.append(f"    {', '.join(items.values())}, = unpack(data, 0)")
    if cls.VALID_BITMAP is not None:
        lines.append(f"    valid = int.from_bytes(data[{cls.VALID_BITMAP}:{cls.VALID_BITMAP + 16}], 'little')")
    for info in infos:
        source = items.get((info.offset, info.width_bytes)) if info.name not in alone else None
        if source is None:
            value = f"whole(infos[{info.name!r}], data)"
        elif info.kind is Kind.BITS:
            value = f"({source} >> {info.low_bit}) & {info.maximum:#x}"
        else:
            value = source
        store = f"put_{info.name}(item, {value})"
        if info.since is not None:
            store = f"put_{info.name}(item, {value} if version is None or version >= {info.since} else None)"
        if info.valid_bit:
            lines.append(f"    if valid >> {info.offset // VALID_BIT_SPAN_BYTES} & 1: {store}")
        else:
            lines.append(f"    {store}")
    lines.append("    return item")

    body: dict[str, Any] = {"__slots__": ("_raw", "version", *cls.FIELDS), "_is_snapshot": True}
    body |= {"__setattr__": _immutable, "__delattr__": _immutable, "__getattr__": _unset, "__repr__": _repr}
    body |= {"__eq__": _equal, "__hash__": _hash, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    body |= {"raw": _raw, "is_valid": _snapshot_is_valid, "value_or_zero": _snapshot_value_or_zero}
    snapshot_class: Any = type(cls.__name__, (cls,), body)
    snapshot_class._layout = cls  # noqa: SLF001
    scope: dict[str, Any] = {
        "snapshot_class": snapshot_class,
        "new": object.__new__,
        "put": object.__setattr__,
        "unpack": Struct(pattern).unpack_from,
        "infos": cls.FIELDS,
        "whole": _decode_alone,
    }
    # A slot's own __set__ is four times faster than object.__setattr__, and the class forbids plain assignment.
    scope |= {f"put_{name}": vars(snapshot_class)[name].__set__ for name in cls.FIELDS}
    exec("\n".join(lines), scope)  # noqa: S102  # made of declared names and numbers only
    return staticmethod(scope["decode"]), snapshot_class


def _decode_alone(info: FieldInfo, data: bytes) -> Any:
    piece = data[info.offset : info.offset + info.length_bytes]
    if info.kind is Kind.ARRAY:
        return _array_struct(info).unpack(piece)
    if info.kind is Kind.BYTES:
        return piece
    word = int.from_bytes(piece, "big" if info.big_endian else "little")
    return (word & info.mask) >> info.low_bit if info.kind is Kind.BITS else word


def _immutable(item: Any, name: str, *_value: Any) -> None:
    raise AttributeError(f"a snapshot of {type(item).__name__} is immutable; use replace({name}=...)")


def _unset(item: Any, name: str) -> Any:
    if name in type(item).FIELDS:
        raise _not_valid(type(item).__name__, name)
    raise AttributeError(f"{type(item).__name__} has no field {name!r}")


def _raw(item: Any) -> bytes:
    return item._raw  # type: ignore[no-any-return]  # noqa: SLF001


def _snapshot_is_valid(item: Any, name: str) -> bool:
    info = type(item).FIELDS[name]
    if not info.valid_bit:
        return True
    offset, mask = _valid_place(type(item).VALID_BITMAP, info)
    return bool(item._raw[offset] & mask)  # noqa: SLF001


def _snapshot_value_or_zero(item: Any, name: str) -> int:
    return getattr(item, name) if _snapshot_is_valid(item, name) else 0


def _equal(item: Any, other: object) -> Any:
    if type(other) is not type(item):
        return NotImplemented
    return (item._raw, item.version) == (other._raw, other.version)  # type: ignore[attr-defined]  # noqa: SLF001


def _hash(item: Any) -> int:
    return hash((type(item), item._raw))  # noqa: SLF001


def _repr(item: Any) -> str:
    shown = []
    for name, info in type(item).FIELDS.items():
        if _snapshot_is_valid(item, name) and (value := getattr(item, name)):
            shown.append(f"{name}={value:#x}" if isinstance(value, int) and info.kind is not Kind.BYTES else f"{name}={value!r:.40}")
    return f"{type(item).__name__}({', '.join(shown)})"
