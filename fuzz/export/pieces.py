"""Bytes in terms of their layout: the fields that make them, and the pieces that no field explains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sevlab.core.layout import FieldInfo, FieldValue, Kind, Layout
from sevlab.core.layout_tools import read_field

LONG_BYTES = 64
"""A field of more bytes than this is written as the pieces of it that are not zero."""

GAP_BYTES = 8
"""So many zeros end a piece."""


class Piece(NamedTuple):
    """`data` at `offset`, which no field explains; `field`: the one that lies there, "" for none."""

    offset: int
    data: bytes
    field: str


class Parts(NamedTuple):
    """`layout.build(**fields)` with `pieces` written over it is the image."""

    fields: dict[str, FieldValue]
    pieces: tuple[Piece, ...]


def parts(layout: type[Layout], data: bytes) -> Parts:
    """Take `data`, of exactly the layout's size, apart."""
    image = layout.from_bytes(data)
    fields: dict[str, FieldValue] = {}
    for name, info in layout.FIELDS.items():
        if info.offset == layout.VALID_BITMAP or (info.kind is Kind.BYTES and info.length_bytes > LONG_BYTES):
            continue
        value = read_field(info, data)
        marked = info.valid_bit and image.is_valid(name)
        if marked or (not info.valid_bit and any(data[info.offset : info.offset + info.length_bytes]) and value):
            fields[name] = value
    return Parts(fields, tuple(_pieces(layout, layout.build(**fields), data)))


def _pieces(layout: type[Layout], built: bytes, data: bytes) -> Iterator[Piece]:
    for start, end in runs(bytes(one ^ other for one, other in zip(built, data, strict=True))):
        yield Piece(start, data[start:end], next((i.name for i in layout.FIELDS.values() if _holds(i, start)), ""))


def _holds(info: FieldInfo, offset: int) -> bool:
    return info.offset <= offset < info.offset + info.length_bytes


def runs(data: bytes) -> list[tuple[int, int]]:
    """(start, end) of what is not zero; a few zeros between belong to it."""
    found: list[tuple[int, int]] = []
    for offset, byte in enumerate(data):
        if not byte:
            continue
        if found and offset - found[-1][1] < GAP_BYTES:
            found[-1] = found[-1][0], offset + 1
        else:
            found.append((offset, offset + 1))
    return found
