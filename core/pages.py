"""One page of memory: its bytes, the key they are plaintext under, and whose data they are.

`core.memory` says how pages behave; this is what they hold, and what a snapshot keeps of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sevlab.core.crypto import ZERO_PAGE, MemoryKey
from sevlab.core.units import PAGE_BYTES


class Page:
    """One page of DRAM as its last writer sees it."""

    __slots__ = ("cipher", "data", "epoch", "key", "mixed", "source", "tag", "tags", "token", "view", "view_key")

    def __init__(self, data: bytes | bytearray, key: MemoryKey | None, epoch: int, tag: int = 0) -> None:
        self.data: bytes | bytearray | memoryview = data
        """`bytes` when the last write gave all of it: nothing is copied until somebody changes a part."""
        self.key = key
        self.epoch = epoch
        self.tag = tag
        self.tags: bytes | bytearray | None = None
        self.mixed = False  # written under more than one key: some is ciphertext to the last writer
        self.token: object | None = None
        """Of `Memory.token`: gone with the next write."""
        self.cipher: bytes | None = None
        self.view: bytes | None = None
        self.view_key: MemoryKey | None = None
        self.source: tuple[MemoryKey | None, Callable[[], bytes]] | None = None
        """Of a deferred page: the key its bytes will be under, and who makes them."""

    def copy(self, epoch: int, *, keep: bool) -> Page:
        """A writable copy for sequence `epoch`; without `keep` the caller gives it its data."""
        page = Page.__new__(Page)
        page.data = bytearray(self.data) if keep else ZERO_PAGE
        page.key = self.key
        page.epoch = epoch
        page.tag, page.mixed = self.tag, self.mixed
        page.tags = None if self.tags is None else self.tags[:]
        page.token = page.cipher = page.view = page.view_key = page.source = None
        return page

    def own_tags(self) -> bytearray:
        """The tag of each byte, to be changed in place."""
        tags = self.tags
        if type(tags) is not bytearray:
            tags = self.tags = bytearray((self.tag,)) * PAGE_BYTES if tags is None else bytearray(tags)
        return tags

    def image(self) -> PageImage:
        """What a snapshot keeps."""
        key_id = None if self.key is None else self.key.key_id
        return PageImage(key_id, bytes(self.data), bytes((self.tag,)) if self.tags is None else bytes(self.tags))


def unchanged(pages: Mapping[int, Page], tokens: tuple[tuple[int, object], ...]) -> bool:
    """Whether each of these (page number, token of `Memory.token`) still holds."""
    for pfn, token in tokens:
        page = pages.get(pfn)
        if page is None or page.token is not token:
            return False
    return True


class _NobodysKey(MemoryKey):
    """A key that no access ever uses."""

    __slots__ = ()

    def __init__(self) -> None:  # it encrypts nothing
        pass


DEFERRED = _NobodysKey()
"""The key of pages whose bytes are not made yet, so that every access takes the slow path."""


class PageImage(NamedTuple):
    """Explicit data of one page in a snapshot. `tags` is one byte for a uniform page, else one a byte."""

    key_id: int | None
    data: bytes
    tags: bytes


class MemoryImage(NamedTuple):
    """Explicit data of the memory and its keys: `keys` maps a key id to (XTS key, label)."""

    keys: tuple[tuple[int, bytes, str], ...]
    pages: tuple[tuple[int, PageImage], ...]
    cache: tuple[Any, ...] = ()
    """Lines that are not written back yet; empty unless the caches are modelled."""
