"""Checked buffers: what handlers read and write instead of Python slices, which silently truncate.

`CheckedBuffer` is a handler's own memory: it refuses to leave its bounds, knows which bytes were never written
(poison) and whose data each byte is. `SharedBuffer` is a window on memory that the other side can write while a
handler runs: it counts every fetch, tells the observers about it, and lets a pending race write happen just before
the fetch it waits for. That is how a second vCPU is modelled without threads, and how double fetches are found.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from struct import Struct
from typing import Any, NamedTuple, Protocol

from sevlab.core.crypto import MemoryKey
from sevlab.core.errors import InvariantViolation
from sevlab.core.memory import TAG_POISON, Memory
from sevlab.core.units import PAGE_BYTES, PAGE_MASK, PAGE_SHIFT

UINT = {1: Struct("<B"), 2: Struct("<H"), 4: Struct("<I"), 8: Struct("<Q")}
"""Little-endian unsigned integers by width in bytes."""


class Buffer(Protocol):
    """What layouts and handlers may do with any buffer; offsets and lengths are bytes."""

    @property
    def size(self) -> int:
        """Length in bytes."""

    def read(self, offset: int, length_bytes: int) -> bytes:
        """`length_bytes` bytes from `offset`: one fetch."""

    def read_uint(self, offset: int, width_bytes: int) -> int:
        """A little-endian number of 1, 2, 4 or 8 bytes: one fetch."""

    def write(self, offset: int, data: bytes) -> None:
        """Store `data` at `offset`."""

    def write_uint(self, offset: int, width_bytes: int, value: int) -> None:
        """Store a little-endian number of 1, 2, 4 or 8 bytes."""


def _overrun(what: str, offset: int, length: int, size: int) -> InvariantViolation:
    return InvariantViolation(
        "buffer.bounds", f"{what} of {length} bytes at offset {offset:#x} of a buffer of {size:#x} bytes"
    )


def _unwritten(offset: int, length: int) -> InvariantViolation:
    return InvariantViolation(
        "buffer.poison", f"read of {length} bytes at offset {offset:#x}, of which some were never written"
    )


class CheckedBuffer:
    """A handler's own buffer of `size` bytes; it starts as poison.

    Leaving the bounds raises `InvariantViolation` ("buffer.bounds"), and so does reading what was never written
    ("buffer.poison"): a handler tests its lengths and fills what it gives out, so a raise is our bug or an oracle's
    finding. Source of the second rule: XSA-121, CVE-2021-26404 (stale bytes that leave their owner).
    """

    __slots__ = ("_data", "_tags", "size")

    POISON_BYTE = 0xA5

    def __init__(self, size: int) -> None:
        self.size = size
        self._data = bytearray((self.POISON_BYTE,)) * size
        self._tags = bytearray(size)

    @classmethod
    def of(cls, data: bytes, tag: int) -> CheckedBuffer:
        """A buffer that holds `data`, all of it `tag`'s."""
        buffer = cls(len(data))
        buffer.write(0, data, tag)
        return buffer

    def read(self, offset: int, length_bytes: int) -> bytes:
        """The bytes; all of them must have been written, see `poisoned`."""
        if offset < 0 or length_bytes < 0 or offset + length_bytes > self.size:
            raise _overrun("read", offset, length_bytes, self.size)
        if TAG_POISON in self._tags[offset : offset + length_bytes]:
            raise _unwritten(offset, length_bytes)
        return bytes(self._data[offset : offset + length_bytes])

    def read_uint(self, offset: int, width_bytes: int) -> int:
        """A little-endian number of 1, 2, 4 or 8 bytes."""
        if offset < 0 or offset + width_bytes > self.size:
            raise _overrun("read", offset, width_bytes, self.size)
        if TAG_POISON in self._tags[offset : offset + width_bytes]:
            raise _unwritten(offset, width_bytes)
        return UINT[width_bytes].unpack_from(self._data, offset)[0]  # type: ignore[no-any-return]

    def write(self, offset: int, data: bytes, tag: int = TAG_POISON + 1) -> None:
        """Store `data`, owned by `tag` (the hypervisor's unless said)."""
        end = offset + len(data)
        if offset < 0 or end > self.size:
            raise _overrun("write", offset, len(data), self.size)
        self._data[offset:end] = data
        self._tags[offset:end] = bytes((tag,)) * len(data)

    def write_uint(self, offset: int, width_bytes: int, value: int) -> None:
        """Store a little-endian number of 1, 2, 4 or 8 bytes, owned by the hypervisor."""
        self.write(offset, UINT[width_bytes].pack(value))

    def poisoned(self, offset: int, length_bytes: int) -> bool:
        """Whether any of these bytes was never written."""
        return TAG_POISON in self.tags(offset, length_bytes)

    def tags(self, offset: int, length_bytes: int) -> bytes:
        """The owner tag of each byte."""
        if offset < 0 or length_bytes < 0 or offset + length_bytes > self.size:
            raise _overrun("read", offset, length_bytes, self.size)
        return bytes(self._tags[offset : offset + length_bytes])

    def load(self, offset: int, memory: Memory, spa: int, length_bytes: int, key: MemoryKey | None) -> None:
        """Copy from memory with the owner tags: what was somebody's stays his."""
        end = offset + length_bytes
        if offset < 0 or end > self.size:
            raise _overrun("write", offset, length_bytes, self.size)
        self._data[offset:end] = memory.read(spa, length_bytes, key)
        self._tags[offset:end] = memory.tags(spa, length_bytes)

    def store(self, offset: int, memory: Memory, spa: int, length_bytes: int, key: MemoryKey | None) -> None:
        """Copy to memory with the owner tags: foreign secrets arrive as such, where oracles see them."""
        memory.write_tagged(spa, self.read(offset, length_bytes), key, self.tags(offset, length_bytes))


class Fetch(NamedTuple):
    """One read of memory that the other side can write: `number` counts from 1 within the step."""

    number: int
    spa: int
    length_bytes: int
    area_spa: int
    """Where the window begins through which it was read: what belongs to one message has one."""


class RaceWrite(NamedTuple):
    """A write that waits for the fetch number `before_fetch` (from 1) of the next step."""

    before_fetch: int
    spa: int
    data: bytes
    tag: int
    key: MemoryKey | None


NO_SPA = -1
"""The address of a `Fetch` that is only a scheduling point."""


class SharedFetches:
    """Counts the fetches of shared memory within a step; the machine owns one and clears it at each step."""

    __slots__ = ("count", "log", "memory", "races", "watched")

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.count = 0
        self.races: list[RaceWrite] = []
        self.log: list[Fetch] | None = None
        """Filled for the single-fetch oracle when it asks by setting a list."""
        self.watched = False
        """True while a race is pending or a log is kept: the only test on the fast path."""

    def begin(self) -> None:
        """Start a step."""
        self.count = 0
        if self.log is not None:
            self.log = []

    def end(self) -> None:
        """Drop what no fetch of the step reached."""
        if self.races:
            self.races = []
        self.watched = self.log is not None

    def arm(self, race: RaceWrite) -> None:
        """Let `race` happen in the next step."""
        self.races.append(race)
        self.watched = True

    def keep_log(self, *, keep: bool) -> None:
        """Begin or stop to record every fetch."""
        self.log = [] if keep else None
        self.watched = keep or bool(self.races)

    def point(self) -> None:
        """A place in a handler where another party may run, without a fetch: a race can wait for it all the same."""
        self.count += 1
        if self.watched:
            self.notice(NO_SPA, 0, NO_SPA)

    def notice(self, spa: int, length_bytes: int, area_spa: int) -> None:
        """Slow path of a fetch: let due races happen, then record."""
        if self.races:
            due = [race for race in self.races if race.before_fetch == self.count]
            for race in due:
                self.memory.write(race.spa, race.data, race.key, race.tag)
        if self.log is not None:
            self.log.append(Fetch(self.count, spa, length_bytes, area_spa))


class SharedBuffer:
    """A counted window of `size` bytes at `spa` on memory that another party can change at any time.

    Each read is one fetch. Handlers take one snapshot and decide on that. `key` is the view (None: not encrypted) and
    `tag` whose data a write through the window is.
    """

    __slots__ = ("_fetches", "_memory", "_offset", "_one_page", "_pfn", "key", "size", "spa", "tag")

    def __init__(self, fetches: SharedFetches, spa: int, size: int, key: MemoryKey | None, tag: int) -> None:
        self._fetches = fetches
        self._memory = fetches.memory
        self.spa = spa
        self.size = size
        self.key = key
        self.tag = tag
        self._offset = spa & PAGE_MASK
        self._pfn = spa >> PAGE_SHIFT
        # The short cut below reads the page itself, so it is for plain memory only: modelled caches stand before it.
        self._one_page = (
            type(self._memory) is Memory and self._offset + size <= PAGE_BYTES and spa + size <= self._memory.size_bytes
        )

    def read(self, offset: int, length_bytes: int) -> bytes:
        """`length_bytes` bytes from `offset`: one counted fetch."""
        if offset < 0 or length_bytes < 0 or offset + length_bytes > self.size:
            raise _overrun("shared read", offset, length_bytes, self.size)
        fetches = self._fetches
        fetches.count += 1
        if fetches.watched:
            fetches.notice(self.spa + offset, length_bytes, self.spa)
        if self._one_page:
            page = self._memory.pages.get(self._pfn)
            if page is not None and page.key is self.key:
                if length_bytes == PAGE_BYTES:
                    data = page.data
                    return data if type(data) is bytes else bytes(data)
                start = self._offset + offset
                return bytes(page.data[start : start + length_bytes])
        return self._memory.read(self.spa + offset, length_bytes, self.key)

    def read_uint(self, offset: int, width_bytes: int) -> int:
        """A little-endian number of 1, 2, 4 or 8 bytes: one counted fetch."""
        if offset < 0 or offset + width_bytes > self.size:
            raise _overrun("shared read", offset, width_bytes, self.size)
        fetches = self._fetches
        fetches.count += 1
        if fetches.watched:
            fetches.notice(self.spa + offset, width_bytes, self.spa)
        if self._one_page:
            page = self._memory.pages.get(self._pfn)
            if page is not None and page.key is self.key:
                return UINT[width_bytes].unpack_from(page.data, self._offset + offset)[0]  # type: ignore[no-any-return]
        return int.from_bytes(self._memory.read(self.spa + offset, width_bytes, self.key), "little")

    def write(self, offset: int, data: bytes) -> None:
        """Store `data` at `offset`, owned by the window's tag."""
        if offset < 0 or offset + len(data) > self.size:
            raise _overrun("shared write", offset, len(data), self.size)
        self._memory.write(self.spa + offset, data, self.key, self.tag)

    def write_uint(self, offset: int, width_bytes: int, value: int) -> None:
        """Store a little-endian number of 1, 2, 4 or 8 bytes, owned by the window's tag."""
        if offset < 0 or offset + width_bytes > self.size:
            raise _overrun("shared write", offset, width_bytes, self.size)
        self._memory.write(self.spa + offset, value.to_bytes(width_bytes, "little"), self.key, self.tag)

    def write_words(self, words: Words, values: tuple[int | None, ...]) -> None:
        """Store the numbers at the places of `words`, and its fixed bytes, as `write` does each."""
        if words.end > self.size:
            raise _overrun("shared write", words.end, 0, self.size)
        if not self._one_page or self._offset:
            image = bytearray(words.end)
            words.store(image, values)
            for place in words.places:
                self.write(place.start, bytes(image[place]))
            return
        page = self._memory.writable(self._pfn, self.key)
        words.store(page.data, values)
        tag = self.tag
        if page.tags is not None:
            tags, own = page.own_tags(), _uniform(tag)
            for place in words.places:
                tags[place] = own[place]
        elif page.tag != tag:
            page.tags = _marked(words, page.tag, tag)


class Words:
    """Places of 64-bit numbers and of fixed bytes in a window, made once so that all are written by one call.

    `offsets` are those of the numbers, in the order in which they are given (None: that one is not stored); `fixed` is
    (offset, bytes) of the rest. Raises `ValueError` for a negative offset.
    """

    __slots__ = ("end", "places", "store")

    def __init__(self, offsets: tuple[int | None, ...], fixed: tuple[tuple[int, bytes], ...] = ()) -> None:
        names = [f"value_{number}" for number in range(len(offsets))]
        lines = ["def store(content, values):", f"    [{', '.join(names)}] = values"]
        places: list[slice] = []
        runs: list[list[str]] = []
        for name, offset in zip(names, offsets, strict=True):  # numbers that lie in a row take one call
            if offset is None:
                continue
            if places and places[-1].stop == offset:
                places[-1] = slice(places[-1].start, offset + 8)
                runs[-1].append(name)
            else:
                places.append(slice(offset, offset + 8))
                runs.append([name])
        for place, run in zip(places, runs, strict=True):
            lines.append(f"    pack_{len(run)}(content, {place.start}, {', '.join(run)})")
        for offset, data in fixed:  # a slice would make a bytearray of the bytes first
            places.append(slice(offset, offset + len(data)))
            lines.append(f"    pack_bytes_{len(data)}(content, {offset}, {data!r})")
        if any(place.start < 0 for place in places):
            raise ValueError(f"{places}: expected no place before 0")
        self.places = tuple(places)
        self.end = max(place.stop for place in places)
        scope: dict[str, Any] = {f"pack_{n}": Struct(f"<{n}Q").pack_into for n in range(1, len(offsets) + 1)}
        scope |= {f"pack_bytes_{len(data)}": Struct(f"{len(data)}s").pack_into for _, data in fixed}
        exec("\n".join(lines), scope)  # noqa: S102  # made of numbers and bytes only
        self.store: Callable[..., None] = scope["store"]
        """Stores the numbers and the fixed bytes in a bytearray of at least `end` bytes."""


@lru_cache(maxsize=64)
def _marked(words: Words, tag_before: int, tag: int) -> bytes:
    """The tags of a page that was all `tag_before`'s and into which `tag` has written `words`."""
    tags = bytearray(_uniform(tag_before))
    for place in words.places:
        tags[place] = _uniform(tag)[place]
    return bytes(tags)


@cache
def _uniform(tag: int) -> bytes:
    """The tags of a page that is all one owner's."""
    return bytes((tag,)) * PAGE_BYTES
