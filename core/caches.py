"""Memory with the processor's caches in front: stale lines, lost writes, and what flushing is for.

Only for configurations that ask (`machine.caches = true`): the plain `Memory` behaves as a machine whose software
flushes whenever it must. Here a 64-byte line is cached under the address *and* the key of the access. On a part that
is not coherent across keys (CPUID Fn8000_001F EAX[10] = 0) two views of one address are two lines that know nothing
of each other, until WBINVD, CLFLUSH or VM_PAGE_FLUSH writes the dirty one back; INVD drops dirty lines, so that the
guest finds an older value (CVE-2023-20592, CacheWarp). On a coherent part a write through one view takes the lines of
the other views of that address out of the cache first.

Source: spec 24593, 15.34.9 and 7.10.6; Linux arch/x86/kvm/svm/sev.c, sev_flush_encrypted_page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sevlab.core.crypto import MemoryKey
from sevlab.core.memory import Memory, split_pages
from sevlab.core.pages import MemoryImage
from sevlab.core.units import PAGE_SHIFT

LINE_BYTES = 64
LINES_PER_PAGE_SHIFT = PAGE_SHIFT - 6


class Line(NamedTuple):
    """One cached line: its bytes as the key's view has them, the owner tags, and whether DRAM lags behind."""

    data: bytes
    tags: bytes
    dirty: bool


class CachedMemory(Memory):
    """`Memory` behind a cache that never evicts on its own: what is not flushed stays."""

    __slots__ = ("_lines", "_lines_marked", "coherent")

    def __init__(self, size_bytes: int, *, key_bits: int = 128, coherent: bool = False) -> None:
        super().__init__(size_bytes, key_bits=key_bits)
        self.coherent = coherent
        self._lines: dict[tuple[int, MemoryKey | None], Line] = {}
        self._lines_marked: dict[tuple[int, MemoryKey | None], Line] = {}

    def read(self, spa: int, length_bytes: int, key: MemoryKey | None) -> bytes:
        """As `Memory.read`, through the line of this view; a line that is not there is filled from DRAM."""
        out = bytearray()
        for start, count in _split_lines(spa, length_bytes):
            if not 0 <= start < self.size_bytes:
                out += b"\xff" * count
                continue
            offset = start & (LINE_BYTES - 1)
            out += self._line(start >> 6, key).data[offset : offset + count]
        return bytes(out)

    def write(self, spa: int, data: bytes | bytearray, key: MemoryKey | None, tag: int) -> None:
        """As `Memory.write`, into the line of this view: DRAM and the other views learn of it at the write-back."""
        done = 0
        for start, count in _split_lines(spa, len(data)):
            if 0 <= start < self.size_bytes:
                offset = start & (LINE_BYTES - 1)
                line = self._line(start >> 6, key)
                end = offset + count
                self._lines[start >> 6, key] = Line(
                    line.data[:offset] + bytes(data[done : done + count]) + line.data[end:],
                    line.tags[:offset] + bytes((tag,)) * count + line.tags[end:],
                    dirty=True,
                )
            done += count

    def hand_over(
        self,
        spa: int,
        length_bytes: int,
        old: MemoryKey | None,
        new: MemoryKey | None,
        tag: int,
        consume: Callable[[bytes | bytearray], object],
    ) -> None:
        """As `Memory.hand_over`, through the lines of both views."""
        self._rewrite(spa, length_bytes, old, new, tag, consume)

    def tags(self, spa: int, length_bytes: int) -> bytes:
        """The owner tags of what the newest dirty view holds, else of DRAM."""
        out = bytearray()
        for start, count in _split_lines(spa, length_bytes):
            offset = start & (LINE_BYTES - 1)
            dirty = next(
                (line for (number, _), line in self._lines.items() if number == start >> 6 and line.dirty), None
            )
            out += dirty.tags[offset : offset + count] if dirty is not None else super().tags(start, count)
        return bytes(out)

    def _line(self, number: int, key: MemoryKey | None) -> Line:
        line = self._lines.get((number, key))
        if line is None:
            if self.coherent:
                self._evict([other for other in self._lines if other[0] == number])
            data = super().read(number << 6, LINE_BYTES, key)
            line = self._lines[number, key] = Line(data, super().tags(number << 6, LINE_BYTES), dirty=False)
        return line

    def _evict(self, lines: list[tuple[int, MemoryKey | None]]) -> None:
        for number, key in lines:
            line = self._lines.pop((number, key))
            if line.dirty:
                for start, count in _runs(line.tags):
                    super().write((number << 6) + start, line.data[start : start + count], key, line.tags[start])

    def token(self, pfn: int) -> object | None:
        """None: what a line holds is not the page's."""
        return None

    def unwritten(self, pfns: set[int]) -> bool:
        """Never known: a line that was written and dropped leaves no trace."""
        return False

    def write_back_all(self) -> None:
        """WBINVD: every dirty line to DRAM, in the order in which they entered the cache; the cache is empty then."""
        self._evict(list(self._lines))

    def drop_all(self) -> None:
        """INVD: empty the cache; what was not written back is lost."""
        self._lines.clear()

    def flush_page(self, spa: int) -> None:
        """CLFLUSH of every line of the page, or VM_PAGE_FLUSH: all its views leave the cache."""
        page = spa >> PAGE_SHIFT
        self._evict([line for line in self._lines if line[0] >> LINES_PER_PAGE_SHIFT == page])

    @property
    def dirty_lines(self) -> int:
        """How many lines DRAM does not know of."""
        return sum(line.dirty for line in self._lines.values())

    def defer(self, spa: int, key: MemoryKey | None, source: Callable[[], bytes], tag: int) -> None:
        """As `Memory.defer`; no line of the page stays behind."""
        self.flush_page(spa)
        super().defer(spa, key, source, tag)

    def mark(self, *, keep_lent: bool = False) -> None:
        """Make the present content, cached lines included, what `reset` returns to."""
        super().mark(keep_lent=keep_lent)
        self._lines_marked = dict(self._lines)

    def reset(self) -> None:
        """Put pages and lines back."""
        super().reset()
        self._lines = dict(self._lines_marked)

    def capture(self) -> MemoryImage:
        """Explicit data of all pages, keys and lines."""
        lines = tuple((number, 0 if key is None else key.key_id, *line) for (number, key), line in self._lines.items())
        return super().capture()._replace(cache=lines)

    def restore(self, image: MemoryImage) -> None:
        """Take over pages, keys and lines."""
        super().restore(image)
        self._lines = {
            (number, self.key(key_id)): Line(data, tags, dirty) for number, key_id, data, tags, dirty in image.cache
        }


def _split_lines(address: int, length_bytes: int) -> list[tuple[int, int]]:
    """(start, byte count) of each line's part of an access, in order."""
    parts = []
    for start, count in split_pages(address, length_bytes):
        while count:
            piece = min(count, LINE_BYTES - (start & (LINE_BYTES - 1)))
            parts.append((start, piece))
            start += piece
            count -= piece
    return parts


def _runs(tags: bytes) -> list[tuple[int, int]]:
    """(start, length) of each stretch of equal tags."""
    runs: list[tuple[int, int]] = []
    start = 0
    for index in range(1, len(tags) + 1):
        if index == len(tags) or tags[index] != tags[start]:
            runs.append((start, index - start))
            start = index
    return runs
