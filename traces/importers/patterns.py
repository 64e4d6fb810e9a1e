"""Text layouts of log lines, declared once: a template gives the parser of one event body.

A template is the line's text with fields in braces, `{name:form}`; `<...>` marks a part that some versions print and
others do not. Forms:

- `x` hexadecimal with or without `0x`; `d` decimal, a negative one as its 64-bit two's complement;
- `byte` a signed byte as 0 to 255; `bytes` hexadecimal bytes with blanks between;
- `w` a word, `t` any text up to what follows;
- `one:A|B` a choice of two, given as a boolean: whether it is the second;
- `is:TEXT` a boolean: whether TEXT, which is optional, is there;
- a name of `CONVERTERS`: a text that a table turns into a number.

A numeric field inside `<...>` becomes a tuple, empty where the line does not print it: absent is not zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from sevlab.core.units import MASK64
from sevlab.traces.importers.names import CONVERTERS

FIELD = re.compile(r"\{(\w+):([^}]*)\}|<|>")

Convert = Callable[[str], Any]


class Layout(NamedTuple):
    """A compiled template: `match` of the whole body, and for each field of the record how its text converts."""

    match: Callable[[str], re.Match[str] | None]
    convert: tuple[tuple[str, Convert], ...]

    def parse(self, body: str) -> dict[str, Any] | None:
        """The fields of `body` by name; None when it has another layout."""
        found = self.match(body)
        if found is None:
            return None
        texts = found.groupdict()
        try:
            return {name: convert(texts[name]) for name, convert in self.convert}
        except (KeyError, ValueError):
            return None


def _hex(text: str) -> int:
    value = int(text, 16)
    if value > MASK64:
        raise ValueError(text)
    return value


def _decimal(text: str) -> int:
    value = int(text)
    if not -(1 << 63) <= value <= MASK64:
        raise ValueError(text)
    return value & MASK64


def _optional(convert: Convert) -> Convert:
    return lambda text: () if text is None else (convert(text),)


FORMS: Mapping[str, tuple[str, Convert]] = {
    "x": (r"(?:0x)?[0-9a-fA-F]{1,18}", _hex),
    "d": (r"-?\d{1,20}", _decimal),
    "byte": (r"-?\d{1,3}", lambda text: int(text) & 0xFF),
    "bytes": (r"[0-9a-f]{2}(?: [0-9a-f]{2})*", bytes.fromhex),
    "w": (r"[^\s,()]+", str),
    "t": (r".*?", str),
}


@cache
def compile_layout(template: str) -> Layout:
    """The parser of a template. Raises `ValueError` or `KeyError` for one that is not well formed."""
    pattern, depth, at = "", 0, 0
    convert: list[tuple[str, Convert]] = []
    for token in FIELD.finditer(template):
        pattern += re.escape(template[at : token.start()])
        at = token.end()
        if token[0] in "<>":
            pattern += "(?:" if token[0] == "<" else ")?"
            depth += 1 if token[0] == "<" else -1
            continue
        name, form = token[1], token[2]
        kind, _, rest = form.partition(":")
        if kind == "is":
            pattern += f"(?P<{name}>{re.escape(rest)})?"
            convert.append((name, lambda text: text is not None))
        elif kind == "one":
            first, second = rest.split("|")
            pattern += f"(?P<{name}>{re.escape(first)}|{re.escape(second)})"
            convert.append((name, second.__eq__))
        else:
            expression, make = FORMS[kind] if kind in FORMS else (r".+?", CONVERTERS[kind])
            pattern += f"(?P<{name}>{expression})"
            convert.append((name, _optional(make) if depth and kind in ("x", "d") else make))
    pattern += re.escape(template[at:])
    return Layout(re.compile(pattern).fullmatch, tuple(convert))
