"""Nested page tables: made and owned by the hypervisor, walked by the processor for every guest-physical address.

The format is that of long mode, 4 levels or 5. The walk treats every access as a user access, so a leaf needs U/S set.
Source: spec 24593 (APM volume 2), 15.25.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sevlab.core.errors import ConfigError
from sevlab.core.paging import (
    ACCESSED,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    DIRTY,
    EFER_LMA,
    EFER_NXE,
    LARGE,
    LONG4,
    LONG5,
    NO_EXECUTE,
    PHYSICAL_BITS,
    PRESENT,
    USER,
    WRITABLE,
    Mode,
    PageFault,
    Translation,
    WalkAccess,
    paging_context,
    walk,
)
from sevlab.core.svm import NpfError
from sevlab.core.units import GPA, PAGE_1G_BYTES, PAGE_2M_BYTES, PAGE_BYTES

ADDRESS_MASK = (1 << PHYSICAL_BITS) - PAGE_BYTES
TABLE_ENTRIES = 512
PAGE_SIZES = (PAGE_BYTES, PAGE_2M_BYTES, PAGE_1G_BYTES)


class NestedFormat(NamedTuple):
    """A depth of nested tables: its paging mode, CR4 of a host with it, and the width of guest-physical addresses."""

    mode: Mode
    cr4: int
    gpa_bits: int


FORMATS = {4: NestedFormat(LONG4, CR4_PAE, PHYSICAL_BITS), 5: NestedFormat(LONG5, CR4_PAE | CR4_LA57, 52)}
"""By number of levels. Source: spec 24593, 15.25.3 and 5.1."""

_CR0 = CR0_PG | CR0_WP
_EFER = EFER_LMA | EFER_NXE
_U = int(NpfError.U)
_WALK_USER = int(WalkAccess.USER)
_WALK_BITS = int(WalkAccess.WRITE | WalkAccess.FETCH)
_SIGN_BIT = 1 << 47
_SIGN = 0xFFFF_0000_0000_0000


class NestedTranslation(NamedTuple):
    """Where a guest-physical address leads: `spa` without the host's C-bit, which is `host_c_bit`.

    Source: spec 24593, 15.25.5 and 15.34.2.
    """

    spa: int
    page_bytes: int
    writable: bool
    no_execute: bool
    host_c_bit: bool


class NestedFault(NamedTuple):
    """#NPF with its error code (EXITINFO1) and the guest-physical address (EXITINFO2).

    Source: spec 24593, 15.25.6.
    """

    error_code: int
    gpa: GPA


def nested_walk(
    nested_cr3: int,
    gpa: int,
    access: int,
    *,
    read_entry: Callable[[int], int],
    phase: int,
    c_bit_mask: int = 0,
    levels: int = 4,
) -> NestedTranslation | NestedFault:
    """Walk the nested tables for `gpa`.

    `access`: `WalkAccess` WRITE and FETCH; `read_entry(spa)` gives an 8-byte entry; `phase` is the bit that tells the
    final access from a page-table walk (`NpfError.FINAL` or `TABLE_WALK`); `levels` 4 or 5. A guest-physical address
    beyond 48 bits (52 with 5 levels) cannot be mapped and faults as not present. Source: spec 24593, 15.25.5-6.
    """
    format_ = FORMATS[levels]
    access = int(access) & _WALK_BITS
    phase = int(phase)
    if gpa >> format_.gpa_bits:
        return NestedFault(_U | phase | access, GPA(gpa))
    context = paging_context(_CR0, nested_cr3, format_.cr4, _EFER, c_bit_mask, private_fetch=False)
    # Guest-physical addresses are not sign-extended; the upper half of the 48 bits is reached by its canonical twin.
    linear = gpa | _SIGN if levels == 4 and gpa & _SIGN_BIT else gpa
    found = walk(context, linear, access | _WALK_USER, read_entry=lambda spa, _width: read_entry(spa))
    if isinstance(found, Translation):
        return NestedTranslation(found.gpa, found.page_bytes, found.writable, found.no_execute, found.c_bit)
    assert isinstance(found, PageFault)  # gpa_bits keeps every address canonical
    return NestedFault(found.error_code | phase, GPA(gpa))


RESERVED_BIT = 1 << 49
"""An address bit beyond the processor's width that is no generation's C-bit."""


class NestedTables:
    """One VM's nested tables in memory; every method reads and writes entries through the given functions.

    `allocate()` gives the SPA of a zeroed page, `read_entry(spa)` and `write_entry(spa, value)` move 8 bytes.
    Splitting a large mapping keeps what it mapped elsewhere. Tables that a larger page replaces are not given back.
    Source: spec 24593, 15.25.
    """

    __slots__ = ("_address_mask", "_allocate", "_c_bit_mask", "_format", "_read", "_write", "root_spa")

    def __init__(
        self,
        allocate: Callable[[], int],
        read_entry: Callable[[int], int],
        write_entry: Callable[[int, int], None],
        *,
        c_bit_mask: int = 0,
        root_spa: int | None = None,
        levels: int = 4,
    ) -> None:
        if levels not in FORMATS:
            raise ConfigError(f"levels {levels}: expected 4 or 5")
        self._allocate = allocate
        self._read = read_entry
        self._write = write_entry
        self._c_bit_mask = c_bit_mask
        self._address_mask = ADDRESS_MASK & ~c_bit_mask
        self._format = FORMATS[levels]
        self.root_spa = allocate() if root_spa is None else root_spa

    def map(
        self,
        gpa: int,
        spa: int,
        page_bytes: int,
        *,
        writable: bool = True,
        user: bool = True,
        no_execute: bool = False,
        c_bit: bool = False,
    ) -> None:
        """Map the page of `page_bytes` (4 KiB, 2 MiB, 1 GiB) at `gpa` to `spa`; both aligned to it.

        `gpa` below 2^48 (2^52 with 5 levels), `spa` below 2^48; a bit of `spa` in the place of the C-bit is the C-bit.
        Raises `ConfigError` otherwise, and then nothing has changed.
        """
        self._expect(gpa, page_bytes)
        if spa & page_bytes - 1 or spa >> PHYSICAL_BITS:
            raise ConfigError(f"spa {spa:#x}: expected a multiple of {page_bytes:#x} below 2^{PHYSICAL_BITS}")
        if c_bit and not self._c_bit_mask:
            raise ConfigError("c_bit: these tables were made without a C-bit")
        entry = spa | PRESENT | ACCESSED | DIRTY
        entry |= (WRITABLE if writable else 0) | (USER if user else 0) | (NO_EXECUTE if no_execute else 0)
        entry |= (self._c_bit_mask if c_bit else 0) | (LARGE if page_bytes > PAGE_BYTES else 0)
        place = self._place(gpa, page_bytes, make=True)
        assert place is not None
        self._write(place, entry)

    def mark_mmio(self, gpa: int) -> None:
        """Make every access to the 4 KiB page at `gpa` a nested fault with the reserved bit (RSVD) in its code.

        That is how a hypervisor tells an SEV-ES guest that a page is a device's: it becomes #VC. Raises `ConfigError`
        as `map` does. Source: spec 24593, 15.35.4; Linux arch/x86/kvm/svm/svm.c (svm_adjust_mmio_mask).
        """
        self._expect(gpa, PAGE_BYTES)
        place = self._place(gpa, PAGE_BYTES, make=True)
        assert place is not None
        self._write(place, PRESENT | WRITABLE | USER | RESERVED_BIT)

    def unmap(self, gpa: int, page_bytes: int) -> None:
        """Remove whatever is mapped in the page of `page_bytes` at `gpa`; a larger mapping is split first.

        Raises `ConfigError` as `map` does.
        """
        self._expect(gpa, page_bytes)
        place = self._place(gpa, page_bytes, make=False)
        if place is not None:
            self._write(place, 0)

    def protect(
        self,
        gpa: int,
        page_bytes: int,
        *,
        writable: bool | None = None,
        user: bool | None = None,
        no_execute: bool | None = None,
        c_bit: bool | None = None,
    ) -> None:
        """Change attributes of all that is mapped in the page of `page_bytes` at `gpa`; None keeps one as it is.

        A larger mapping is split first, smaller ones change each; what is not mapped stays so.
        Raises `ConfigError` as `map` does.
        """
        self._expect(gpa, page_bytes)
        if c_bit and not self._c_bit_mask:
            raise ConfigError("c_bit: these tables were made without a C-bit")
        set_mask = clear_mask = 0
        wanted = ((writable, WRITABLE), (user, USER), (no_execute, NO_EXECUTE), (c_bit, self._c_bit_mask))
        for value, bit in wanted:
            if value is not None:
                set_mask |= bit if value else 0
                clear_mask |= 0 if value else bit
        place = self._place(gpa, page_bytes, make=False)
        if place is not None:
            self._change(place, page_bytes, set_mask, clear_mask)

    def _expect(self, gpa: int, page_bytes: int) -> None:
        if page_bytes not in PAGE_SIZES:
            raise ConfigError(f"page size {page_bytes:#x}: expected 4 KiB, 2 MiB or 1 GiB")
        if gpa & page_bytes - 1 or gpa >> self._format.gpa_bits:
            raise ConfigError(f"gpa {gpa:#x}: expected a multiple of {page_bytes:#x} below 2^{self._format.gpa_bits}")

    def _place(self, gpa: int, page_bytes: int, *, make: bool) -> int | None:
        """SPA of the entry for the page; without `make`, None where no table leads to it."""
        table = self.root_spa
        for level in self._format.mode.levels:
            place = table + (gpa >> level.shift & TABLE_ENTRIES - 1) * 8
            if page_bytes == 1 << level.shift:
                return place
            present = self._read(place)
            if not present & PRESENT:
                if not make:
                    return None
                table = self._new_table(place)
            elif level.large and present & LARGE:
                table = self._split(place, present, level.shift)
            else:
                table = present & self._address_mask
        raise AssertionError("every page size is that of a level")

    def _new_table(self, place: int) -> int:
        table = self._allocate()
        self._write(place, table | PRESENT | WRITABLE | USER | ACCESSED)
        return table

    def _split(self, place: int, present: int, shift: int) -> int:
        """Replace one large mapping by a table that maps the same memory in the next smaller size."""
        table = self._new_table(place)
        step = 1 << shift - 9
        keep_large = LARGE if step > PAGE_BYTES else 0
        attributes = present & ~self._address_mask & ~LARGE
        base = present & self._address_mask & -(1 << shift)
        for index in range(TABLE_ENTRIES):
            self._write(table + index * 8, base + index * step | attributes | keep_large)
        return table

    def _change(self, place: int, page_bytes: int, set_mask: int, clear_mask: int) -> None:
        """Change the mapping at `place`, or every one in the table that it points to."""
        entry = self._read(place)
        if not entry & PRESENT:
            return
        if page_bytes == PAGE_BYTES or entry & LARGE:
            self._write(place, (entry | set_mask) & ~clear_mask)
            return
        table = entry & self._address_mask
        for index in range(TABLE_ENTRIES):
            self._change(table + index * 8, page_bytes // TABLE_ENTRIES, set_mask, clear_mask)
