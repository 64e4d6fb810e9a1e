"""Names of a kernel's functions, from the table that it carries for itself.

Nothing in the image says where the table is. It is found by what must be in it: the tokens of the ten digits in a row,
an index whose entries are where the tokens begin, and counts that agree with each other.
Source: Linux scripts/kallsyms.c (write_src) and kernel/kallsyms.c (kallsyms_expand_symbol, kallsyms_sym_address).
"""

from __future__ import annotations

from struct import unpack_from
from typing import NamedTuple

from sevlab.plugins.engines.symbols import Symbols

DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
TOKENS, FIRST_DIGIT = 256, ord("0")
LONGEST_TOKEN = 64
SYMBOLS_PER_MARKER = 256
LONG_NAME = 0x80
BASE = (0xFFFF_FFFF_8100_0000).to_bytes(8, "little")
"""Where a kernel that is not moved has its text."""
FUNCTIONS = "tTwW"
ENDS = ("__start_", "__stop_")
"""Of sections: how the linker's names for where they begin and end begin."""
MASK64 = (1 << 64) - 1


class Tokens(NamedTuple):
    """The pieces that names are made of: where their table begins, where its index ends, and the pieces."""

    start: int
    end: int
    pieces: tuple[str, ...]


def kernel_symbols(image: bytes) -> Symbols:
    """The functions and the ends of sections in a kernel's image, uncompressed; none where it has no table."""
    at = image.find(DIGITS)
    while at >= 0:
        tokens = _tokens(image, at)
        found = None if tokens is None else _symbols(image, tokens)
        if found is not None:
            return found
        at = image.find(DIGITS, at + 1)
    return Symbols()


def _tokens(image: bytes, digits_at: int) -> Tokens | None:
    """The tables of tokens around those of the digits. The first token has what is before it as its beginning; the
    table is aligned to eight bytes.
    """
    first = second = digits_at
    for _ in range(FIRST_DIGIT):
        first, second = image.rfind(b"\0", max(0, first - LONGEST_TOKEN), first - 1) + 1, first
        if not first:
            return None
    return next(filter(None, (_tokens_from(image, start) for start in range(first + -first % 8, second, 8))), None)


def _tokens_from(image: bytes, start: int) -> Tokens | None:
    """The tables of tokens from `start` on, if the index says that they are there."""
    pieces, starts, at = [], [], start
    for _ in range(TOKENS):
        end = image.find(b"\0", at, at + LONGEST_TOKEN)
        if end < 0:
            return None
        starts.append(at - start)
        pieces.append(image[at:end].decode("latin-1"))
        at = end + 1
    index_at = at + -at % 8
    if index_at + TOKENS * 2 > len(image) or list(unpack_from(f"<{TOKENS}H", image, index_at)) != starts:
        return None
    return Tokens(start, index_at + TOKENS * 2, tuple(pieces))


def _symbols(image: bytes, tokens: Tokens) -> Symbols | None:
    """In the order of Linux 6.1: offsets, the address that they are relative to, the count, names, markers, tokens."""
    at = image.find(BASE, 0, tokens.start)
    while at >= 0:
        count, zero = unpack_from("<II", image, at + 8)
        length = count * 4
        offsets_at = at - length - length % 8
        if at % 8 == 0 and not zero and 0 < count < tokens.start - at and offsets_at >= 0:
            names = _names(image, at + 16, tokens.start, count, tokens.pieces)
            if names is not None:
                (base,) = unpack_from("<Q", image, at)
                return _with_addresses(names, base, unpack_from(f"<{count}i", image, offsets_at))
        at = image.find(BASE, at + 1, tokens.start)
    return None


def _names(image: bytes, start: int, end: int, count: int, pieces: tuple[str, ...]) -> list[str] | None:
    """All names, each with its type before it; None unless markers follow that say where every 256th begins."""
    names, markers, at = [], [], start
    for number in range(count):
        if at + 1 >= end:
            return None
        if number % SYMBOLS_PER_MARKER == 0:
            markers.append(at - start)
        length = image[at]
        at += 1
        if length & LONG_NAME:
            length = length & 0x7F | image[at] << 7
            at += 1
        names.append("".join([pieces[token] for token in image[at : at + length]]))
        at += length
    at += -at % 8
    if at + len(markers) * 4 > end or list(unpack_from(f"<{len(markers)}I", image, at)) != markers:
        return None
    return names


def _with_addresses(names: list[str], base: int, offsets: tuple[int, ...]) -> Symbols:
    """Negative offsets are relative to the base, all others are addresses of per-CPU data."""
    return Symbols(
        [
            (base - 1 - offset & MASK64, name[1:])
            for offset, name in zip(offsets, names, strict=True)
            if offset < 0 and (name[:1] in FUNCTIONS or name[1:].startswith(ENDS))
        ]
    )
