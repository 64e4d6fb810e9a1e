"""The guest's own page tables: one walker for every mode, driven by a table of levels.

Pure: the caller says how to read an entry of the guest's tables - privately, in an encrypted guest, since page-table
walks never obey the C-bit - and gets a translation or a fault as a value. Only paging off and the two 32-bit levels
have no room for a C-bit; an encrypted guest's accesses are all private there.

Source: spec 24593 (APM volume 2), chapter 5 and 15.34.4; reserved bits of levels 4 and 5 also Linux
arch/x86/kvm/mmu/mmu.c (reserved bits of AMD processors).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag
from functools import lru_cache
from typing import NamedTuple

from sevlab.core.units import MASK32

CR0_WP = 1 << 16
CR0_PG = 1 << 31
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
CR4_LA57 = 1 << 12
CR4_SMEP = 1 << 20
CR4_SMAP = 1 << 21
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
EFER_NXE = 1 << 11

PRESENT = 1 << 0
WRITABLE = 1 << 1
USER = 1 << 2
ACCESSED = 1 << 5
DIRTY = 1 << 6
LARGE = 1 << 7
GLOBAL = 1 << 8
NO_EXECUTE = 1 << 63

PHYSICAL_BITS = 48
"""Width of guest-physical addresses unless the caller says otherwise."""


class WalkAccess(IntFlag):
    """What the access is; the bits of the #PF error code where it has them."""

    READ = 0
    WRITE = 1 << 1
    USER = 1 << 2
    """The access is made at CPL 3 and is not an implicit supervisor access."""
    FETCH = 1 << 4
    AC = 1 << 8
    """EFLAGS.AC is 1 and the access is explicit: SMAP lets it pass."""


class PfError(IntFlag):
    """Error code of #PF. Source: spec 24593, 8.2.15."""

    P = 1 << 0
    W = 1 << 1
    U = 1 << 2
    RSVD = 1 << 3
    ID = 1 << 4


class Level(NamedTuple):
    """One level of a mode: which address bits index the table, and what its entries may be."""

    name: str
    shift: int
    index_bits: int
    large: bool
    """An entry with PS set maps a page of 1 << shift bytes."""
    reserved: int
    """Bits below the physical width that must be zero in an entry that points to a table."""
    reserved_large: int
    """The same in an entry that maps a large page."""
    permissions: bool = True
    """Whether the entry has R/W, U/S and A (a PAE PDPTE has none)."""


class Mode(NamedTuple):
    """A paging mode: its levels from the root, entry width in bytes, canonical width of linear addresses."""

    name: str
    levels: tuple[Level, ...]
    entry_bytes: int
    linear_bits: int
    ignored_high: int
    """Bits above the physical width that software may use (long mode: 62:52)."""


def _mask(high: int, low: int) -> int:
    return (1 << high + 1) - (1 << low)


PTE = Level("PTE", 12, 9, large=False, reserved=0, reserved_large=0)
PDE = Level("PDE", 21, 9, large=True, reserved=0, reserved_large=_mask(20, 13))
PDPTE = Level("PDPTE", 30, 9, large=True, reserved=0, reserved_large=_mask(29, 13))
PML4E = Level("PML4E", 39, 9, large=False, reserved=_mask(8, 7), reserved_large=0)
PML5E = Level("PML5E", 48, 9, large=False, reserved=_mask(8, 7), reserved_large=0)
PAE_PDPTE = Level(
    "PDPTE", 30, 2, large=False, reserved=_mask(8, 5) | _mask(2, 1) | NO_EXECUTE, reserved_large=0, permissions=False
)

LEGACY = Mode(
    "32-bit",
    (
        Level("PDE", 22, 10, large=True, reserved=0, reserved_large=1 << 21),
        Level("PTE", 12, 10, large=False, reserved=0, reserved_large=0),
    ),
    4,
    32,
    0,
)
PAE = Mode("PAE", (PAE_PDPTE, PDE, PTE), 8, 32, 0)
LONG4 = Mode("4-level", (PML4E, PDPTE, PDE, PTE), 8, 48, _mask(62, 52))
LONG5 = Mode("5-level", (PML5E, PML4E, PDPTE, PDE, PTE), 8, 57, _mask(62, 52))
MODES = (LEGACY, PAE, LONG4, LONG5)


def markdown_table() -> str:
    """The modes and levels as a table for documentation."""
    lines = ["| Mode | Entry bytes | Levels (index bits) | Large pages |", "| --- | --- | --- | --- |"]
    for mode in MODES:
        levels = ", ".join(
            f"{level.name} [{level.shift + level.index_bits - 1}:{level.shift}]" for level in mode.levels
        )
        large = ", ".join(f"{1 << level.shift - 20} MiB" for level in mode.levels if level.large)
        lines.append(f"| {mode.name} | {mode.entry_bytes} | {levels} | {large} |")
    return "\n".join(lines)


class Translation(NamedTuple):
    """Where a linear address leads.

    `gpa` without the C-bit; `c_bit` the effective C-bit of a data access; `updates` the accessed and dirty bits that
    the walk would set: (gpa of the entry, its width in bytes, its new value).
    """

    gpa: int
    c_bit: bool
    page_bytes: int
    writable: bool
    user: bool
    no_execute: bool
    global_page: bool
    updates: tuple[tuple[int, int, int], ...]


class PageFault(NamedTuple):
    """#PF with its error code."""

    error_code: int
    gva: int


class NonCanonical(NamedTuple):
    """The address has no meaning in long mode: #GP(0), or #SS(0) on the stack."""

    gva: int


@dataclass(frozen=True, slots=True)
class PagingContext:
    """What the control registers say about paging, made once for each combination; see `paging_context`."""

    mode: Mode | None
    root: int
    address_mask: int
    reserved_high: int
    c_bit_mask: int
    large_pages: bool
    write_protect: bool
    smep: bool
    smap: bool
    reports_fetch: bool
    canonical_shift: int


@lru_cache(maxsize=1024)
def paging_context(
    cr0: int, cr3: int, cr4: int, efer: int, c_bit_mask: int, physical_bits: int = PHYSICAL_BITS
) -> PagingContext:
    """The context of these register values; `c_bit_mask` 0: the guest is not encrypted."""
    nxe = bool(efer & EFER_NXE)
    if not cr0 & CR0_PG:
        mode = None
    elif efer & EFER_LMA:
        mode = LONG5 if cr4 & CR4_LA57 else LONG4
    else:
        mode = PAE if cr4 & CR4_PAE else LEGACY
    if mode is None or mode is LEGACY:
        address_mask, root, high = _mask(31, 12), cr3 & _mask(31, 12), 0
    else:
        address_mask = _mask(physical_bits - 1, 12) & ~c_bit_mask
        root = cr3 & _mask(31, 5) if mode is PAE else cr3 & address_mask
        high = _mask(62, physical_bits) & ~(mode.ignored_high | c_bit_mask) | (0 if nxe else NO_EXECUTE)
    return PagingContext(
        mode=mode,
        root=root,
        address_mask=address_mask,
        reserved_high=high,
        c_bit_mask=c_bit_mask,
        large_pages=mode is not LEGACY or bool(cr4 & CR4_PSE),
        write_protect=bool(cr0 & CR0_WP),
        smep=bool(cr4 & CR4_SMEP),
        smap=bool(cr4 & CR4_SMAP),
        reports_fetch=(nxe and bool(cr4 & CR4_PAE)) or bool(cr4 & CR4_SMEP),
        canonical_shift=0 if mode is None else mode.linear_bits - 1,
    )


def walk(
    context: PagingContext, gva: int, access: int, *, read_entry: Callable[[int, int], int]
) -> Translation | PageFault | NonCanonical:
    """Translate linear address `gva` (64 bits).

    `read_entry(gpa, width in bytes)` gives a table entry; what it raises passes through, with nothing changed.
    Order of checks at each level: present, reserved bits; permissions after the last one.
    """
    mode = context.mode
    if mode is None:
        gpa = gva & MASK32
        return Translation(gpa, bool(context.c_bit_mask), 4096, True, True, False, False, ())
    if mode.linear_bits == 32:  # linear addresses of 32 bits wrap
        gva &= MASK32
    elif gva >> context.canonical_shift not in (0, (1 << 64 - context.canonical_shift) - 1):
        return NonCanonical(gva)
    error = access & (PfError.W | PfError.U)
    if access & WalkAccess.FETCH and context.reports_fetch:
        error |= PfError.ID
    writable = user = True
    no_execute = False
    width = mode.entry_bytes
    table = context.root
    path: list[tuple[int, int]] = []
    for level in mode.levels:
        entry_gpa = table + (gva >> level.shift & (1 << level.index_bits) - 1) * width
        entry = read_entry(entry_gpa, width)
        if not entry & PRESENT:
            return PageFault(error, gva)
        large = level.large and context.large_pages and bool(entry & LARGE)
        if entry & (context.reserved_high | (level.reserved_large if large else level.reserved)):
            return PageFault(error | PfError.P | PfError.RSVD, gva)
        if level.permissions:
            writable = writable and bool(entry & WRITABLE)
            user = user and bool(entry & USER)
            no_execute = no_execute or bool(width == 8 and entry & NO_EXECUTE)  # 64-bit entries
            path.append((entry_gpa, entry))
        if large or level.shift == mode.levels[-1].shift:
            return _leaf(context, level, gva, access, error, _Rights(writable, user, no_execute), path)
        table = entry & context.address_mask
    raise AssertionError("every mode ends in a level of 4 KiB pages")


class _Rights(NamedTuple):
    writable: bool
    user: bool
    no_execute: bool


def _leaf(
    context: PagingContext,
    level: Level,
    gva: int,
    access: int,
    error: int,
    rights: _Rights,
    path: list[tuple[int, int]],
) -> Translation | PageFault:
    """Check the permissions that all levels left, and say where the address leads."""
    by_user = bool(access & WalkAccess.USER)
    if access & WalkAccess.FETCH:
        denied = rights.no_execute or (by_user and not rights.user) or (context.smep and not by_user and rights.user)
    else:
        denied = by_user and not rights.user
        denied |= context.smap and not by_user and rights.user and not access & WalkAccess.AC
        if access & WalkAccess.WRITE:
            denied |= not rights.writable and (by_user or context.write_protect)
    if denied:
        return PageFault(error | PfError.P, gva)
    page_bytes = 1 << level.shift
    entry = path[-1][1]
    width = 4 if context.mode is LEGACY else 8
    base = entry & context.address_mask
    if context.mode is LEGACY and page_bytes > 4096:  # PSE-36 puts bits 39:32 into 20:13
        base |= (entry >> 13 & 0xFF) << 32
    bits_to_set = ACCESSED | (DIRTY if access & WalkAccess.WRITE else 0)
    updates = tuple((gpa, width, value | ACCESSED) for gpa, value in path[:-1] if not value & ACCESSED)
    if entry & bits_to_set != bits_to_set:
        updates += ((path[-1][0], width, entry | bits_to_set),)
    return Translation(
        gpa=base & -page_bytes | gva & page_bytes - 1,
        c_bit=bool(context.c_bit_mask) if context.mode is LEGACY else bool(entry & context.c_bit_mask),
        page_bytes=page_bytes,
        writable=rights.writable,
        user=rights.user,
        no_execute=rights.no_execute,
        global_page=bool(entry & GLOBAL),
        updates=updates,
    )
