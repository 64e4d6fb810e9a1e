"""Snapshots of layouts: the generated class with a slot for each field, and the function that decodes into it."""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, Any

from sevlab.core.errors import InvariantViolation
from sevlab.core.layout_fields import VALID_BIT_SPAN_BYTES, FieldInfo, Kind, array_struct, not_valid, valid_place

if TYPE_CHECKING:
    from sevlab.core.layout import Layout


def make_snapshot(
    cls: type[Layout],
    infos: list[FieldInfo],
    or_zero: frozenset[str] = frozenset(),
    checked: frozenset[str] = frozenset(),
) -> tuple[Any, type]:
    """The class of snapshots of the fields `infos` and the function that decodes bytes into one.

    The class has a slot for each field, which hides the field's descriptor, so that a read is a plain slot read. A
    field whose valid bit is clear is left unset (0 where `or_zero` names it); `__getattr__`, which Python calls only
    then, raises. The valid bits of `checked` are not looked at: the caller has. A class with `__getattr__` reads every
    attribute the slow way, so where no field can be left unset it has none.
    """
    unsure = {info.name for info in infos if info.valid_bit and info.name not in checked}
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
    lines = ["def decode(data, version=None):", "    item = new(open_class)", "    item._raw = data"]
    lines.append("    item.version = version")
    if items:
        lines.append(f"    {', '.join(items.values())}, = unpack(data, 0)")
    if unsure:
        lines.append(f"    valid_0, valid_1 = unpack_valid(data, {cls.VALID_BITMAP})")
    for info in infos:
        source = items.get((info.offset, info.width_bytes)) if info.name not in alone else None
        if source is None:
            value = f"whole(infos[{info.name!r}], data)"
        elif info.kind is Kind.BITS:
            value = f"({source} >> {info.low_bit}) & {info.maximum:#x}"
        else:
            value = source
        store = f"item.{info.name} = {value}"
        if info.since is not None:
            store = f"item.{info.name} = {value} if version is None or version >= {info.since} else None"
        if info.name in unsure:
            word, bit = divmod(info.offset // VALID_BIT_SPAN_BYTES, 64)
            lines.append(f"    if valid_{word} & {1 << bit:#x}: {store}")
            if info.name in or_zero:
                lines.append(f"    else: item.{info.name} = 0")
        else:
            lines.append(f"    {store}")
    lines += ["    item.__class__ = snapshot_class", "    return item"]

    chosen = {info.name: info for info in infos}
    # Values go in while the object still has a class that takes plain assignments; the class it ends with forbids them.
    fields = {"__slots__": ("_raw", "version", *chosen), "_is_snapshot": True, "__module__": cls.__module__}
    open_class: Any = type(cls.__name__, (cls,), fields)
    body: dict[str, Any] = {"__slots__": (), "_is_snapshot": True, "FIELDS": chosen}
    body |= {name: property(_undeclared(cls, name)) for name in cls.FIELDS if name not in chosen}
    body |= {"__setattr__": _immutable, "__delattr__": _immutable, "__repr__": _repr}
    if not unsure <= or_zero:
        body["__getattr__"] = _unset
    body |= {"__eq__": _equal, "__hash__": _hash, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    body |= {"raw": _raw, "is_valid": _snapshot_is_valid, "value_or_zero": _snapshot_value_or_zero}
    snapshot_class: Any = type(cls.__name__, (open_class,), body)
    snapshot_class._layout = cls
    scope: dict[str, Any] = {
        "open_class": open_class,
        "snapshot_class": snapshot_class,
        "new": object.__new__,
        "unpack": Struct(pattern).unpack_from,
        "unpack_valid": Struct("<QQ").unpack_from,
        "infos": chosen,
        "whole": _decode_alone,
    }
    exec("\n".join(lines), scope)  # noqa: S102  # made of declared names and numbers only
    return staticmethod(scope["decode"]), snapshot_class


def _undeclared(cls: type[Layout], name: str) -> Callable[[Any], Any]:
    def read(_item: Any) -> Any:
        raise InvariantViolation("layout.undeclared", f"{cls.__name__}.{name} is read but was not asked for")

    return read


def _decode_alone(info: FieldInfo, data: bytes) -> Any:
    piece = data[info.offset : info.offset + info.length_bytes]
    if info.kind is Kind.ARRAY:
        return array_struct(info).unpack(piece)
    if info.kind is Kind.BYTES:
        return piece
    word = int.from_bytes(piece, "big" if info.big_endian else "little")
    return (word & info.mask) >> info.low_bit if info.kind is Kind.BITS else word


def _immutable(item: Any, name: str, *_value: Any) -> None:
    raise AttributeError(f"a snapshot of {type(item).__name__} is immutable; use replace({name}=...)")


def _unset(item: Any, name: str) -> Any:
    if name in type(item).FIELDS:
        raise not_valid(type(item).__name__, name)
    raise AttributeError(f"{type(item).__name__} has no field {name!r}")


def _raw(item: Any) -> bytes:
    return item._raw  # type: ignore[no-any-return]


def _snapshot_is_valid(item: Any, name: str) -> bool:
    info = type(item).FIELDS[name]
    if not info.valid_bit:
        return True
    offset, mask = valid_place(type(item).VALID_BITMAP, info)
    return bool(item._raw[offset] & mask)


def _snapshot_value_or_zero(item: Any, name: str) -> int:
    return getattr(item, name) if _snapshot_is_valid(item, name) else 0


def _equal(item: Any, other: object) -> Any:
    if type(other) is not type(item):
        return NotImplemented
    return (item._raw, item.version) == (other._raw, other.version)  # type: ignore[attr-defined]


def _hash(item: Any) -> int:
    return hash((type(item), item._raw))


def _worth_showing(value: Any) -> bool:
    return any(value) if isinstance(value, (bytes, tuple)) else bool(value)


def _repr(item: Any) -> str:
    shown = []
    for name, info in type(item).FIELDS.items():
        if _snapshot_is_valid(item, name) and _worth_showing(value := getattr(item, name)):
            shown.append(
                f"{name}={value:#x}"
                if isinstance(value, int) and info.kind is not Kind.BYTES
                else f"{name}={value!r:.40}"
            )
    return f"{type(item).__name__}({', '.join(shown)})"
