"""Text layouts of log lines, declared once: a template gives the parser of one event body.

A template is the line's text with fields in braces, `{name:form}`; `<...>` marks a part that some versions print and
others do not. Forms:

- `x` hexadecimal with or without `0x`, `x32` the same of 32 bits;
- `d` decimal, a negative one as its 64-bit two's complement;
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
from sevlab.core.vocabulary import spec_of
from sevlab.traces.importers.names import CONVERTERS

FIELD = re.compile(r"\{(\w+):([^}]*)\}|<|>")

Convert = Callable[[str], Any]


class Layout(NamedTuple):
    """A compiled template: `match` of the whole body, and for each group its field, conversion, and if it may miss."""

    match: Callable[[str], re.Match[str] | None]
    convert: tuple[tuple[str, Convert, bool], ...]

    def parser(self, record: Any, absent: Mapping[str, Any]) -> Callable[[str], Any | None]:
        """A function from a body to a `record`, or to None when it has another layout; `absent` fills what is left.

        The fields' conversions become one generated expression: a log has many bodies.
        """
        places = {name: place for place, (name, _, _) in enumerate(self.convert)}
        scope: dict[str, Any] = {"new": tuple.__new__, "cls": record, "int": int}
        fields = []
        for field in spec_of(record).fields:
            name, place = field.name, places.get(field.name)
            if place is None:
                scope[f"absent_{name}"] = absent[name]
                fields.append(f"absent_{name}")
                continue
            _, scope[f"convert_{place}"], may_miss = self.convert[place]
            given = f"convert_{place}(groups[{place}])"
            if self.convert[place][1] is _hex:
                given = f"int(groups[{place}], 16)"
            fields.append(f"({given},)" if field.type is tuple and not may_miss else given)
        make = eval(f"lambda groups: new(cls, ({', '.join(fields)},))", scope)  # noqa: S307  # names of our declarations
        match = self.match

        def parse(body: str) -> Any | None:
            found = match(body)
            try:
                return None if found is None else make(found.groups())
            except (KeyError, ValueError):
                return None

        return parse


def _hex(text: str) -> int:
    return int(text, 16)


def _decimal(text: str) -> int:
    value = int(text)
    if not -(1 << 63) <= value <= MASK64:
        raise ValueError(text)
    return value & MASK64


def _optional(convert: Convert) -> Convert:
    return lambda text: () if text is None else (convert(text),)


FORMS: Mapping[str, tuple[str, Convert]] = {
    "x": (r"(?:0x)?[0-9a-fA-F]{1,16}", _hex),
    "x32": (r"(?:0x)?[0-9a-fA-F]{1,8}", _hex),
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
    convert: list[tuple[str, Convert, bool]] = []
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
            convert.append((name, lambda text: text is not None, False))
        elif kind == "one":
            first, second = rest.split("|")
            pattern += f"(?P<{name}>{re.escape(first)}|{re.escape(second)})"
            convert.append((name, second.__eq__, False))
        else:
            expression, make = FORMS[kind] if kind in FORMS else (r".+?", CONVERTERS[kind])
            pattern += f"(?P<{name}>{expression})"
            may_miss = depth > 0 and kind in ("x", "x32", "d")
            convert.append((name, _optional(make) if may_miss else make, may_miss))
    pattern += re.escape(template[at:])
    return Layout(re.compile(pattern).fullmatch, tuple(convert))
