"""Nested page tables: made and owned by the hypervisor, walked by the processor for every guest-physical address.

The format is that of 4-level long mode. The walk treats every access as a user access, so a leaf needs U/S set.
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
    CR4_PAE,
    DIRTY,
    EFER_LMA,
    EFER_NXE,
    LARGE,
    LONG4,
    NO_EXECUTE,
    PHYSICAL_BITS,
    PRESENT,
    USER,
    WRITABLE,
    NonCanonical,
    PageFault,
    WalkAccess,
    paging_context,
    walk,
)
from sevlab.core.svm import NpfError

ADDRESS_MASK = (1 << PHYSICAL_BITS) - 0x1000
TABLE_ENTRIES = 512


class NestedTranslation(NamedTuple):
    """Where a guest-physical address leads: `spa` without the host's C-bit, which is `host_c_bit`."""

    spa: int
    page_bytes: int
    writable: bool
    no_execute: bool
    host_c_bit: bool


class NestedFault(NamedTuple):
    """#NPF with its error code (EXITINFO1) and the guest-physical address (EXITINFO2)."""

    error_code: int
    gpa: int


def nested_walk(
    nested_cr3: int, gpa: int, access: int, *, read_entry: Callable[[int], int], phase: int, c_bit_mask: int = 0
) -> NestedTranslation | NestedFault:
    """Walk the nested tables for `gpa`.

    `access`: `WalkAccess` WRITE and FETCH; `read_entry(spa)` gives an 8-byte entry; `phase` is the bit that tells the
    final access from a page-table walk (`NpfError.FINAL` or `TABLE_WALK`). A guest-physical address beyond 48 bits
    cannot be mapped and faults as not present.
    """
    error = NpfError.U | phase | access & (WalkAccess.WRITE | WalkAccess.FETCH)
    if gpa >> PHYSICAL_BITS:
        return NestedFault(int(error), gpa)
    context = paging_context(
        CR0_PG | CR0_WP, nested_cr3, CR4_PAE, EFER_LMA | EFER_NXE, c_bit_mask, physical_bits=PHYSICAL_BITS
    )
    # Guest-physical addresses are not sign-extended; the upper half of the 48 bits is reached by its canonical twin.
    linear = gpa | -(gpa & 1 << 47) & 0xFFFF_8000_0000_0000
    found = walk(context, linear, access | WalkAccess.USER, read_entry=lambda spa, _width: read_entry(spa))
    if isinstance(found, PageFault):
        return NestedFault(int(found.error_code | NpfError.U | phase), gpa)
    if isinstance(found, NonCanonical):
        return NestedFault(int(error), gpa)
    return NestedTranslation(found.gpa, found.page_bytes, found.writable, found.no_execute, found.c_bit)


class NestedTables:
    """One VM's nested tables in memory; every method reads and writes entries through the given functions.

    `allocate()` gives the SPA of a zeroed page. Splitting a large mapping keeps what it mapped elsewhere.
    """

    __slots__ = ("_allocate", "_c_bit_mask", "_read", "_write", "root_spa")

    def __init__(
        self,
        allocate: Callable[[], int],
        read_entry: Callable[[int], int],
        write_entry: Callable[[int, int], None],
        *,
        c_bit_mask: int = 0,
        root_spa: int | None = None,
    ) -> None:
        self._allocate = allocate
        self._read = read_entry
        self._write = write_entry
        self._c_bit_mask = c_bit_mask
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
        """Map the page of `page_bytes` (4 KiB, 2 MiB, 1 GiB) at `gpa` to `spa`; both aligned to it, below 2^48."""
        entry = spa | PRESENT | ACCESSED | DIRTY
        entry |= (WRITABLE if writable else 0) | (USER if user else 0) | (NO_EXECUTE if no_execute else 0)
        entry |= (self._c_bit_mask if c_bit else 0) | (LARGE if page_bytes > 0x1000 else 0)
        self._set(gpa, page_bytes, entry)

    def unmap(self, gpa: int, page_bytes: int) -> None:
        """Remove whatever is mapped in the page of `page_bytes` at `gpa`."""
        self._set(gpa, page_bytes, 0)

    def _set(self, gpa: int, page_bytes: int, entry: int) -> None:
        if gpa & page_bytes - 1 or gpa >> PHYSICAL_BITS:
            raise ConfigError(f"gpa {gpa:#x}: expected a multiple of {page_bytes:#x} below 2^{PHYSICAL_BITS}")
        table = self.root_spa
        for level in LONG4.levels:
            place = table + (gpa >> level.shift & TABLE_ENTRIES - 1) * 8
            if page_bytes == 1 << level.shift:
                self._write(place, entry)
                return
            present = self._read(place)
            if not present & PRESENT:
                if not entry:
                    return
                table = self._new_table(place)
            elif level.large and present & LARGE:
                table = self._split(place, present, level.shift)
            else:
                table = present & ADDRESS_MASK & ~self._c_bit_mask
        raise ConfigError(f"page size {page_bytes:#x}: expected 4 KiB, 2 MiB or 1 GiB")

    def _new_table(self, place: int) -> int:
        table = self._allocate()
        self._write(place, table | PRESENT | WRITABLE | USER | ACCESSED)
        return table

    def _split(self, place: int, present: int, shift: int) -> int:
        """Replace one large mapping by a table that maps the same memory in the next smaller size."""
        table = self._new_table(place)
        step = 1 << shift - 9
        keep_large = LARGE if step > 0x1000 else 0
        attributes = present & ~(ADDRESS_MASK & ~self._c_bit_mask) & ~LARGE
        base = present & ADDRESS_MASK & ~self._c_bit_mask & -(1 << shift)
        for index in range(TABLE_ENTRIES):
            self._write(table + index * 8, base + index * step | attributes | keep_large)
        return table
