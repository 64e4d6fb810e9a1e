"""The guest's own page tables: one walker for every mode, driven by a table of levels.

Each mode is declared once as data; a context turns the declaration into masks for one setting of the registers, and
one loop serves all of them. Pure: the caller says how to read an entry of the guest's tables - privately, in an
encrypted guest, since page-table walks never obey the C-bit - and gets a translation or a fault as a value. Only paging
off and the two 32-bit levels have no room for a C-bit; an encrypted guest's accesses are all private there.

Source: spec 24593 (APM volume 2), chapter 5 and 15.34.4; reserved bits of levels 4 and 5 also Linux
arch/x86/kvm/mmu/mmu.c (reserved bits of AMD processors).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag
from functools import lru_cache
from typing import NamedTuple

from sevlab.core.errors import ConfigError
from sevlab.core.units import GPA, GVA, MASK32, PAGE_BYTES

CR0_WP = 1 << 16
CR0_PG = 1 << 31
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
CR4_PGE = 1 << 7
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
PHYSICAL_BITS_RANGE = range(32, 53)
"""What an entry of 8 bytes has room for. Source: spec 24593, 5.1."""


class WalkAccess(IntFlag):
    """What the access is; the bits of the #PF error code where it has them.

    Source: spec 24593, 5.6 and 8.2.15.
    """

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
    """One level of a mode: which address bits index the table, and what its entries may be.

    Source: spec 24593, 5.2 and 5.3.
    """

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
    """A paging mode: its levels from the root, entry width in bytes, canonical width of linear addresses.

    Source: spec 24593, 5.1.
    """

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

    `gpa` without the C-bit; `c_bit` the effective C-bit of this access (an encrypted guest fetches privately whatever
    the entry says); `global_page` needs CR4.PGE; `updates` the accessed and dirty bits that the walk would set: (gpa of
    the entry, its width in bytes, its new value). Source: spec 24593, 5.4 and 15.34.4.
    """

    gpa: GPA
    c_bit: bool
    page_bytes: int
    writable: bool
    user: bool
    no_execute: bool
    global_page: bool
    updates: tuple[tuple[int, int, int], ...]


class PageFault(NamedTuple):
    """#PF with its error code (`PfError`, as a plain number). Source: spec 24593, 8.2.15."""

    error_code: int
    gva: GVA


class NonCanonical(NamedTuple):
    """The address has no meaning in long mode: #GP(0), or #SS(0) on the stack. Source: spec 24593, 5.3.1."""

    gva: GVA


class LevelMasks(NamedTuple):
    """A level as one context walks it: what `Level` declares, with the context's own reserved bits."""

    shift: int
    index_mask: int
    leaf_bit: int
    """The bit that makes an entry a leaf: PS where large pages are allowed, P (always set) on the last level."""
    reserved: int
    reserved_leaf: int
    granted: int
    """Rights that the entry cannot take away: none, or all in a PAE PDPTE."""


class AccessRule(NamedTuple):
    """What one kind of access needs of the rights that all levels leave, and its bits of the error code."""

    error: int
    required: int
    forbidden: int
    private: bool
    """The access is private whatever the entry says."""


RIGHTS = WRITABLE | USER | NO_EXECUTE
"""Rights of a walk so far, in the places of the entry's bits; bit 63 turned round: 1 lets execute."""
ACCESS_BITS = int(WalkAccess.WRITE | WalkAccess.USER | WalkAccess.FETCH | WalkAccess.AC)
_WRITE, _USER, _FETCH, _AC = (int(bit) for bit in (WalkAccess.WRITE, WalkAccess.USER, WalkAccess.FETCH, WalkAccess.AC))
_RESERVED_FAULT = int(PfError.P | PfError.RSVD)
_EXECUTE = NO_EXECUTE


@dataclass(frozen=True, slots=True)
class PagingContext:
    """What the control registers say about paging, made once for each combination; see `paging_context`."""

    mode: Mode | None
    root: int
    address_mask: int
    c_bit_mask: int
    entry_bytes: int
    level_masks: tuple[LevelMasks, ...]
    rules: dict[int, AccessRule]
    """By `access & ACCESS_BITS`; shared between contexts, never changed."""
    global_bit: int
    canonical_shift: int
    """Bits from here up are all equal in a canonical address; 0: linear addresses wrap at 32 bits."""
    canonical_top: int


@lru_cache(maxsize=64)
def _level_masks(mode: Mode, reserved_high: int, large_pages: bool) -> tuple[LevelMasks, ...]:  # noqa: FBT001 - a cache key
    """The levels of `mode` as masks."""
    last = mode.levels[-1]
    return tuple(
        LevelMasks(
            shift=level.shift,
            index_mask=(1 << level.index_bits) - 1,
            leaf_bit=PRESENT if level is last else LARGE if level.large and large_pages else 0,
            reserved=reserved_high | level.reserved,
            reserved_leaf=reserved_high | level.reserved_large,
            granted=0 if level.permissions else RIGHTS,
        )
        for level in mode.levels
    )


@lru_cache(maxsize=64)
def _rules(
    *, write_protect: bool, smep: bool, smap: bool, reports_fetch: bool, fetch_private: bool, all_private: bool
) -> dict[int, AccessRule]:
    """For every kind of access what it needs. Source: spec 24593, 5.6."""
    rules = {}
    for access in range(ACCESS_BITS + 1):
        if access & ~ACCESS_BITS:
            continue
        fetch, by_user = bool(access & _FETCH), bool(access & _USER)
        required = USER if by_user else 0
        if fetch:
            required |= _EXECUTE
            keeps_off = smep
        else:
            required |= WRITABLE if access & _WRITE and (by_user or write_protect) else 0
            keeps_off = smap and not access & _AC
        rules[access] = AccessRule(
            error=access & (_WRITE | _USER) | (_FETCH if fetch and reports_fetch else 0),
            required=required,
            forbidden=USER if keeps_off and not by_user else 0,
            private=all_private or (fetch_private and fetch),
        )
    return rules


@lru_cache(maxsize=1024)
def paging_context(
    cr0: int,
    cr3: int,
    cr4: int,
    efer: int,
    c_bit_mask: int,
    physical_bits: int = PHYSICAL_BITS,
    *,
    private_fetch: bool = True,
) -> PagingContext:
    """The context of these register values (64 bits each).

    `c_bit_mask` has the one bit that is the C-bit in 8-byte entries and CR3, 0: the guest is not encrypted;
    `physical_bits` is the width of guest-physical addresses, 32-52. The C-bit is never a reserved bit.
    `private_fetch` is the rule of an encrypted guest; False for the host's tables, where a fetch obeys the C-bit.
    Raises `ConfigError` for another width. Source: spec 24593, 5.1-5.3 and 15.34.4.
    """
    if physical_bits not in PHYSICAL_BITS_RANGE:
        raise ConfigError(f"physical_bits {physical_bits}: expected 32 to 52")
    nxe = bool(efer & EFER_NXE)
    smep = bool(cr4 & CR4_SMEP)
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
    long = mode is LONG4 or mode is LONG5
    canonical_shift = mode.linear_bits - 1 if mode is not None and long else 0
    return PagingContext(
        mode=mode,
        root=root,
        address_mask=address_mask,
        c_bit_mask=c_bit_mask,
        entry_bytes=0 if mode is None else mode.entry_bytes,
        level_masks=() if mode is None else _level_masks(mode, high, mode is not LEGACY or bool(cr4 & CR4_PSE)),
        rules=_rules(
            write_protect=bool(cr0 & CR0_WP),
            smep=smep,
            smap=bool(cr4 & CR4_SMAP),
            reports_fetch=(nxe and bool(cr4 & CR4_PAE)) or smep,
            fetch_private=private_fetch and bool(c_bit_mask),
            all_private=bool(c_bit_mask) and (mode is None or mode is LEGACY),
        ),
        global_bit=GLOBAL if cr4 & CR4_PGE else 0,
        canonical_shift=canonical_shift,
        canonical_top=(1 << 64 - canonical_shift) - 1,
    )


def walk(
    context: PagingContext, gva: int, access: int, *, read_entry: Callable[[int, int], int]
) -> Translation | PageFault | NonCanonical:
    """Translate linear address `gva` (64 bits) for `access` (`WalkAccess` bits).

    `read_entry(gpa, width in bytes)` gives a table entry; what it raises passes through, with nothing changed.
    Order of checks at each level: present, reserved bits; permissions after the last one.
    Source: spec 24593, 5.2-5.6.
    """
    rule = context.rules[int(access) & ACCESS_BITS]
    if context.mode is None:
        return Translation(GPA(gva & MASK32), rule.private, PAGE_BYTES, True, True, False, False, ())
    if not context.canonical_shift:
        gva &= MASK32
    elif (top := gva >> context.canonical_shift) and top != context.canonical_top:
        return NonCanonical(GVA(gva))
    width = context.entry_bytes
    address_mask = context.address_mask
    table = context.root
    rights = RIGHTS
    updates: tuple[tuple[int, int, int], ...] = ()
    for shift, index_mask, leaf_bit, reserved, reserved_leaf, granted in context.level_masks:
        entry_gpa = table + (gva >> shift & index_mask) * width
        entry = read_entry(entry_gpa, width)
        if not entry & PRESENT:
            return PageFault(rule.error, GVA(gva))
        leaf = entry & leaf_bit
        if entry & (reserved_leaf if leaf else reserved):
            return PageFault(rule.error | _RESERVED_FAULT, GVA(gva))
        rights &= entry ^ NO_EXECUTE | granted
        if leaf:
            break
        if not (entry & ACCESSED or granted):
            updates += ((entry_gpa, width, entry | ACCESSED),)
        table = entry & address_mask
    if rights & rule.required != rule.required or rights & rule.forbidden:
        return PageFault(rule.error | PRESENT, GVA(gva))
    used = ACCESSED | DIRTY if rule.error & _WRITE else ACCESSED
    if entry & used != used:
        updates += ((entry_gpa, width, entry | used),)
    page_bytes = 1 << shift
    base = entry & address_mask
    if width == 4 and page_bytes > PAGE_BYTES:  # PSE-36 puts bits 39:32 into 20:13
        base |= (entry >> 13 & 0xFF) << 32
    return Translation(
        GPA(base & -page_bytes | gva & page_bytes - 1),
        rule.private or (entry & context.c_bit_mask != 0),
        page_bytes,
        rights & WRITABLE != 0,
        rights & USER != 0,
        not rights & _EXECUTE,
        entry & context.global_bit != 0,
        updates,
    )
