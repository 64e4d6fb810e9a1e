"""One page of DRAM: its bytes, the key they are plaintext under, whose they are. `core.memory` has the rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sevlab.core.crypto import MemoryKey


class Page:
    """One page of DRAM as its last writer sees it."""

    __slots__ = ("cipher", "data", "epoch", "key", "mixed", "source", "tag", "tags", "view", "view_key")

    def __init__(self, data: bytearray, key: MemoryKey | None, epoch: int, tag: int) -> None:
        self.data: bytearray | memoryview = data
        self.key = key
        self.epoch = epoch
        self.tag = tag
        self.tags: bytearray | None = None
        self.mixed = False  # written under more than one key: some is ciphertext to the last writer
        self.cipher: bytes | None = None
        self.view: bytes | None = None
        self.view_key: MemoryKey | None = None
        self.source: tuple[MemoryKey | None, Callable[[], bytes]] | None = None
        """Of a deferred page: the key its bytes will be under, and who makes them."""

    def copy(self, epoch: int) -> Page:
        """A writable copy for sequence `epoch`."""
        page = Page.__new__(Page)
        page.data = bytearray(self.data)
        page.key = self.key
        page.epoch = epoch
        page.tag, page.mixed = self.tag, self.mixed
        page.tags = None if self.tags is None else self.tags[:]
        page.cipher = page.view = page.view_key = page.source = None
        return page


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
