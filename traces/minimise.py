"""Make a test case as small as it can be while it still shows what it shows.

Pure functions over a predicate: whoever has a divergence, an oracle's finding or a crash says what "still shows it"
means. First whole steps go (ddmin), then fields become simpler, one at a time, until nothing can change any more.

Source: Zeller and Hildebrandt, Simplifying and Isolating Failure-Inducing Input, IEEE TSE 28(2), 2002.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from sevlab.core.vocabulary import Record, spec_of
from sevlab.traces.records import TRACE_RECORDS

T = TypeVar("T")


def minimise(steps: Sequence[Record], shows: Callable[[tuple[Record, ...]], bool]) -> tuple[Record, ...]:
    """The smallest steps found for which `shows` still holds; it must hold for `steps`."""
    left = tuple(steps)
    while True:
        before = left
        left = simplify(drop_items(left, shows), shows)
        if left == before:
            return left


def drop_items(items: Sequence[T], shows: Callable[[tuple[T, ...]], bool]) -> tuple[T, ...]:
    """A part of `items`, in order, of which no single item can go (1-minimal). Asks for each candidate once."""
    left = tuple(items)
    asked: set[tuple[int, ...]] = set()
    kept = tuple(range(len(left)))
    pieces = 2
    while len(kept) > 1:
        length = max(1, -(-len(kept) // pieces))
        for start in range(0, len(kept), length):
            candidate = kept[:start] + kept[start + length :]
            if not candidate or candidate in asked:
                continue
            asked.add(candidate)
            if shows(tuple(left[index] for index in candidate)):
                kept = candidate
                pieces = max(pieces - 1, 2)
                break
        else:
            if length == 1:
                break
            pieces = min(pieces * 2, len(kept))
    return tuple(left[index] for index in kept)


def simplify(steps: Sequence[Record], shows: Callable[[tuple[Record, ...]], bool]) -> tuple[Record, ...]:
    """`steps` with every field as simple as `shows` allows: smaller numbers, shorter bytes, fewer items.

    The records of `traces.records` stay as they are: a machine's state means nothing in part.
    """
    left = list(steps)
    for position, step in enumerate(left):
        if type(step) in TRACE_RECORDS:
            continue
        for index in range(len(spec_of(step).fields)):
            changed = True
            while changed:
                changed = False
                record = left[position]
                for value in simpler(record[index]):
                    candidate = _with(record, index, value)
                    if shows((*left[:position], candidate, *left[position + 1 :])):
                        left[position] = candidate
                        changed = True
                        break
    return tuple(left)


def _with(record: Record, index: int, value: Any) -> Record:
    make: Callable[..., Record] = type(record)
    return make(*record[:index], value, *record[index + 1 :])


def simpler(value: Any) -> Iterator[Any]:
    """Simpler values than `value` of its type, the simplest first; each is strictly simpler, so repeating ends."""
    if isinstance(value, bool):
        if value:
            yield False
    elif isinstance(value, int):
        yield from _smaller(value)
    elif isinstance(value, (bytes, str, tuple)):
        length = len(value)
        while length > 0:  # all of it, then ever smaller pieces from either end
            yield value[:-length]
            if length < len(value):
                yield value[length:]
            length //= 2
        if isinstance(value, bytes):
            yield from _zeroed(value)
        if isinstance(value, tuple):
            for index, item in enumerate(value):
                for other in simpler(item):
                    yield (*value[:index], other, *value[index + 1 :])


def _zeroed(value: bytes) -> Iterator[bytes]:
    length = len(value)
    while length > 0:
        for start in range(0, len(value), length):
            piece = value[start : start + length]
            if piece.strip(b"\0"):
                yield value[:start] + bytes(len(piece)) + value[start + length :]
        length //= 4


def _smaller(value: int) -> Iterator[int]:
    if value == 0:
        return
    yield 0
    seen = {0, value}
    for candidate in (1, value >> 32, value & 0xFFFF_FFFF, value & ~0xFFF, value >> 1, value & (value - 1), value - 1):
        if 0 <= candidate < value and candidate not in seen:
            seen.add(candidate)
            yield candidate
