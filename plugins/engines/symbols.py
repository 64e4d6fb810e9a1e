"""Names of a kernel's functions by address; from its System.map here, from the kernel itself in `kallsyms`."""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import TYPE_CHECKING

from sevlab.core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

LINE = re.compile(r"([0-9a-f]{8,16}) [tTwW] (\S+)")
FARTHEST = 1 << 20
"""A function that begins further below an address than this does not name it."""


class Symbols:
    """Function names by address."""

    def __init__(self, lines: list[tuple[int, str]] | None = None) -> None:
        self._found = sorted(lines or [])
        self._addresses = [address for address, _ in self._found]

    def __bool__(self) -> bool:
        return bool(self._found)

    def name(self, address: int) -> str:
        """`function+0x1f`, or nothing where none is known."""
        at = bisect_right(self._addresses, address) - 1
        if at < 0 or address - self._addresses[at] > FARTHEST:
            return ""
        start, name = self._found[at]
        return f"{name}+{address - start:#x}" if address > start else name

    def around(self, address: int) -> tuple[int, int] | None:
        """(first address, end) of the function that `address` is in."""
        at = bisect_right(self._addresses, address) - 1
        if at < 0:
            return None
        low = self._addresses[at]
        return low, next((other for other in self._addresses[at:] if other > low), low + 1)

    def address(self, name: str) -> int | None:
        """Where a function begins."""
        return next((address for address, known in self._found if known == name), None)


def read_symbols(file: Path) -> Symbols:
    """The functions of a System.map. Raises `ConfigError` for a file without any."""
    try:
        text = file.read_text(encoding="ascii")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: expected a System.map, found bytes that are no text at {error.start}") from error
    found = [(int(line[1], 16), line[2]) for line in LINE.finditer(text)]
    if not found:
        raise ConfigError(f"{file}: expected a System.map, found no line `address t name`")
    return Symbols(found)
