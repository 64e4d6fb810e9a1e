"""Records as Python source that a person can read and change."""

from __future__ import annotations

import importlib
import json
from base64 import b85encode
from typing import Any

from sevlab.core.layout import Layout
from sevlab.core.vocabulary import Record, spec_of
from sevlab.fuzz.export.pieces import Piece, parts, runs
from sevlab.fuzz.messages import Carried

INDENT = "    "
WIDTH = 100
PLAIN_BYTES = 48
"""Bytes up to this length are written as they are."""

ENCODED_BYTES = 512
"""What is longer and has no structure is written in base 85."""


class Source:
    """Collects the imports that the literals need."""

    def __init__(self) -> None:
        self.imports: dict[str, set[str]] = {}
        self.needs_with_bytes = False
        self.needs_b85 = False

    def name(self, cls: type) -> str:
        """Use a class by its name, from the package that publishes it."""
        module = cls.__module__
        package = module.rpartition(".")[0]
        public = getattr(importlib.import_module(package), "__all__", ())
        self.imports.setdefault(package if cls.__name__ in public else module, set()).add(cls.__name__)
        return cls.__name__

    def import_lines(self) -> list[str]:
        """The import statements, in order."""
        return [
            f"from {module} import {', '.join(sorted(names))}"
            if len(module) + sum(len(name) + 2 for name in names) < WIDTH - 12
            else "\n".join((f"from {module} import (", *(f"{INDENT}{name}," for name in sorted(names)), ")"))
            for module, names in sorted(self.imports.items())
        ]

    # Values ---------------------------------------------------------------------------------------------------------

    def record(self, record: Record, carried: Carried | None, depth: int) -> str:
        """A record by its constructor, with its fields by name."""
        values = []
        for field, value in zip(spec_of(record).fields, record, strict=True):
            layout = carried.layout if carried is not None and carried.payload.field == field.name else None
            if layout is not None and isinstance(value, bytes):
                text = self.image(layout, value, depth + 1)
            else:
                text = self.value(value, depth + 1)
            values.append(f"{field.name}={text}")
        return call(self.name(type(record)), values, depth)

    def value(self, value: Any, depth: int) -> str:
        """Any value that a record holds."""
        if isinstance(value, str):
            return quoted(value)
        if isinstance(value, bool) or not isinstance(value, (int, bytes, tuple)):
            return repr(value)
        if isinstance(value, int):
            return number(value)
        if isinstance(value, bytes):
            return self.plain(value, depth)
        items = [self.value(item, depth + 1) for item in value]
        return call("", items, depth, one=len(items) == 1)

    def plain(self, data: bytes, depth: int) -> str:
        """Bytes without a layout."""
        if len(data) <= PLAIN_BYTES:
            return f'bytes.fromhex("{data.hex()}")' if data else 'b""'
        found = runs(data)
        if sum(end - start for start, end in found) <= max(PLAIN_BYTES, len(data) // 4):
            return self.with_bytes(f"bytes({number(len(data))})", [Piece(s, data[s:e], "") for s, e in found], depth)
        if len(data) <= ENCODED_BYTES:
            return _in_lines("bytes.fromhex", data.hex(), depth)
        self.needs_b85 = True
        return _in_lines("b85decode", b85encode(data).decode(), depth)

    def image(self, layout: type[Layout], data: bytes, depth: int) -> str:
        """The bytes of a structure by its fields; shorter ones are cut, longer ones have no structure."""
        if len(data) > layout.SIZE or not data:
            return self.plain(data, depth)
        cut = "" if len(data) == layout.SIZE else f"[:{number(len(data))}]"
        fields, pieces = parts(layout, data.ljust(layout.SIZE, b"\0"))
        inside = depth + 1 if pieces else depth
        values = [f"{name}={self.value(value, inside + 1)}" for name, value in fields.items()]
        text = call(f"{self.name(layout)}.build", values, inside)
        return (self.with_bytes(text, list(pieces), depth) if pieces else text) + cut

    def with_bytes(self, base: str, pieces: list[Piece], depth: int) -> str:
        """Bytes with some of them changed."""
        if not pieces:
            return base
        self.needs_with_bytes = True
        inner, outer = INDENT * (depth + 1), INDENT * depth
        lines = [f"{inner}{INDENT}{number(p.offset)}: {self.plain(p.data, depth + 2)},{_note(p)}" for p in pieces]
        return "\n".join(("with_bytes(", f"{inner}{base},", f"{inner}{{", *lines, f"{inner}}},", f"{outer})"))


def _note(piece: Piece) -> str:
    return f"  # in {piece.field}" if piece.field else ""


def quoted(text: str) -> str:
    """A string in double quotes."""
    return json.dumps(text)


def number(value: int) -> str:
    """A number as people of the field write it."""
    return f"0x{value:X}" if value > 9 else str(int(value))


def call(name: str, values: list[str], depth: int, *, one: bool = False) -> str:
    """`name(values)`, on one line where it fits; `one`: a tuple of one item."""
    line = f"{name}({', '.join(values)}{',' if one else ''})"
    if "\n" not in line and len(line) + len(INDENT) * depth < WIDTH:
        return line
    inner = INDENT * (depth + 1)
    return "\n".join((f"{name}(", *(f"{inner}{value}," for value in values), f"{INDENT * depth})"))


def _in_lines(name: str, text: str, depth: int) -> str:
    inner = INDENT * (depth + 1)
    room = WIDTH - len(inner)
    lines = [f"{inner}{quoted(text[start : start + room])}" for start in range(0, len(text), room)]
    return "\n".join((f"{name}(", *lines, f"{INDENT * depth})"))
