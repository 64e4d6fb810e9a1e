"""The guest's address translation for an engine: from a linear address to a page of DRAM that is lent to it.

`core.access` walks exactly and slowly; this module does the common case - four levels, everything present, accessed
and dirty bits set - on the words of the lent table pages, and leaves the rest to it. Nothing is kept that the
architecture would not keep: tables are read anew for each translation.

Two rules of encrypted guests are here: table walks and instruction fetches are private whatever the C-bit says, so a
fetch through a shared mapping gets a translation that only executes. A page changes hands - one copy, encrypted or
decrypted in place - when it is reached with the other key; translations of it are then dropped, unless the only one
there was is the one being replaced.
Source: spec 24593 (APM volume 2), 5.3, 15.34.4 and 15.34.5.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

from sevlab.core.access import AccessKind, Place
from sevlab.core.cpu import FaultUnwind
from sevlab.core.events import Fault
from sevlab.core.memory import TAG_PUBLIC
from sevlab.core.paging import ACCESSED, CR0_PG, CR0_WP, CR4_LA57, CR4_SMAP, CR4_SMEP, DIRTY, EFER_LMA, EFER_NXE
from sevlab.core.svm import NpfError
from sevlab.core.units import PAGE_BYTES, PAGE_MASK, PAGE_SHIFT

if TYPE_CHECKING:
    from collections.abc import Callable

    from sevlab.core.cpu import CpuEngine, Vcpu
    from sevlab.core.crypto import MemoryKey
    from sevlab.core.machine import Machine

READ, WRITE, FETCH = 0, int(AccessKind.WRITE), int(AccessKind.FETCH)
TABLE, PRIVATE, USER = int(AccessKind.TABLE), int(AccessKind.PRIVATE), int(AccessKind.USER)
WRITABLE, USER_PAGE, LARGE, NO_EXECUTE = 1 << 1, 1 << 2, 1 << 7, 1 << 63
R, W, X = 1, 2, 4
MANY = -1
NOT_LENT: Any = object()
ADDRESS = (1 << 48) - PAGE_BYTES
RESERVED = (1 << 52) - (1 << 48)
SEGMENT_PRESENT = 1 << 7


class Arena:
    """The machine's DRAM as an engine sees it: as large, empty until pages are lent."""

    def __init__(self, size_bytes: int) -> None:
        self.map = mmap.mmap(-1, size_bytes)
        self.bytes = memoryview(self.map)
        self.words = self.bytes.cast("Q")

    def page(self, pfn: int) -> memoryview:
        """The room of one page."""
        return self.bytes[pfn << PAGE_SHIFT : (pfn + 1) << PAGE_SHIFT]


class Mmu:
    """Translations of one vCPU; `core.access` asks it first, and the engine for what its TLB lacks."""

    def __init__(self, machine: Machine, vcpu: Vcpu, arena: Arena, *, nested: bool = False) -> None:
        self._machine, self._vcpu, self._arena = machine, vcpu, arena
        self._memory, self._access = machine.memory, machine.access
        self.engine: CpuEngine | None = None
        self.nested = nested
        """The engine walks the guest's tables itself and knows which of its translations lead to which page."""
        self._c_bit = machine.vm_of(vcpu).c_bit_mask
        self._mask = ADDRESS & ~self._c_bit
        self._reserved = RESERVED & ~self._c_bit
        self._key = self._access.key_of(vcpu.asid, c_bit=True) if self._c_bit else None
        self._words = arena.words
        self._owner: dict[int, MemoryKey | None] = {}
        self._tables: dict[int, int] = {}
        self._places: dict[int, Place] = {}
        self._filled: dict[int, int] = {}
        self._large: set[int] = set()
        self._fetched: set[int] = set()
        self._stored: set[int] = set()
        self._mixed: set[int] = set()
        self._filling = MANY
        self.journaled = False
        """Memory has a mark that keeps pages lent: it wants to know of the first store to each."""
        self.walked_exactly = False
        """A walk may have set accessed and dirty bits, which the engine's translations then stand for."""
        self.fills = self.switches = self.flushes = 0
        self.fault: Fault | None = None
        """Why the last `fill` was refused."""
        self.private: Callable[[int], bool] | None = None
        """Asked for each page that the guest reaches privately, by its gpa: whether it is private, or only mapped
        so by a kernel that is to be watched (`plugins.xen_guest`)."""
        machine.memory.recalled = self._recalled
        machine.access.walker = self

    # For core.access --------------------------------------------------------------------------------------------

    def translate(self, vcpu: Vcpu, gva: int, kind: int) -> tuple[int, Place] | None:
        """See `core.access.Walker`."""
        if vcpu is not self._vcpu:
            return None
        kind = int(kind)
        found = self._walk(gva, kind)
        if found is None:
            return None
        gpa, private, _ = found
        if private and self.private is not None:
            private = self.private(gpa)
        try:
            page = self._place(gpa >> PAGE_SHIFT, kind & WRITE, PRIVATE if private else 0)
        except FaultUnwind:
            return None
        return gpa, Place(page.spa + (gpa & PAGE_MASK), page.key, page.tag)

    def forget(self) -> None:
        """Nested tables, or who may use which page, have changed."""
        self._places.clear()
        self._tables.clear()
        self.flush()
        if self.nested and self.engine is not None:
            self.engine.forget()

    # For the engine ---------------------------------------------------------------------------------------------

    def fill(self, gva: int, kind: int, cpl: int) -> tuple[int, int] | None:
        """See `core.cpu.EngineSink`; a refusal leaves its reason in `fault`."""
        self.fills += 1
        user = USER if cpl == 3 else 0
        if user and kind == READ and self._is_implicit(gva):
            user = 0
        try:
            found = self._walk(gva, kind | user)
            if found is None:
                self.walked_exactly = True
                self._access.guest_linear(self._vcpu, gva, kind | user)  # raises, or sets accessed and dirty bits
                found = self._walk(gva, kind | user) or self._exact(gva, kind | user)
            gpa, private, rights = found
            if private and self.private is not None:
                private = self.private(gpa)
            if not (private or not self._c_bit) and kind == FETCH:
                private, rights = True, X
            return self._lend(gva, gpa, kind, private, rights)
        except FaultUnwind as unwind:
            self.fault = unwind.fault
            return None

    def nested_fill(self, gpa: int, kind: int) -> tuple[int, int] | None:
        """See `core.cpu.EngineSink`; a refusal leaves its reason in `fault`."""
        self.fills += 1
        private = bool(gpa & self._c_bit)
        try:
            return self._lend(gpa, gpa & ~self._c_bit, kind, private, R | W | X)
        except FaultUnwind as unwind:
            self.fault = unwind.fault
            return None

    def flush(self) -> None:
        """Drop every translation that the engine has."""
        self.flushes += 1
        self._filled.clear()
        self._large.clear()
        self._stored.clear()
        if self.engine is not None:
            self.engine.flush()

    def tables(self) -> set[int]:
        """Pages that hold tables of the guest which were walked lately."""
        return {at >> 9 for at in self._tables.values()}

    def code(self) -> set[int]:
        """Pages that were executed."""
        return self._fetched

    @property
    def known(self) -> int:
        """How many pages `tables` and `code` name: it grows until a flush."""
        return len(self._tables) + len(self._fetched)

    def is_large(self, gva: int) -> bool:
        """Whether translations in the 2 MiB around `gva` came from a large page, which INVLPG drops as a whole."""
        return gva >> 21 in self._large

    # Walk -------------------------------------------------------------------------------------------------------

    def _walk(self, gva: int, kind: int) -> tuple[int, bool, int] | None:
        """(gpa, private, rights) in the common case; None: `core.access` knows."""
        system = self._vcpu.system
        if not system.efer & EFER_LMA or not system.cr0 & CR0_PG or system.cr4 & (CR4_LA57 | CR4_SMAP):
            return None
        if gva >> 47 not in (0, 0x1_FFFF):
            return None
        words, tables, mask = self._words, self._tables, self._mask
        reserved = self._reserved if system.efer & EFER_NXE else self._reserved | NO_EXECUTE
        number = (system.cr3 & mask) >> PAGE_SHIFT
        allowed, shift = WRITABLE | USER_PAGE, 39
        denied = 0
        while True:
            at = tables.get(number)
            if at is None:
                at = self._table(number)
                if at is None:
                    return None
            entry = words[at + (gva >> shift & 511)]
            if not entry & 1 or entry & reserved or not entry & ACCESSED:
                return None
            allowed &= entry
            denied |= entry
            if shift == 12:
                break
            if entry & LARGE:
                if shift == 39 or entry & ((1 << shift) - (1 << 13)):
                    return None
                self._large.add(gva >> 21)
                break
            number = (entry & mask) >> PAGE_SHIFT
            shift -= 9
        supervisor = not kind & USER
        if not (supervisor or allowed & USER_PAGE):
            return None
        writable = allowed & WRITABLE or (supervisor and not system.cr0 & CR0_WP)
        if kind & WRITE and not (writable and entry & DIRTY):
            return None
        if supervisor and allowed & USER_PAGE and system.cr4 & CR4_SMEP:
            denied |= NO_EXECUTE
        if kind & FETCH and denied & NO_EXECUTE:
            return None
        gpa = entry & mask & -(1 << shift) | gva & (1 << shift) - 1
        rights = R | (W if writable and entry & DIRTY else 0) | (0 if denied & NO_EXECUTE else X)
        return gpa, bool(entry & self._c_bit), rights

    def _exact(self, gva: int, kind: int) -> tuple[int, bool, int]:
        """The answer of `core.access` for this one kind of access: no paging, 32 bits, SMAP."""
        access, vcpu = self._access, self._vcpu
        gpa, kind = access._walk_guest(vcpu, gva, kind)  # noqa: SLF001  # the exact half of this walk
        rights = X if kind & FETCH else R | (W if kind & WRITE else 0)
        return gpa, bool(kind & PRIVATE), rights

    def _table(self, number: int) -> int | None:
        """Index of the first word of the table page with this guest frame number."""
        private = PRIVATE if self._c_bit else 0
        try:
            place = self._access.guest_physical(
                self._vcpu, number << PAGE_SHIFT, TABLE | private, phase=NpfError.TABLE_WALK
            )
        except FaultUnwind:
            return None
        self._own(place.spa >> PAGE_SHIFT, place.key, place.tag)
        at = self._tables[number] = place.spa >> 3
        return at

    def _place(self, number: int, write: int, private: int) -> Place:
        """Where guest frame `number` is. Raises `FaultUnwind` as the nested walk and the check of the access do."""
        index = number << 4 | write | private
        place = self._places.get(index)
        if place is None:
            place = self._access.guest_physical(self._vcpu, number << PAGE_SHIFT, write | private)
            self._places[index] = place
        return place

    def _is_implicit(self, gva: int) -> bool:
        """Whether `gva` is in a table that the processor itself reads: a supervisor access even at CPL 3."""
        system = self._vcpu.system
        tables = [system.gdtr, *(table for table in (system.ldtr, system.tr) if table[1] & SEGMENT_PRESENT)]
        return any(base <= gva <= base + limit for _, _, limit, base in tables)

    # Lending ----------------------------------------------------------------------------------------------------

    def _lend(self, gva: int, gpa: int, kind: int, private: bool, rights: int) -> tuple[int, int]:  # noqa: FBT001
        bits = PRIVATE if private else 0
        number = gpa >> PAGE_SHIFT
        place = self._place(number, kind & WRITE, bits)
        if rights & W and not kind & WRITE:
            try:
                self._place(number, WRITE, bits)
            except FaultUnwind:
                rights &= ~W
        pfn = place.spa >> PAGE_SHIFT
        if self.nested:
            self._own(pfn, place.key, place.tag)
            self._fetched.add(pfn)
        else:
            self._lend_for(gva & -PAGE_BYTES, pfn, place)
            rights = self._rights(pfn, kind, rights)
        if self.journaled and rights & W:
            if kind & WRITE:
                self._memory.touch(pfn)
            elif pfn not in self._memory.written():
                rights &= ~W
        return place.spa & -PAGE_BYTES, rights

    def _lend_for(self, page: int, pfn: int, place: Place) -> None:
        """Lend a page, and note the one translation that leads to it."""
        if self._owner.get(pfn, NOT_LENT) is not place.key:
            self._filling = page
            try:
                self._own(pfn, place.key, place.tag)
            finally:
                self._filling = MANY
        before = self._filled.get(pfn)
        if before is None:
            self._filled[pfn] = page
        elif before != page:
            self._filled[pfn] = MANY

    def _rights(self, pfn: int, kind: int, rights: int) -> int:
        """Which of the rights the engine gets at once.

        An engine notices a store to code only through a translation that may execute, and such stores are slow. So a
        page holds code or is stored to; one that needs both gets all rights, also through a mapping without the right
        to execute (the guest could then execute there until the translation is dropped).
        """
        if kind & FETCH:
            if pfn in self._stored:
                self.flush()
            self._fetched.add(pfn)
            return rights if pfn in self._mixed else rights & ~W
        if pfn not in self._fetched:
            if rights & W:
                self._stored.add(pfn)
            return rights & ~X
        if kind & WRITE:
            self._mixed.add(pfn)
            return rights | X
        return rights & ~W

    def _own(self, pfn: int, key: MemoryKey | None, tag: int) -> None:
        """Let the engine have page `pfn` as `key` sees it."""
        if self._owner.get(pfn, NOT_LENT) is key:
            return
        if self._memory.lend(pfn, key, self._arena.page(pfn), tag if key is not None else TAG_PUBLIC):
            self.switches += 1
        self._owner[pfn] = key  # before the engine is told, which may walk the tables again
        if pfn in self._fetched and self.engine is not None:
            self.engine.spoiled(pfn << PAGE_SHIFT)

    def _recalled(self, pfn: int) -> None:
        """The page leaves the engine's memory: another key, a reset, the model's own business."""
        self._owner.pop(pfn, None)
        self._tables.clear()
        if self.nested:
            if self.engine is not None:
                self.engine.withdraw(pfn << PAGE_SHIFT)
        elif self._filled.pop(pfn, self._filling) != self._filling or self._filling == MANY:
            self.flush()
