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

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import EnumMeta
from operator import itemgetter
from typing import Any, ClassVar, Self, TypeAlias, cast

from sevlab.core.buffers import UINT, Buffer
from sevlab.core.errors import LayoutError
from sevlab.core.layout_fields import (
    VALID_BIT_SPAN_BYTES,
    Field,
    FieldInfo,
    Kind,
    array,
    array_struct,
    bits,
    flag,
    raw_bytes,
    u8,
    u16,
    u32,
    u64,
    valid_place,
)
from sevlab.core.layout_snapshot import make_snapshot

__all__ = ["Field", "FieldInfo", "Kind", "Layout", "array", "bits", "flag", "raw_bytes", "u8", "u16", "u32", "u64"]


FieldValue: TypeAlias = int | bytes | Sequence[int]
"""What a field may be set to: a number, the bytes of a `raw_bytes` field, the numbers of an `array`."""

VALID_BITMAP_BYTES = 16

Packer: TypeAlias = tuple[Any, Any, bytes]
"""How `build` makes certain fields at once: a struct's pack (None: field by field), the getter of its arguments from
the fields by name, in the order of their offsets, and the bitmap that marks the fields valid, which has the name ""."""
PACKERS_MAX = 256
"""Sets of fields that a layout remembers how to build."""


class _NoDict(type):
    """Gives every layout `__slots__ = ()`: a misspelt field on a window is an AttributeError, not a lost write."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **keywords: Any) -> _NoDict:
        return super().__new__(cls, name, bases, {"__slots__": (), **namespace}, **keywords)


class Layout(metaclass=_NoDict):
    """A binary structure of `size` bytes; see the module's documentation.

    Class keywords: `size` in bytes, `valid_bitmap` the offset of the bitmap in which bit n stands for the eight bytes
    at 8 n; a `raw_bytes` field may name those 16 bytes. A layout does not inherit fields. Raises `LayoutError` at class
    creation for overlaps, fields past the end, misplaced rules, and names that the class itself needs.
    """

    __slots__ = ("buffer",)

    SIZE: ClassVar[int] = 0
    FIELDS: ClassVar[dict[str, FieldInfo]] = {}
    VALID_BITMAP: ClassVar[int | None] = None
    _snapshot_class: ClassVar[type]
    _decode: ClassVar[Any]
    _writers: ClassVar[dict[str, tuple[Any, int, int, int]]] = {}
    _packers: ClassVar[dict[tuple[str, ...], Packer]] = {}

    def __init_subclass__(cls, *, size: int | None = None, valid_bitmap: int | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if "_is_snapshot" in cls.__dict__:
            return
        if any(issubclass(base, Layout) and base is not Layout for base in cls.__bases__):
            raise LayoutError(f"{cls.__name__}: a layout does not inherit the fields of another; declare them")
        if size is None:
            raise LayoutError(f"{cls.__name__}: give the size in bytes, as class {cls.__name__}(Layout, size=...)")
        declared = [item for item in vars(cls).values() if isinstance(item, Field)]
        for item in declared:
            item.info = _with_plain_values(cls, item.info)
        infos = sorted((item.info for item in declared), key=lambda info: (info.offset, info.low_bit))
        cls.SIZE = size
        cls.VALID_BITMAP = valid_bitmap
        cls.FIELDS = {info.name: info for info in infos}
        _check(cls, infos)
        cls._packers = {}
        cls._writers = {info.name: _writer(cls, info) for info in infos}
        cls._decode, cls._snapshot_class = make_snapshot(cls, infos)

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
            return array_struct(info).unpack(buffer.read(info.offset, info.length_bytes))
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
            offset, mask = valid_place(self.VALID_BITMAP, info)
            self.buffer.write_uint(offset, 1, self.buffer.read_uint(offset, 1) | mask)

    def is_valid(self, name: str) -> bool:
        """Whether the valid bit of field `name` is set; True for a field without one."""
        info = self.FIELDS[name]
        if not info.valid_bit or self.VALID_BITMAP is None:
            return True
        offset, mask = valid_place(self.VALID_BITMAP, info)
        return bool(self.buffer.read_uint(offset, 1) & mask)

    def value_or_zero(self, name: str) -> int:
        """The field's number, 0 when its valid bit is clear: KVM's rule. Source: Linux arch/x86/kvm/svm/sev.c."""
        return cast("int", self._fetch(self.FIELDS[name])) if self.is_valid(name) else 0

    def clear_valid(self) -> None:
        """Clear the whole valid bitmap."""
        if self.VALID_BITMAP is not None:
            self.buffer.write(self.VALID_BITMAP, bytes(VALID_BITMAP_BYTES))

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
        return cls._decode(bytes(data), version)  # type: ignore[no-any-return]  # often asked, and a cast is a call

    @classmethod
    def decoder(cls, *fields: str, or_zero: Iterable[str] = (), checked: Iterable[str] = ()) -> Callable[[bytes], Self]:
        """A function that decodes only `fields`: for a handler that declares what it reads, and reads it often.

        Those of `or_zero` (decoded too) read 0 when their valid bit is clear; the caller has checked the valid bits of
        `checked` (decoded too), so that they are not looked at again. Any other field of its snapshots
        raises `InvariantViolation` ("layout.undeclared"). Raises `LayoutError` for an unknown field.
        """
        wanted = {*fields, *or_zero, *checked}
        for name in wanted:
            if name not in cls.FIELDS:
                raise LayoutError(f"{cls.__name__} has no field {name!r}; it has {', '.join(cls.FIELDS)}")
        infos = [info for info in cls.FIELDS.values() if info.name in wanted]
        decode, _ = make_snapshot(cls, infos, frozenset(or_zero), frozenset(checked))
        return cast("Callable[[bytes], Self]", decode.__func__)

    @classmethod
    def build(cls, **fields: FieldValue) -> bytes:
        """The bytes with these fields set and all else zero; fields with a valid bit get it.

        Raises `LayoutError` for an unknown field or a value that does not fit.
        """
        names = tuple(fields)
        known = cls._packers.get(names)
        if known is None:
            known = _packer(cls, names)
            if len(cls._packers) < PACKERS_MAX:
                cls._packers[names] = known
        pack, values, bitmap = known
        if pack is not None:
            try:
                return pack(*values({**fields, "": bitmap}))  # type: ignore[no-any-return]
            except struct.error:
                pass  # field by field: that says which value does not fit
        return bytes(_write(cls, bytearray(cls.SIZE), fields))

    @classmethod
    def patch(cls, data: bytes, **fields: FieldValue) -> bytes:
        """`data` (`SIZE` bytes) with these fields changed and marked valid; all other bytes as they are."""
        if len(data) != cls.SIZE:
            raise LayoutError(f"{cls.__name__}: {len(data)} bytes, expected {cls.SIZE}")
        return bytes(_write(cls, bytearray(data), fields))

    def to_bytes(self) -> bytes:
        """All bytes, reserved ones as they were found."""
        return self.raw()

    def replace(self, **fields: FieldValue) -> Self:
        """A snapshot with these fields changed (and marked valid); the bytes of all others stay."""
        version = getattr(self, "version", None)
        return self.from_bytes(self.patch(self.to_bytes(), **fields), version=version)


def _check(cls: type[Layout], infos: Iterable[FieldInfo]) -> None:
    """Refuse what cannot be a structure. Bits are compared, so that bit fields may share a word."""
    if cls.SIZE <= 0:
        raise LayoutError(f"{cls.__name__}: the size is {cls.SIZE} bytes, expected at least 1")
    bitmap = cls.VALID_BITMAP
    if bitmap is not None and not 0 <= bitmap <= cls.SIZE - VALID_BITMAP_BYTES:
        raise LayoutError(f"{cls.__name__}: the valid bitmap at {bitmap:#x} does not lie in {cls.SIZE:#x} bytes")
    taken = 0
    owners: list[tuple[int, FieldInfo]] = []
    for info in infos:
        where = f"{cls.__name__}.{info.name} at {info.offset:#x}"
        if hasattr(Layout, info.name):
            raise LayoutError(f"{where}: every layout has an attribute {info.name!r}; name the field otherwise")
        if info.offset < 0 or info.width_bytes <= 0 or info.elements <= 0:
            raise LayoutError(f"{where}: offset, width and number of elements must be positive")
        if info.offset + info.length_bytes > cls.SIZE:
            raise LayoutError(f"{where}: {info.length_bytes} bytes reach past the size {cls.SIZE:#x} of {cls.__name__}")
        if info.kind is Kind.BITS and not 0 <= info.low_bit <= info.high_bit < info.width_bytes * 8:
            raise LayoutError(f"{where}: bits {info.high_bit}:{info.low_bit} of a {info.width_bytes}-byte word")
        if info.valid_bit and (cls.VALID_BITMAP is None or info.offset >= 16 * 8 * VALID_BIT_SPAN_BYTES):
            raise LayoutError(f"{where}: valid_bit, but {cls.__name__} has no valid_bitmap that covers it")
        if info.reserved > info.maximum:
            raise LayoutError(f"{where}: reserved mask {info.reserved:#x} is wider than the field")
        if info.aligned < 1 or info.aligned & (info.aligned - 1):
            raise LayoutError(f"{where}: alignment of {info.aligned} bytes, expected a power of two")
        bits_mask = info.mask if info.kind is Kind.BITS else (1 << info.length_bytes * 8) - 1
        place = bits_mask << info.offset * 8
        if taken & place:
            other = next(owner for owned, owner in owners if owned & place)
            raise LayoutError(f"{where}: overlaps {other.name} at {other.offset:#x}")
        if bitmap is not None and place & ((1 << VALID_BITMAP_BYTES * 8) - 1) << bitmap * 8:
            names_it = info.kind is Kind.BYTES and (info.offset, info.length_bytes) == (bitmap, VALID_BITMAP_BYTES)
            if not names_it:
                raise LayoutError(f"{where}: overlaps the valid bitmap at {bitmap:#x}")
        taken |= place
        owners.append((place, info))


def _with_plain_values(cls: type[Layout], info: FieldInfo) -> FieldInfo:
    """Legal values given as an IntEnum, as numbers: before Python 3.12 `5 in SomeEnum` raises TypeError."""
    if not isinstance(info.values, type):
        return info
    members = tuple(cast("Iterable[object]", info.values)) if isinstance(info.values, EnumMeta) else ()
    if not members or not all(isinstance(member, int) for member in members):
        raise LayoutError(
            f"{cls.__name__}.{info.name} at {info.offset:#x}: values={info.values.__name__},"
            " expected an enumeration of numbers or a container of them"
        )
    return info._replace(values=frozenset(int(cast("int", member)) for member in members))


def _encode(cls: type[Layout], info: FieldInfo, value: Any) -> bytes:
    """The bytes of one field (of a bit field: nothing, only the check)."""
    where = f"{cls.__name__}.{info.name}"
    if info.kind is Kind.BYTES:
        if not isinstance(value, (bytes, bytearray)) or len(value) != info.width_bytes:
            raise LayoutError(f"{where}: {value!r:.40}, expected {info.width_bytes} bytes")
        return bytes(value)
    if info.kind is Kind.ARRAY:
        numbers = isinstance(value, Sequence) and all(isinstance(item, int) for item in value)
        if not numbers or len(value) != info.elements or not all(0 <= item <= info.maximum for item in value):
            raise LayoutError(f"{where}: {value!r:.60}, expected {info.elements} numbers up to {info.maximum:#x}")
        return array_struct(info).pack(*value)
    if not isinstance(value, int) or not 0 <= value <= info.maximum:
        raise LayoutError(f"{where}: {value!r:.40}, expected a number from 0 to {info.maximum:#x}")
    if info.kind is Kind.BITS:
        return b""
    return value.to_bytes(info.width_bytes, "big" if info.big_endian else "little")


def _packer(cls: type[Layout], names: tuple[str, ...]) -> Packer:
    """How to build a structure of these fields: at once when they are plain little-endian numbers, two or more."""
    infos = [cls.FIELDS.get(name) for name in names]
    places, bits_set = [], 0
    for info in infos:
        if info is None or info.kind is not Kind.UINT or info.big_endian:
            return None, None, b""
        places.append((info.offset, info.width_bytes, "xBHxIxxxQ"[info.width_bytes], info.name))
        if info.valid_bit:
            bits_set |= 1 << info.offset // VALID_BIT_SPAN_BYTES
    if bits_set and cls.VALID_BITMAP is not None:
        places.append((cls.VALID_BITMAP, VALID_BITMAP_BYTES, f"{VALID_BITMAP_BYTES}s", ""))
    if len(places) < 2:
        return None, None, b""
    pattern, position = "<", 0
    for offset, width_bytes, letter, _ in sorted(places):
        pattern += f"{offset - position}x{letter}"
        position = offset + width_bytes
    order = [name for *_, name in sorted(places)]
    pack = struct.Struct(f"{pattern}{cls.SIZE - position}x").pack
    return pack, itemgetter(*order), bits_set.to_bytes(VALID_BITMAP_BYTES, "little")


def _write(cls: type[Layout], data: bytearray, fields: Mapping[str, Any]) -> bytearray:
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
            except struct.error:
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
    valid = valid_place(cls.VALID_BITMAP, info) if info.valid_bit and cls.VALID_BITMAP is not None else (0, 0)
    return pack_into, info.offset, *valid
