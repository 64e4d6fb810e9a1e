"""Nested page tables for an engine that walks the guest's tables itself: the engine's own, in its own memory.

They are no tables of the hypervisor: each leaf was asked of the kernel, page by page, when the guest first reached it,
and leads to a page that is lent. The C-bit is an address bit here: a page has one leaf with it and one without, and
never both at a time, since a page that changes hands loses its leaves.
"""

from __future__ import annotations

import mmap

from sevlab.core.units import PAGE_BYTES, PAGE_SHIFT

ENTRIES = 512
TABLE = 0x27
"""Present, writable, user, accessed."""
READ_ONLY_LEAF, LEAF = 0x65, 0x67
"""Accessed and dirty too, so that nobody needs to set the bits. NX is never set: Unicorn crashes on it in a leaf that
maps one of the guest's tables."""
ADDRESS = (1 << 40) - PAGE_BYTES


class NestedRoom:
    """Tables in `room`, which the engine sees at `base`; the first page is the root."""

    def __init__(self, room: mmap.mmap, base: int) -> None:
        self._words = memoryview(room).cast("Q")
        self._base = base
        self._leaves: dict[int, list[int]] = {}
        self._used = 1

    @property
    def root(self) -> int:
        """What nested CR3 holds."""
        return self._base

    def map(self, gpa: int, spa: int, *, writable: bool) -> None:
        """Let `gpa`, with the C-bit in it, lead to the page at `spa`."""
        words = self._words
        if (self._used + 3) * ENTRIES > len(words):
            self.clear()
        table = 0
        for shift in (39, 30, 21):
            at = table * ENTRIES + (gpa >> shift & ENTRIES - 1)
            if not words[at]:
                words[at] = self._base + (self._used << PAGE_SHIFT) | TABLE
                self._used += 1
            table = (words[at] & ADDRESS) - self._base >> PAGE_SHIFT
        at = table * ENTRIES + (gpa >> PAGE_SHIFT & ENTRIES - 1)
        words[at] = spa & -PAGE_BYTES | (LEAF if writable else READ_ONLY_LEAF)
        self._leaves.setdefault(spa >> PAGE_SHIFT, []).append(at)

    def withdraw(self, spa: int) -> bool:
        """Remove what leads to the page at `spa`; whether there was anything."""
        places = self._leaves.pop(spa >> PAGE_SHIFT, ())
        for at in places:
            self._words[at] = 0
        return bool(places)

    def clear(self) -> None:
        """Remove everything."""
        for index in range(self._used * ENTRIES):
            self._words[index] = 0
        self._used = 1
        self._leaves.clear()
