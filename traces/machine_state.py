"""A machine's snapshot as bytes: what a recording holds where the machine did not come to its state by steps.

The values in a snapshot are data of few kinds (`core.state`): numbers, bytes, texts, tuples, enumeration members, named
tuples, images of state objects. Classes travel by name and are looked up among what the machine's plugins have
imported; nothing is imported, and nothing but these kinds is made, whatever the bytes say.
"""

from __future__ import annotations

import sys
from enum import Enum
from typing import Any

import msgpack
from sevlab.core.errors import TraceFormatError
from sevlab.core.machine import Snapshot
from sevlab.core.state import StateDict, Stateful, StateImage

IMAGE, MEMBER, NAMED, NUMBER = 1, 2, 3, 4
"""Extension types: [class, values] of a state object, [class, value] of an enumeration, [class, values] of a named
tuple, and a number past 64 bits as signed little-endian bytes."""


def pack_snapshot(snapshot: Snapshot) -> bytes:
    """The bytes of a snapshot. Raises `TraceFormatError` for state of another kind than the kernel defines."""
    return _pack(snapshot)


def unpack_snapshot(data: bytes) -> Snapshot:
    """The snapshot of `pack_snapshot`. Raises `TraceFormatError` for anything else."""
    try:
        snapshot = _unpack(data)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise TraceFormatError(f"machine state: {type(error).__name__}: {error!s:.200}") from error
    if not isinstance(snapshot, Snapshot):
        raise TraceFormatError(f"machine state: expected a snapshot, found {type(snapshot).__name__}")
    return snapshot


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, default=_extension, strict_types=True)
    return packed


def _extension(value: Any) -> Any:
    if type(value) is tuple:
        return list(value)
    if isinstance(value, StateImage):
        return msgpack.ExtType(IMAGE, _pack([_name(value.kind), list(value.values)]))
    if isinstance(value, Enum):
        return msgpack.ExtType(MEMBER, _pack([_name(type(value)), value.value]))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return msgpack.ExtType(NAMED, _pack([_name(type(value)), list(value)]))
    if type(value) is int:
        return msgpack.ExtType(NUMBER, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
    raise TraceFormatError(f"machine state: {type(value).__name__} {value!r:.60} is no data that a trace can hold")


def _unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, use_list=False, strict_map_key=False, ext_hook=_value)


def _value(code: int, data: bytes) -> Any:
    if code == NUMBER:
        return int.from_bytes(data, "little", signed=True)
    name, content = _unpack(data)
    if code == IMAGE:
        return StateImage(_class(name, Stateful, StateDict), content)
    if code == MEMBER:
        return _class(name, Enum)(content)
    if code == NAMED:
        cls = _class(name, tuple)
        return cls(*content) if hasattr(cls, "_fields") else content
    raise TraceFormatError(f"machine state: extension {code}, expected 1 to 4")


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
