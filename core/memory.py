"""Encrypted memory: sparse 4 KiB pages, each with the key that its bytes are plaintext under.

DRAM holds ciphertext, but nobody computes it until somebody looks with another key: a page keeps the bytes as its last
writer sees them, together with that writer's key (`None`: not encrypted). A read with the same key is a slice. A read
with another key sees what the hardware would give: the page's ciphertext under its own key, decrypted with the
reader's. Both are one AES-XTS call over the page, and both are kept until the next write.

A write with another key than the page's first turns the page into the writer's view and then changes it there; since
XTS blocks are independent, the former owner finds exactly the touched 16-byte blocks spoiled.

`reset` puts back the pages written since `mark`: the first write to a page copies it once (copy on write).

A CPU engine executes on *lent* pages: their bytes lie in the engine's memory and nowhere else, so that what the guest
stores and what this module reads are one truth. Another key, a reset or a mark take a page back, and say so first.
After `mark(keep_lent=True)` lent pages stay where they are: the engine says with `touch` which page it is about to
store to for the first time, and `reset` puts the bytes back in place.

Tags say whose data a byte is (`core.buffers` and the oracles use them): one number for a uniform page, a second
bytearray only where a page holds bytes of several owners. 0 means never written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, KeysView

from sevlab.core.crypto import ZERO_PAGE, MemoryKey
from sevlab.core.errors import ConfigError
from sevlab.core.pages import DEFERRED, MemoryImage, Page
from sevlab.core.units import PAGE_BYTES, PAGE_MASK, PAGE_SHIFT

TAG_POISON = 0
"""Never written: whoever reads it reads what was there before."""
TAG_HYPERVISOR = 1
TAG_ASP = 2
TAG_DEVICE = 3
TAG_PUBLIC = 4
"""Put into the open on purpose by its owner."""
TAG_FIRST_GUEST = 16


def guest_tag(vm_id: int) -> int:
    """The tag of guest `vm_id`'s private data; a byte, so that guests more than 240 apart share one."""
    return TAG_FIRST_GUEST + vm_id % (256 - TAG_FIRST_GUEST)


class Memory:
    """The DRAM of the machine.

    `size_bytes`: a multiple of 4096, at most 2^52; nothing is allocated until it is written. Accesses past the end
    read all ones and write nothing, as unclaimed bus addresses do.
    """

    __slots__ = (
        "_keys",
        "_keys_marked",
        "_saved",
        "_stay_lent",
        "epoch",
        "key_bits",
        "lent",
        "page_owner_changed",
        "pages",
        "recalled",
        "size_bytes",
    )

    def __init__(self, size_bytes: int, *, key_bits: int = 128) -> None:
        if size_bytes <= 0 or size_bytes & PAGE_MASK or size_bytes > 1 << 52:
            raise ConfigError(f"memory size {size_bytes}: expected a multiple of 4096 between 4096 and 2^52")
        self.size_bytes = size_bytes
        self.key_bits = key_bits
        self.pages: dict[int, Page] = {}
        self.epoch = 0
        self._saved: dict[int, Page | None] = {}
        self._stay_lent = False
        self._keys: dict[int, MemoryKey] = {}
        self._keys_marked = 0
        self.page_owner_changed: Callable[[int, MemoryKey | None, MemoryKey | None], None] | None = None
        """Slot: told when a page is written under another key than before."""
        self.lent: set[int] = set()
        """Pages whose bytes lie in an engine's memory."""
        self.recalled: Callable[[int], None] | None = None
        """Told before the bytes of a lent page move: whoever executes on it must forget where they are."""

    # Keys -------------------------------------------------------------------------------------------------------

    def install_key(self, xts_key: bytes, label: str) -> MemoryKey:
        """A new key of the controller; `xts_key` is 2 x 128 or 2 x 256 bits, as the generation has it."""
        if len(xts_key) * 4 != self.key_bits:
            raise ConfigError(
                f"memory key {label!r}: {len(xts_key)} bytes, expected {self.key_bits // 4} (AES-{self.key_bits}-XTS)"
            )
        key = MemoryKey(len(self._keys) + 1, xts_key, label)
        self._keys[key.key_id] = key
        return key

    def key(self, key_id: int) -> MemoryKey | None:
        """The key with number `key_id`; 0 is "not encrypted"."""
        return self._keys[key_id] if key_id else None

    # Bytes ------------------------------------------------------------------------------------------------------

    def read(self, spa: int, length_bytes: int, key: MemoryKey | None) -> bytes:
        """`length_bytes` bytes at `spa` as a reader with `key` sees them; real garbage if the key is not the page's."""
        offset = spa & PAGE_MASK
        end = offset + length_bytes
        if end <= PAGE_BYTES and 0 <= spa < self.size_bytes:
            page = self.pages.get(spa >> PAGE_SHIFT)
            if page is not None and page.key is key:
                return bytes(page.data if length_bytes == PAGE_BYTES else page.data[offset:end])
            return self._view(page, spa >> PAGE_SHIFT, key)[offset:end]
        return b"".join(
            self.read(start, count, key) if 0 <= start < self.size_bytes else b"\xff" * count
            for start, count in split_pages(spa, length_bytes)
        )

    def write(self, spa: int, data: bytes | bytearray, key: MemoryKey | None, tag: int) -> None:
        """Store `data` at `spa` as a writer with `key` does; `tag` says whose data it is."""
        offset = spa & PAGE_MASK
        length = len(data)
        if offset + length > PAGE_BYTES or not 0 <= spa < self.size_bytes:
            done = 0
            for start, count in split_pages(spa, length):
                if 0 <= start < self.size_bytes:
                    self.write(start, data[done : done + count], key, tag)
                done += count
            return
        if length == PAGE_BYTES:
            page = self.writable(spa >> PAGE_SHIFT, key, keep=False)
            if type(page.data) is memoryview:
                page.data[:] = data  # it is lent, and its bytes stay where they are
            else:
                page.data = bytes(data)
            page.tag = tag
            page.tags = None
            return
        page = self.writable(spa >> PAGE_SHIFT, key)
        page.data[offset : offset + length] = data  # type: ignore[index]  # writable
        if page.tags is not None or page.tag != tag:
            page.own_tags()[offset : offset + length] = bytes((tag,)) * length

    def writable(self, pfn: int, key: MemoryKey | None, *, keep: bool = True) -> Page:
        """Page `pfn` in the view of `key`, ready to be changed in place by the caller (who minds the tags).

        `keep` False says that the caller gives it other `data`, so that no copy, and no AES to change the view, is
        needed.
        """
        page = self.pages.get(pfn)
        epoch = self.epoch
        if page is not None and page.key is DEFERRED:
            page = self._settle(pfn, page)
        if page is not None and page.key is key:
            if page.epoch == epoch:
                page.token = page.cipher = page.view = None
                if keep and type(page.data) is bytes:
                    page.data = bytearray(page.data)
                return page
            if pfn in self.lent:
                self.touch(pfn)
                page.token = page.cipher = page.view = None
                return page
            if pfn not in self._saved:
                self._saved[pfn] = page
            page = self.pages[pfn] = page.copy(epoch, keep=keep)
            return page
        if (page is None or page.epoch != epoch) and pfn not in self._saved:
            self._saved[pfn] = page
        fresh = Page(bytearray(self._view(page, pfn, key)) if keep else ZERO_PAGE, key, epoch)
        old_key = None if page is None else page.key
        if page is not None:
            fresh.tag = page.tag
            fresh.tags = None if page.tags is None else page.tags[:]
            fresh.mixed = keep and (page.mixed or page.key is not key)
        if pfn in self.lent:
            self._recall(pfn)
        self.pages[pfn] = fresh
        if self.page_owner_changed is not None and old_key is not key:
            self.page_owner_changed(pfn, old_key, key)
        return fresh

    def hand_over(
        self,
        spa: int,
        length_bytes: int,
        old: MemoryKey | None,
        new: MemoryKey | None,
        tag: int,
        consume: Callable[[bytes | bytearray], object],
    ) -> None:
        """Read with the key `old` and write the same bytes back with `new`; `consume` gets every byte once, in order.

        For a whole page that was written with `old` this changes the key and nothing else: no copy, no AES.
        """
        end = spa + length_bytes
        first, last = -(-spa // PAGE_BYTES), min(end, self.size_bytes) // PAGE_BYTES
        if first >= last:
            self._rewrite(spa, length_bytes, old, new, tag, consume)
            return
        self._rewrite(spa, first * PAGE_BYTES - spa, old, new, tag, consume)
        pages, epoch, changed = self.pages, self.epoch, self.page_owner_changed
        for pfn in range(first, last):
            page = pages.get(pfn)
            if page is None or page.key is not old:
                self._rewrite(pfn * PAGE_BYTES, PAGE_BYTES, old, new, tag, consume)
                continue
            if page.epoch != epoch:
                page = self.writable(pfn, old)
            if pfn in self.lent:
                self._recall(pfn)
            assert type(page.data) is not memoryview  # only a lent page lies elsewhere
            consume(page.data)
            page.key = new
            page.tag = tag
            page.tags = page.token = page.cipher = page.view = None
            if changed is not None and old is not new:
                changed(pfn, old, new)
        self._rewrite(last * PAGE_BYTES, end - last * PAGE_BYTES, old, new, tag, consume)

    def _rewrite(
        self,
        spa: int,
        length_bytes: int,
        old: MemoryKey | None,
        new: MemoryKey | None,
        tag: int,
        consume: Callable[[bytes | bytearray], object],
    ) -> None:
        if length_bytes:
            data = self.read(spa, length_bytes, old)
            consume(data)
            self.write(spa, data, new, tag)

    def _view(self, page: Page | None, pfn: int, key: MemoryKey | None) -> bytes:
        """The whole page as `key` sees it; at most two AES calls, kept until the next write."""
        if page is None:
            return ZERO_PAGE if key is None else key.decrypt_page(pfn, ZERO_PAGE)
        if page.key is DEFERRED:
            page = self._settle(pfn, page)
        if page.key is key:
            return bytes(page.data)
        if page.view is not None and page.view_key is key:
            return page.view
        cipher = self._cipher(page, pfn)
        view = cipher if key is None else key.decrypt_page(pfn, cipher)
        if pfn in self.lent:
            page.cipher = None  # the guest stores without saying so
        else:
            page.view = view
            page.view_key = key
        return view

    def _cipher(self, page: Page, pfn: int) -> bytes:
        cipher = page.cipher
        if cipher is None:
            cipher = page.cipher = bytes(page.data) if page.key is None else page.key.encrypt_page(pfn, page.data)
        return cipher

    def defer(self, spa: int, key: MemoryKey | None, source: Callable[[], bytes], tag: int) -> None:
        """The page at `spa` holds from now on what `source` says, under `key`; asked when somebody looks or writes.

        For a page that hardware stores often and nobody reads: encrypted register state. Asked at most once; whoever
        defers again starts anew.
        """
        pfn = spa >> PAGE_SHIFT
        page = Page(b"", DEFERRED, self.epoch, tag)
        page.source = (key, source)
        before = self.pages.get(pfn)
        if pfn in self.lent:
            self._recall(pfn)
        if pfn not in self._saved:
            self._saved[pfn] = before
        self.pages[pfn] = page

    def deferred(self, spa: int) -> bool:
        """Whether nobody has looked at the page at `spa` since it was deferred."""
        page = self.pages.get(spa >> PAGE_SHIFT)
        return page is not None and page.key is DEFERRED

    def _settle(self, pfn: int, page: Page) -> Page:
        """Make the bytes of a deferred page, in a page of its own: a reset returns to the deferred one."""
        key, source = page.source  # type: ignore[misc]  # set together with the key
        settled = Page(source(), key, self.epoch, page.tag)
        if pfn not in self._saved:
            self._saved[pfn] = page
        self.pages[pfn] = settled
        return settled

    def lend(self, pfn: int, key: MemoryKey | None, room: memoryview, tag: int) -> bool:
        """Let an engine execute on page `pfn` as `key` sees it: its bytes move into `room` (4096 bytes) and stay there.

        A page that was never written, and one that had another key - what `key` sees of it is no data of its former
        owner - gets `tag`. Returns whether it had another key.
        """
        before = self.pages.get(pfn)
        switched = before is not None and before.key is not key
        tagged = before is not None and (before.tag != TAG_POISON or before.tags is not None)
        # To move a page's bytes into the room changes nothing that a reset has to take back.
        page = before if before is not None and self._stay_lent and tagged and not switched else self.writable(pfn, key)
        if pfn not in self.lent:
            room[:] = page.data
            page.data = room
            self.lent.add(pfn)
        page.token = page.cipher = page.view = None
        if switched or (page.tag == TAG_POISON and page.tags is None):
            page.tag, page.tags = tag, None
        return switched

    def touch(self, pfn: int) -> None:
        """The engine is about to store to lent page `pfn`: keep what `reset` returns to."""
        page = self.pages[pfn]
        if page.epoch != self.epoch:
            if pfn not in self._saved:
                self._saved[pfn] = page.copy(page.epoch, keep=True)
            page.epoch = self.epoch

    def ask_again(self) -> None:
        """All is as at the mark: pages stay noted only if they are stored to again, which the engine is to say anew."""
        for pfn in self._saved.keys() & self.lent:
            self.pages[pfn].epoch = self.epoch - 1
            del self._saved[pfn]

    def _recall(self, pfn: int) -> None:
        if self.recalled is not None:
            self.recalled(pfn)
        self.lent.discard(pfn)
        page = self.pages[pfn]
        page.data = bytearray(page.data)

    def recall_all(self) -> None:
        """Take every lent page back."""
        for pfn in list(self.lent):
            self._recall(pfn)

    def token(self, pfn: int) -> object | None:
        """What stays the same object as long as the bytes of page `pfn` stay the same; None: nobody can tell.

        For whoever keeps something made of a page's bytes.
        """
        page = self.pages.get(pfn)
        if page is None or page.key is DEFERRED or pfn in self.lent:
            return None
        page.token = page.token or object()
        return page.token

    def dram(self, spa: int, length_bytes: int) -> bytes:
        """What a cold-boot reader finds in the DRAM cells: the ciphertext of encrypted pages."""
        return self.read(spa, length_bytes, None)

    # Tags -------------------------------------------------------------------------------------------------------

    def tags(self, spa: int, length_bytes: int) -> bytes:
        """The owner tag of each of `length_bytes` bytes at `spa`."""
        out = bytearray()
        for start, count in split_pages(spa, length_bytes):
            page = self.pages.get(start >> PAGE_SHIFT)
            offset = start & PAGE_MASK
            if page is None:
                out += bytes(count)
            elif page.tags is None:
                out += bytes((page.tag,)) * count
            else:
                out += page.tags[offset : offset + count]
        return bytes(out)

    def write_tagged(self, spa: int, data: bytes, key: MemoryKey | None, tags: bytes) -> None:
        """Store `data`, each byte with its own tag: how a copy carries ownership along."""
        if len(data) != len(tags):
            raise ConfigError(f"{len(data)} bytes with {len(tags)} tags: expected one tag a byte")
        if not data:
            return
        if tags.count(tags[0]) == len(tags):
            self.write(spa, data, key, tags[0])
            return
        done = 0
        for start, count in split_pages(spa, len(data)):
            piece = tags[done : done + count]
            self.write(start, data[done : done + count], key, piece[0])
            page = self.pages.get(start >> PAGE_SHIFT)
            if page is not None and piece.count(piece[0]) != count:
                offset = start & PAGE_MASK
                page.own_tags()[offset : offset + count] = piece
            done += count

    # Caches: done at once here, modelled by `core.caches` -----------------------------------------------------

    def write_back_all(self) -> None:
        """WBINVD: nothing is held back, so there is nothing to do."""

    def drop_all(self) -> None:
        """INVD: nothing is held back, so there is nothing to lose."""

    def flush_page(self, spa: int) -> None:
        """CLFLUSH or VM_PAGE_FLUSH of the page at `spa`."""

    # Reset and snapshot -----------------------------------------------------------------------------------------

    def written(self) -> KeysView[int]:
        """Numbers of the pages that were written since the mark; a view that follows."""
        return self._saved.keys()

    def marked(self, pfn: int) -> Page | None:
        """What a page that was written since `mark` was then; None: nothing."""
        return self._saved[pfn]

    def unwritten(self, pfns: set[int]) -> bool:
        """Whether none of these pages can have been written since the mark."""
        return pfns.isdisjoint(self._saved)

    def mark(self, *, keep_lent: bool = False) -> None:
        """Make the present content what `reset` returns to; `keep_lent`: an engine goes on executing on its pages."""
        self._stay_lent = keep_lent
        if not keep_lent:
            self.recall_all()
        self._saved.clear()
        self._keys_marked = len(self._keys)
        self.epoch += 1

    def reset(self) -> None:
        """Put the pages written since `mark` back."""
        if self._stay_lent:
            self._rewind_lent()
        elif self.lent:
            self.recall_all()
        saved = {} if self._stay_lent else self._saved
        if saved:
            pages = self.pages
            for pfn, page in saved.items():
                if page is None:
                    pages.pop(pfn, None)
                else:
                    pages[pfn] = page
            saved.clear()
        if len(self._keys) > self._keys_marked:
            for key_id in [key_id for key_id in self._keys if key_id > self._keys_marked]:
                del self._keys[key_id]

    def _rewind_lent(self) -> None:
        """Put back what the engine may store to, in place; it may go on to store there, so each stays noted."""
        lent, pages, saved = self.lent, self.pages, self._saved
        moved: list[int] = []
        for pfn, before in saved.items():
            page = pages.get(pfn)
            if pfn not in lent or page is None or before is None or page.key is not before.key:
                moved.append(pfn)
                continue
            page.data[:] = before.data  # type: ignore[index]  # lent
            page.tag, page.mixed = before.tag, before.mixed
            page.tags = None if before.tags is None else before.tags[:]
            page.token = page.cipher = page.view = None
        for pfn in moved:
            before = saved.pop(pfn)
            if pfn in lent:
                self._recall(pfn)
            if before is None:
                pages.pop(pfn, None)
            else:
                pages[pfn] = before

    @property
    def dirty_pages(self) -> int:
        """How many pages were written since `mark`."""
        return len(self._saved)

    def capture(self) -> MemoryImage:
        """Explicit data of all pages and keys; a deferred page stays so: to be captured is not to be looked at."""
        made = {
            pfn: Page(page.source[1](), page.source[0], page.epoch, page.tag)
            for pfn, page in list(self.pages.items())
            if page.source is not None
        }
        keys = tuple((key.key_id, key.xts_key, key.label) for key in self._keys.values())
        return MemoryImage(keys, tuple((pfn, page.image()) for pfn, page in sorted((self.pages | made).items())))

    def restore(self, image: MemoryImage) -> None:
        """Take over the content of `image`; keys that are the same stay the same objects."""
        self.recall_all()
        kept = self._keys
        self._keys = {}
        for key_id, xts_key, label in image.keys:
            old = kept.get(key_id)
            same = old is not None and (old.xts_key, old.label) == (xts_key, label)
            self._keys[key_id] = old if old is not None and same else MemoryKey(key_id, xts_key, label)
        for pfn in self.pages.keys() - dict(image.pages).keys():
            self._saved.setdefault(pfn, self.pages.pop(pfn))
        for pfn, (owner, data, tags) in image.pages:
            self._saved.setdefault(pfn, self.pages.get(pfn))
            page = Page(data, None if owner is None else self._keys[owner], self.epoch, tags[0])
            if len(tags) > 1:
                page.tags, page.mixed = tags, owner is None  # an image does not say what of it is ciphertext
            self.pages[pfn] = page


def split_pages(address: int, length_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, byte count) of each page's part of an access, in order."""
    while length_bytes > 0:
        count = min(length_bytes, PAGE_BYTES - (address & PAGE_MASK))
        yield address, count
        address += count
        length_bytes -= count
