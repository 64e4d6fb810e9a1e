"""A machine's snapshot as bytes: what a recording holds where the machine did not come to its state by steps.

The values in a snapshot are data of few kinds (`core.state`): numbers, bytes, texts, tuples, enumeration members, named
tuples, images of state objects. Classes travel by name and are looked up among what the machine's plugins have
imported; nothing is imported, and nothing but these kinds is made, whatever the bytes say.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from enum import Enum
from itertools import zip_longest
from typing import Any

import msgpack
from sevlab.core.errors import TraceFormatError
from sevlab.core.machine import Snapshot
from sevlab.core.pages import PageImage
from sevlab.core.state import StateDict, Stateful, StateImage
from sevlab.core.units import PAGE_BYTES

IMAGE, MEMBER, NAMED, NUMBER, FRESH, KEPT = 1, 2, 3, 4, 5, 6
"""Extension types: [class, values] of a state object, [class, value] of an enumeration, [class, values] of a named
tuple, a number past 64 bits as signed little-endian bytes, [class, nil] of a value that equals a new one of its class,
such as a digest of nothing yet, and nothing for a value that is as before."""

OWN = ("sevlab.", "sevlab_")
"""Modules of which a new value may be made: ours, and those of plugins by their naming rule."""


class Stand(Enum):
    """What stands in the place of a value: `KEPT` that it is as before, `MISSING` that there was none before."""

    KEPT = 1
    MISSING = 2


def pack_snapshot(snapshot: Snapshot, before: Snapshot | None = None) -> bytes:
    """The bytes of a snapshot, without what is as in `before`.

    Raises `TraceFormatError` for new state of another kind than the kernel defines.
    """
    return _pack(snapshot if before is None else _changed(snapshot, before))


def unpack_snapshot(data: bytes, before: Snapshot | None = None) -> Snapshot:
    """The snapshot of `pack_snapshot`, with the same `before`. Raises `TraceFormatError` for anything else."""
    try:
        snapshot = _whole(_unpack(data), before or Stand.MISSING)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise TraceFormatError(f"machine state: {type(error).__name__}: {error!s:.200}") from error
    if not isinstance(snapshot, Snapshot):
        raise TraceFormatError(f"machine state: expected a snapshot, found {type(snapshot).__name__}")
    return snapshot


def pack_pages(pages: tuple[tuple[int, PageImage], ...]) -> bytes:
    """The bytes of a part of a memory's pages."""
    return _pack(pages)


def unpack_pages(data: bytes) -> tuple[tuple[int, PageImage], ...]:
    """The pages of `pack_pages`. Raises `TraceFormatError` for anything else."""
    try:
        pages = _unpack(data)
        right = all(
            type(pfn) is int and type(page) is PageImage and len(page.data) == PAGE_BYTES and page.tags
            for pfn, page in pages
        )
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise TraceFormatError(f"pages: {type(error).__name__}: {error!s:.200}") from error
    if not right:
        raise TraceFormatError("pages: expected numbers and pages of 4096 bytes")
    return tuple(pages)


def without_components(data: bytes, plugins: Collection[str]) -> bytes:
    """The bytes of a snapshot without the components of these plugins: for the same machine composed without them."""
    snapshot = _unpack(data)
    if snapshot is Stand.KEPT:
        return data
    if not isinstance(snapshot, Snapshot):
        raise TraceFormatError(f"machine state: expected a snapshot, found {type(snapshot).__name__}")
    if not isinstance(snapshot.state, StateImage):  # only memory changed
        return data
    tree = dict(snapshot.state.values)
    components = tree["components"]
    if isinstance(components, StateImage):
        left = tuple((name, item) for name, item in components.values if name.partition(".")[0] not in plugins)
        tree["components"] = StateImage(StateDict, left)
    return _pack(snapshot._replace(state=StateImage(StateDict, tuple(tree.items()))))


def _changed(value: Any, before: Any) -> Any:
    """`value` with `Stand.KEPT` in the place of every part that is as in `before`."""
    if type(value) is type(before) and value == before:
        return Stand.KEPT
    return _parts(value, before, _changed)


def _whole(value: Any, before: Any) -> Any:
    """`value` with the parts of `before` in the place of every `Stand.KEPT`."""
    if value is not Stand.KEPT:
        return _parts(value, before, _whole)
    if before is Stand.MISSING:
        raise TraceFormatError("machine state: it keeps a part that the machine does not have")
    return before


def _parts(value: Any, before: Any, treat: Callable[[Any, Any], Any]) -> Any:
    """`value` with each part treated together with the part of `before` in its place, `MISSING` where there is none."""
    if isinstance(value, StateImage):
        old = before.values if isinstance(before, StateImage) and before.kind is value.kind else ()
        if value.kind is StateDict:
            known = dict(old)
            return StateImage(
                StateDict, tuple((key, treat(item, known.get(key, Stand.MISSING))) for key, item in value.values)
            )
        return StateImage(
            value.kind, tuple(treat(*pair) for pair in zip_longest(value.values, old[: len(value.values)]))
        )
    if isinstance(value, tuple):
        old = before if isinstance(before, tuple) and len(before) == len(value) else (Stand.MISSING,) * len(value)
        parts = (treat(*pair) for pair in zip(value, old, strict=True))
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, default=_extension, strict_types=True)
    return packed


def _extension(value: Any) -> Any:
    if type(value) is tuple:
        return list(value)
    if value is Stand.KEPT:
        return msgpack.ExtType(KEPT, b"")
    if isinstance(value, StateImage):
        return msgpack.ExtType(IMAGE, _pack([_name(value.kind), list(value.values)]))
    if isinstance(value, Enum):
        return msgpack.ExtType(MEMBER, _pack([_name(type(value)), value.value]))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return msgpack.ExtType(NAMED, _pack([_name(type(value)), list(value)]))
    if type(value) is int:
        return msgpack.ExtType(NUMBER, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
    if type(value).__module__.startswith(OWN) and value == type(value)():
        return msgpack.ExtType(FRESH, _pack([_name(type(value)), None]))
    raise TraceFormatError(f"machine state: {type(value).__name__} {value!r:.60} is no data that a trace can hold")


def _unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, use_list=False, strict_map_key=False, ext_hook=_value)


def _value(code: int, data: bytes) -> Any:
    if code == NUMBER:
        return int.from_bytes(data, "little", signed=True)
    if code == KEPT:
        return Stand.KEPT
    name, content = _unpack(data)
    if code == IMAGE:
        return StateImage(_class(name, Stateful, StateDict), content)
    if code == MEMBER:
        return _class(name, Enum)(content)
    if code == NAMED:
        cls = _class(name, tuple)
        return cls(*content) if hasattr(cls, "_fields") else content
    if code == FRESH and name.startswith(OWN):
        return _class(name, object)()
    raise TraceFormatError(f"machine state: extension {code} of {name!r:.60}, expected 1 to 6")


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _class(name: str, *bases: type) -> Any:
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, bases)):
        raise TraceFormatError(f"machine state: no class {name!r:.100} here; is a plugin missing?")
    return found
