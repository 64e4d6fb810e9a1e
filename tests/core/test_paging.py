from __future__ import annotations

import ctypes
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sevlab.core import paging as pg
from sevlab.core.errors import ConfigError
from sevlab.core.paging import NonCanonical, PageFault, PfError, Translation, WalkAccess, paging_context, walk

C51 = 1 << 51
LONG = {"cr0": pg.CR0_PG | pg.CR0_WP, "cr4": pg.CR4_PAE, "efer": pg.EFER_LMA | pg.EFER_LME | pg.EFER_NXE}
PAE = {"cr0": pg.CR0_PG | pg.CR0_WP, "cr4": pg.CR4_PAE, "efer": pg.EFER_NXE}
LEGACY = {"cr0": pg.CR0_PG | pg.CR0_WP, "cr4": pg.CR4_PSE, "efer": 0}
P, W, U, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
FULL = P | W | U | A | D


class Tables:
    """Writes page tables into a dictionary, entry by entry."""

    def __init__(self, levels, width=8, root=0x1000):
        self.levels, self.width, self.root = levels, width, root
        self.entries: dict[int, int] = {}
        self.next = root + 0x1000

    def map(self, gva, gpa, flags, *, depth=None, upper=FULL):
        table = self.root
        depth = len(self.levels) if depth is None else depth
        for shift, bits in self.levels[: depth - 1]:
            place = table + (gva >> shift & (1 << bits) - 1) * self.width
            if place not in self.entries:
                self.entries[place] = self.next | upper
                self.next += 0x1000
            table = self.entries[place] & 0x7_FFFF_FFFF_F000 & ~C51
        shift, bits = self.levels[depth - 1]
        self.leaf = table + (gva >> shift & (1 << bits) - 1) * self.width
        self.entries[self.leaf] = gpa | flags
        return self

    def read(self, gpa, width):
        assert width == self.width
        return self.entries.get(gpa, 0)


LONG_LEVELS = ((39, 9), (30, 9), (21, 9), (12, 9))
LA57_LEVELS = ((48, 9), *LONG_LEVELS)
PAE_LEVELS = ((30, 2), (21, 9), (12, 9))
LEGACY_LEVELS = ((22, 10), (12, 10))


def context(mode, tables, c_bit=0, **changes):
    values = mode | changes
    return paging_context(values["cr0"], tables.root, values["cr4"], values["efer"], c_bit)


def go(mode, tables, gva, access=0, c_bit=0, **changes):
    return walk(context(mode, tables, c_bit, **changes), gva, access, read_entry=tables.read)


def test_paging_off_is_the_identity_and_private_in_an_encrypted_guest():
    off = paging_context(0, 0, 0, 0, 0)
    assert walk(off, 0x1_2345_6789, 0, read_entry=None).gpa == 0x2345_6789
    assert walk(off, 5, 0, read_entry=None).c_bit is False
    assert walk(paging_context(0, 0, 0, 0, C51), 5, 0, read_entry=None).c_bit is True


@pytest.mark.parametrize(
    ("mode", "levels", "width", "upper", "changes"),
    [
        (LONG, LONG_LEVELS, 8, FULL, {}),
        (LONG, LA57_LEVELS, 8, FULL, {"cr4": pg.CR4_PAE | pg.CR4_LA57}),
        (PAE, PAE_LEVELS, 8, P, {}),
        (LEGACY, LEGACY_LEVELS, 4, FULL, {}),
    ],
    ids=["4-level", "5-level", "PAE", "32-bit"],
)
def test_each_mode_translates_a_4k_page(mode, levels, width, upper, changes):
    tables = Tables(levels, width)
    table = tables.root
    for shift, bits in levels[:-1]:
        place = table + (0x1234_5678 >> shift & (1 << bits) - 1) * width
        tables.entries[place] = tables.next | (upper if table == tables.root else FULL)
        table, tables.next = tables.next, tables.next + 0x1000
    tables.entries[table + (0x1234_5678 >> 12 & (1 << levels[-1][1]) - 1) * width] = 0x7000 | FULL
    found = go(mode, tables, 0x1234_5678, **changes)
    assert found == Translation(0x7678, False, 4096, True, True, False, False, ())


@pytest.mark.parametrize(
    ("mode", "levels", "depth", "page", "gpa"),
    [(LONG, LONG_LEVELS, 2, 1 << 30, 0x8000_0000), (LONG, LONG_LEVELS, 3, 1 << 21, 0x8020_0000)],
)
def test_large_pages(mode, levels, depth, page, gpa):
    tables = Tables(levels).map(0x4000_0000, gpa, FULL | PS, depth=depth)
    found = go(mode, tables, 0x4000_0000 + 0x12345)
    assert (found.gpa, found.page_bytes) == (gpa + 0x12345, page)


def test_a_4m_page_reaches_above_4_gib_by_pse36():
    tables = Tables(LEGACY_LEVELS, 4).map(0x0040_0000, 0x0080_0000, FULL | PS | 3 << 13, depth=1)
    assert go(LEGACY, tables, 0x0040_1234).gpa == 0x3_0080_1234


def test_without_pse_the_ps_bit_is_ignored():
    tables = Tables(LEGACY_LEVELS, 4).map(0x0040_0000, 0x5000, FULL)
    tables.entries[tables.root + 4] |= PS
    assert go(LEGACY, tables, 0x0040_0000, cr4=0).gpa == 0x5000


@pytest.mark.parametrize("position", [47, 51])
def test_the_c_bit_is_stripped_and_reported(position):
    c_bit = 1 << position
    tables = Tables(LONG_LEVELS).map(0x4000, 0x7000, FULL | c_bit)
    assert go(LONG, tables, 0x4000, c_bit=c_bit) == Translation(0x7000, True, 4096, True, True, False, False, ())
    tables.map(0x4000, 0x7000, FULL)
    assert go(LONG, tables, 0x4000, c_bit=c_bit).c_bit is False


def test_c_bits_in_cr3_and_table_pointers_are_stripped():
    tables = Tables(LONG_LEVELS).map(0x4000, 0x7000, FULL, upper=FULL | C51)
    tables.root |= C51
    assert go(LONG, tables, 0x4000, c_bit=C51).gpa == 0x7000


def test_without_encryption_the_c_bit_is_a_reserved_address_bit():
    tables = Tables(LONG_LEVELS).map(0x4000, 0x7000, FULL | C51)
    assert go(LONG, tables, 0x4000) == PageFault(PfError.P | PfError.RSVD, 0x4000)


@pytest.mark.parametrize("missing", range(4))
def test_a_missing_entry_at_any_level_is_not_present(missing):
    tables = Tables(LONG_LEVELS).map(0x4000, 0x7000, FULL)
    place = sorted(tables.entries)[missing]
    tables.entries[place] &= ~P
    found = go(LONG, tables, 0x4000, WalkAccess.WRITE | WalkAccess.USER)
    assert found == PageFault(PfError.W | PfError.U, 0x4000)


@pytest.mark.parametrize(
    ("depth", "bit", "faults"),
    [
        (4, 48, True),
        (4, 51, True),
        (4, 52, False),
        (4, 62, False),
        (1, 7, True),
        (1, 8, True),
        (3, 13, True),
        (3, 20, True),
        (3, 12, False),
        (2, 13, True),
        (2, 29, True),
        (2, 12, False),
    ],
)
def test_reserved_bits_of_each_level(depth, bit, faults):
    tables = Tables(LONG_LEVELS).map(0x4000_0000, 0, FULL | (PS if depth in (2, 3) else 0), depth=max(depth, 2))
    place = tables.root if depth == 1 else tables.leaf
    tables.entries[place] |= 1 << bit
    if depth == 4:
        tables = Tables(LONG_LEVELS).map(0x4000_0000, 1 << bit, FULL)
    found = go(LONG, tables, 0x4000_0000)
    assert isinstance(found, PageFault) == faults
    if faults:
        assert found.error_code == PfError.P | PfError.RSVD


def test_nx_is_reserved_without_nxe():
    tables = Tables(LONG_LEVELS).map(0x4000, 0x7000, FULL | NX)
    assert go(LONG, tables, 0x4000).no_execute
    found = go(LONG, tables, 0x4000, efer=pg.EFER_LMA)
    assert found == PageFault(PfError.P | PfError.RSVD, 0x4000)


@pytest.mark.parametrize("bit", [1, 2, 5, 8, 63])
def test_reserved_bits_of_a_pae_pdpte(bit):
    tables = Tables(PAE_LEVELS).map(0x4000, 0x7000, FULL)
    tables.entries[tables.root] = tables.entries[tables.root] & ~0xFFF | P
    assert go(PAE, tables, 0x4000).gpa == 0x7000
    tables.entries[tables.root] |= 1 << bit
    assert go(PAE, tables, 0x4000) == PageFault(PfError.P | PfError.RSVD, 0x4000)


@pytest.mark.parametrize("bit", [52, 62])
def test_high_bits_are_reserved_in_pae_but_free_in_long_mode(bit):
    tables = Tables(PAE_LEVELS).map(0x4000, 0x7000, FULL | 1 << bit)
    tables.entries[tables.root] = tables.entries[tables.root] & ~0xFFF | P
    assert isinstance(go(PAE, tables, 0x4000), PageFault)
    tables = Tables(LONG_LEVELS).map(0x4000, 0x7000, FULL | 1 << bit)
    assert isinstance(go(LONG, tables, 0x4000), Translation)


R_, W_, U_, F_, AC_ = 0, WalkAccess.WRITE, WalkAccess.USER, WalkAccess.FETCH, WalkAccess.AC
SMEP, SMAP = pg.CR4_PAE | pg.CR4_SMEP, pg.CR4_PAE | pg.CR4_SMAP


@pytest.mark.parametrize(
    ("flags", "access", "changes", "error"),
    [
        (P | U, W_ | U_, {}, P | W | U),
        (P | W, R_ | U_, {}, P | U),
        (P, W_, {}, P | W),
        (P, W_, {"cr0": pg.CR0_PG}, None),
        (P | U, W_ | U_, {"cr0": pg.CR0_PG}, P | W | U),
        (P | W | NX, F_, {}, P | 16),
        (P | W | NX, R_, {}, None),
        (P | W | U | NX, F_ | U_, {}, P | U | 16),
        (P | W | U, F_, {}, None),
        (P | W | U, F_, {"cr4": SMEP}, P | 16),
        (P | W, F_, {"cr4": SMEP}, None),
        (P | W | U, F_ | U_, {"cr4": SMEP}, None),
        (P | W | U, R_, {"cr4": SMAP}, P),
        (P | W | U, W_, {"cr4": SMAP}, P | W),
        (P | W | U, R_ | AC_, {"cr4": SMAP}, None),
        (P | W | U, R_ | U_, {"cr4": SMAP}, None),
        (P | W | U, F_, {"cr4": SMAP}, None),
    ],
)
def test_permissions(flags, access, changes, error):
    tables = Tables(LONG_LEVELS).map(0x4000, 0x7000, flags | A | D)
    found = go(LONG, tables, 0x4000, access, **changes)
    assert found == PageFault(error, 0x4000) if error is not None else isinstance(found, Translation)


def test_the_id_bit_needs_nxe_or_smep():
    tables = Tables(LONG_LEVELS).map(0x4000, 0x7000, P | W | A | D)
    access = WalkAccess.FETCH | WalkAccess.USER
    assert go(LONG, tables, 0x4000, access, efer=pg.EFER_LMA).error_code == P | U
    assert go(LONG, tables, 0x4000, access, efer=pg.EFER_LMA, cr4=SMEP).error_code == P | U | 16


@pytest.mark.parametrize("taken", [W, U])
def test_a_right_that_an_upper_level_denies_is_denied(taken):
    tables = Tables(LONG_LEVELS).map(0x4000, 0x7000, FULL, upper=FULL & ~taken)
    found = go(LONG, tables, 0x4000)
    assert (found.writable, found.user) == (taken != W, taken != U)


def test_nx_of_an_upper_level_counts():
    tables = Tables(LONG_LEVELS).map(0x4000, 0x7000, FULL, upper=FULL | NX)
    assert go(LONG, tables, 0x4000).no_execute


@pytest.mark.parametrize(
    ("gva", "la57", "canonical"),
    [
        (0x0000_7FFF_FFFF_F000, False, True),
        (0x0000_8000_0000_0000, False, False),
        (0xFFFF_7FFF_FFFF_F000, False, False),
        (0xFFFF_8000_0000_0000, False, True),
        (0x0000_8000_0000_0000, True, True),
        (0x0100_0000_0000_0000, True, False),
        (0xFF00_0000_0000_0000, True, True),
    ],
)
def test_canonical_addresses(gva, la57, canonical):
    tables = Tables(LA57_LEVELS if la57 else LONG_LEVELS)
    found = go(LONG, tables, gva, cr4=pg.CR4_PAE | (pg.CR4_LA57 if la57 else 0))
    assert isinstance(found, NonCanonical) != canonical


def test_accessed_and_dirty_bits_that_are_missing_are_reported():
    tables = Tables(LONG_LEVELS).map(0x4000, 0x7000, P | W | U, upper=P | W | U)
    places = sorted(tables.entries)
    read = go(LONG, tables, 0x4000)
    assert [(gpa, value & (A | D)) for gpa, _, value in read.updates] == [(place, A) for place in places]
    write = go(LONG, tables, 0x4000, WalkAccess.WRITE)
    assert [value & (A | D) for _, _, value in write.updates] == [A, A, A, A | D]
    for gpa, _, value in write.updates:
        tables.entries[gpa] = value
    assert go(LONG, tables, 0x4000, WalkAccess.WRITE).updates == ()


def test_what_read_entry_raises_passes_through():
    class Nested(Exception):
        pass

    def broken(*_):
        raise Nested

    with pytest.raises(Nested):
        walk(context(LONG, Tables(LONG_LEVELS)), 0, 0, read_entry=broken)


MODES = {
    "4-level": (LONG, LONG_LEVELS, 8, (2, 3, 4)),
    "5-level": (LONG | {"cr4": pg.CR4_PAE | pg.CR4_LA57}, LA57_LEVELS, 8, (3, 4, 5)),
    "PAE": (PAE, PAE_LEVELS, 8, (2, 3)),
    "32-bit": (LEGACY, LEGACY_LEVELS, 4, (1, 2)),
}


@given(st.data())
def test_the_walker_agrees_with_a_dictionary_of_pages(data):
    mode, levels, width, depths = MODES[data.draw(st.sampled_from(sorted(MODES)))]
    c_bit = data.draw(st.sampled_from((0, 1 << 47, C51))) if width == 8 else data.draw(st.sampled_from((0, C51)))
    tables = Tables(levels, width)
    pages = {}
    for number in range(data.draw(st.integers(1, 4))):
        depth = data.draw(st.sampled_from(depths))
        shift = levels[depth - 1][0]
        gva = number << levels[0][0] & (1 << 32) - 1 if width == 4 else number << 30
        gpa = data.draw(st.integers(1, 7)) << max(shift, 21)
        rights = data.draw(st.integers(0, 3)) << 1
        private = width == 8 and data.draw(st.booleans())
        no_execute = width == 8 and data.draw(st.booleans())
        flags = P | A | D | rights | (PS if depth < len(levels) else 0) | (NX if no_execute else 0)
        tables.map(gva, gpa, flags | (c_bit if private else 0), depth=depth)
        if width == 8 and len(levels) == 3:
            place = tables.root + (gva >> 30) * 8
            tables.entries[place] = tables.entries[place] & ~0xFFF | P
        pages[gva] = (shift, gpa, bool(rights & W), bool(rights & U), no_execute, private and bool(c_bit))
    gva = data.draw(st.sampled_from(sorted(pages)))
    shift, gpa, writable, user, no_execute, private = pages[gva]
    offset = data.draw(st.integers(0, (1 << shift) - 1))
    access = WalkAccess(0)
    for bit in (WalkAccess.WRITE, WalkAccess.USER, WalkAccess.AC):
        access |= bit if data.draw(st.booleans()) else 0
    if not access & WalkAccess.WRITE and data.draw(st.booleans()):
        access |= WalkAccess.FETCH
    smep, smap, wp = (data.draw(st.booleans()) for _ in range(3))
    cr4 = mode["cr4"] | (pg.CR4_SMEP if smep else 0) | (pg.CR4_SMAP if smap else 0)
    cr0 = pg.CR0_PG | (pg.CR0_WP if wp else 0)
    found = go(mode, tables, gva + offset, access, c_bit=c_bit, cr4=cr4, cr0=cr0)

    supervisor = not access & WalkAccess.USER
    fetch, write = bool(access & WalkAccess.FETCH), bool(access & WalkAccess.WRITE)
    allowed = user or supervisor
    allowed &= not (fetch and no_execute)
    allowed &= not (fetch and smep and supervisor and user)
    allowed &= not (not fetch and smap and supervisor and user and not access & WalkAccess.AC)
    allowed &= not (write and not writable and not (supervisor and not wp))
    if allowed:
        expected_c = bool(c_bit) and (width == 4 or private or fetch)
        assert found == Translation(
            gpa + offset, expected_c, 1 << shift, writable, user, no_execute, False, found.updates
        )
    else:
        nxe = bool(mode["efer"] & pg.EFER_NXE)
        reported = 16 if fetch and (smep or (nxe and cr4 & pg.CR4_PAE)) else 0
        error = P | (W if write else 0) | (0 if supervisor else U) | reported
        assert found == PageFault(error, gva + offset)


@pytest.mark.parametrize(("private", "c_bit", "expected"), [(0, C51, True), (C51, C51, True), (0, 0, False)])
def test_an_encrypted_guest_fetches_privately_whatever_the_c_bit(private, c_bit, expected):
    tables = Tables(LONG_LEVELS).map(0x4000, 0x7000, FULL | private)
    assert go(LONG, tables, 0x4000, WalkAccess.FETCH, c_bit=c_bit).c_bit is expected
    assert go(LONG, tables, 0x4000, c_bit=c_bit).c_bit is bool(private)


def test_two_level_tables_have_no_c_bit_so_an_encrypted_guest_is_all_private():
    tables = Tables(LEGACY_LEVELS, 4).map(0x4000, 0x7000, FULL)
    assert go(LEGACY, tables, 0x4000, c_bit=C51).c_bit is True
    assert go(LEGACY, tables, 0x4000).c_bit is False


@pytest.mark.parametrize("position", [47, 51])
def test_pae_tables_have_a_c_bit_at_every_level(position):
    c_bit = 1 << position
    tables = Tables(PAE_LEVELS).map(0x4000, 0x7000, FULL, upper=FULL)
    tables.entries[tables.root] = tables.entries[tables.root] & ~0xFFF | P | c_bit
    assert go(PAE, tables, 0x4000, c_bit=c_bit) == Translation(0x7000, False, 4096, True, True, False, False, ())
    tables.entries[tables.leaf] |= c_bit
    assert go(PAE, tables, 0x4000, c_bit=c_bit).c_bit is True


def test_a_global_page_needs_pge():
    tables = Tables(LONG_LEVELS).map(0x4000, 0x7000, FULL | 1 << 8)
    assert go(LONG, tables, 0x4000).global_page is False
    assert go(LONG, tables, 0x4000, cr4=pg.CR4_PAE | pg.CR4_PGE).global_page is True


@pytest.mark.parametrize(("bits", "accepted"), [(31, False), (32, True), (52, True), (53, False)])
def test_the_physical_width_is_32_to_52_bits(bits, accepted):
    def make():
        return paging_context(LONG["cr0"], 0x1000, LONG["cr4"], LONG["efer"], 0, bits)

    if accepted:
        make()
    else:
        with pytest.raises(ConfigError, match="32 to 52"):
            make()


@pytest.mark.parametrize(("bit", "faults"), [(39, False), (40, True), (51, True), (52, False)])
def test_address_bits_from_the_physical_width_on_are_reserved(bit, faults):
    tables = Tables(LONG_LEVELS).map(0x4000, 0x7000, FULL | 1 << bit)
    found = walk(
        paging_context(LONG["cr0"], tables.root, LONG["cr4"], LONG["efer"], 0, 40), 0x4000, 0, read_entry=tables.read
    )
    assert isinstance(found, PageFault) == faults
    if faults:
        assert found.error_code == P | 8


def test_a_5_level_root_entry_reserves_bits_7_and_8():
    la57 = {"cr4": pg.CR4_PAE | pg.CR4_LA57}
    for bit, faults in ((6, False), (7, True), (8, True), (9, False)):
        tables = Tables(LA57_LEVELS).map(0x4000, 0x7000, FULL)
        tables.entries[tables.root] = tables.entries[tables.root] & ~(1 << bit) | 1 << bit
        assert isinstance(go(LONG, tables, 0x4000, **la57), PageFault) == faults


def test_a_pse_page_reserves_bit_21_only():
    tables = Tables(LEGACY_LEVELS, 4).map(0x0040_0000, 0x0080_0000, FULL | PS | 1 << 21, depth=1)
    assert go(LEGACY, tables, 0x0040_0000) == PageFault(PfError.P | PfError.RSVD, 0x0040_0000)
    tables.map(0x0040_0000, 0x0080_0000, FULL | PS | 1 << 22, depth=1)
    assert go(LEGACY, tables, 0x0040_0000).gpa == 0x00C0_0000


def test_reserved_bits_are_found_before_permissions_and_absence_before_reserved_bits():
    tables = Tables(LONG_LEVELS).map(0x4000, 0x7000, P | A | 1 << 48)
    assert go(LONG, tables, 0x4000, W_ | U_).error_code == P | W | U | 8
    tables.map(0x4000, 0x7000, 1 << 48)
    assert go(LONG, tables, 0x4000, W_ | U_).error_code == W | U


def test_the_id_bit_in_32_bit_paging_needs_smep_not_nxe():
    tables = Tables(LEGACY_LEVELS, 4).map(0x4000, 0x7000, P | W | A | D)
    access = F_ | U_
    assert go(LEGACY, tables, 0x4000, access, efer=pg.EFER_NXE).error_code == P | U
    assert go(LEGACY, tables, 0x4000, access, cr4=pg.CR4_PSE | pg.CR4_SMEP).error_code == P | U | 16


def test_error_codes_are_plain_numbers():
    found = go(LONG, Tables(LONG_LEVELS), 0x4000, W_ | U_)
    assert type(found.error_code) is int


def test_a_denied_access_reports_no_updates_and_reads_each_level_once():
    tables = Tables(LONG_LEVELS).map(0x4000, 0x7000, P, upper=P)
    seen = []

    def read(gpa, width):
        seen.append(gpa)
        return tables.read(gpa, width)

    assert isinstance(walk(context(LONG, tables), 0x4000, U_, read_entry=read), PageFault)
    assert len(seen) == len(set(seen)) == 4


# The naive model: a dictionary from the digits of an address to what the entry there says, and prose-like rules. It
# shares no mask and no address arithmetic with the walker.

SPLITS = {
    "4-level": ((16, 25), (25, 34), (34, 43), (43, 52)),
    "5-level": ((7, 16), (16, 25), (25, 34), (34, 43), (43, 52)),
    "PAE": ((32, 34), (34, 43), (43, 52)),
    "32-bit": ((32, 42), (42, 52)),
}
"""Which of the 64 binary digits of an address, from the left, choose the entry at each level."""
LARGE_AT = {"4-level": (1, 2), "5-level": (2, 3), "PAE": (1,), "32-bit": (0,)}
# (mode, level, large): bits that are reserved whatever the registers say; typed from the figures of 24593, 5.2 and 5.3
LOW_RESERVED = {
    ("4-level", 0, False): (7, 8),
    ("4-level", 1, True): tuple(range(13, 30)),
    ("4-level", 2, True): tuple(range(13, 21)),
    ("5-level", 0, False): (7, 8),
    ("5-level", 1, False): (7, 8),
    ("5-level", 2, True): tuple(range(13, 30)),
    ("5-level", 3, True): tuple(range(13, 21)),
    ("PAE", 0, False): (1, 2, 5, 6, 7, 8, 63),
    ("PAE", 1, True): tuple(range(13, 21)),
    ("32-bit", 0, True): (21,),
}


class Naive:
    """What a guest mapped: entries by mode level and the digits that lead there, written to a dictionary of words."""

    def __init__(self, name, c_bit, physical_bits, root_c_bit):
        self.name, self.c_bit, self.physical_bits = name, c_bit, physical_bits
        self.width = 4 if name == "32-bit" else 8
        self.entries: dict[tuple[str, ...], dict] = {}
        self.places: dict[tuple[str, ...], int] = {(): 0x1000}
        self.words: dict[int, int] = {}
        self.cr3 = 0x1000 | (c_bit if root_c_bit and self.width == 8 and name != "PAE" else 0)

    def digits(self, gva):
        text = format(gva, "064b")
        return tuple(text[low:high] for low, high in SPLITS[self.name])

    def bad_bits(self, level, *, leaf, large, nxe):
        bits = LOW_RESERVED.get((self.name, level, large), ())
        if self.width == 8:
            top = 63 if self.name == "PAE" else 52
            bits += tuple(bit for bit in range(self.physical_bits, top) if 1 << bit != self.c_bit)
            bits += () if nxe else (63,)
        return bits

    def add(self, gva, level, entry):
        """Put an entry at `level` of the path to `gva`, unless something is there or a large page is above."""
        digits = self.digits(gva)[: level + 1]
        if digits in self.entries or (level and (digits[:-1] not in self.places)):
            return False
        place = self.places[digits[:-1]] + int(digits[-1], 2) * self.width
        if not entry["leaf"]:
            entry["frame"] = 0x1000 * (len(self.places) + 1)
            self.places[digits] = entry["frame"]
        bare = self.name == "PAE" and level == 0
        word = entry["frame"] | (entry["c"] and self.c_bit)
        for name, bit in (("p", P), ("w", W), ("u", U), ("a", A), ("d", D), ("g", 256), ("nx", NX)):
            present = entry[name] and not (bare and name != "p") and (name not in "dg" or entry["leaf"])
            word |= bit if present and not (name == "nx" and self.width == 4) else 0
        word |= PS if entry["large"] else 0
        word |= 0 if entry["bad"] is None else 1 << entry["bad"]
        entry["bare"], entry["place"] = bare, place
        self.entries[digits] = entry
        self.words[place] = word
        return True

    def expect(self, gva, access, *, nxe, wp, smep, smap, pge):
        write, user = bool(access & W_), bool(access & U_)
        fetch, ac = bool(access & F_), bool(access & AC_)
        text = format(gva, "064b")
        sign = {"4-level": 17, "5-level": 8}.get(self.name, 0)
        if sign and len(set(text[:sign])) != 1:
            return NonCanonical(gva)
        if self.width == 4 or self.name == "PAE":
            gva = int(text[32:], 2)
        told = (2 if write else 0) + (4 if user else 0)
        told += 16 if fetch and (smep or (nxe and self.name != "32-bit")) else 0
        path = []
        while True:
            entry = self.entries.get(self.digits(gva)[: len(path) + 1])
            if entry is None or not entry["p"]:
                return PageFault(told, gva)
            if entry["bad"] is not None or (entry["nx"] and not nxe and self.width == 8 and not entry["bare"]):
                return PageFault(told + 9, gva)
            path.append(entry)
            if entry["leaf"]:
                break
        rights = [entry for entry in path if not entry["bare"]]
        writable, for_user = all(e["w"] for e in rights), all(e["u"] for e in rights)
        no_execute = self.width == 8 and any(e["nx"] for e in rights)
        reasons = [
            user and not for_user,
            write and user and not writable,
            write and not user and wp and not writable,
            fetch and no_execute,
            fetch and not user and smep and for_user,
            not fetch and not user and smap and for_user and not ac,
        ]
        if any(reasons):
            return PageFault(told + 1, gva)
        page = 1 << sum(high - low for low, high in SPLITS[self.name][len(path) :]) + 12
        leaf = path[-1]
        private = bool(self.c_bit) and (fetch or self.width == 4 or bool(leaf["c"]))
        updates = tuple(
            (e["place"], self.width, self.words[e["place"]] | A | (D if write and e is leaf else 0))
            for e in rights
            if not e["a"] or (write and e is leaf and not e["d"])
        )
        return Translation(
            leaf["frame"] + gva % page, private, page, writable, for_user, no_execute, leaf["g"] and pge, updates
        )


LIKELY, UNLIKELY = st.sampled_from((True,) * 4 + (False,)), st.sampled_from((False,) * 7 + (True,))


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_every_mode_agrees_with_the_naive_model(data):
    draw = data.draw
    name = draw(st.sampled_from(sorted(SPLITS)))
    c_bit = draw(st.sampled_from((0, 1 << 47, C51)))
    physical_bits = draw(st.sampled_from((40, 48, 52)))
    nxe, wp, smep, smap, pge = (draw(st.booleans()) for _ in range(5))
    naive = Naive(name, c_bit, physical_bits, draw(st.booleans()))
    corner = st.sampled_from((0, 0x4000_0000, 0xFFFF_F000, 0x7FFF_FFFF_F000, 0xFFFF_8000_0000_0000, 0xFF00 << 48))
    paths = draw(st.lists(st.tuples(corner, st.integers(0, (1 << 23) - 1)), min_size=1, max_size=4))
    gvas = [(base + offset) % (1 << 64) for base, offset in paths]
    for number, gva in enumerate(gvas):
        end = draw(st.sampled_from((*LARGE_AT[name], len(SPLITS[name]) - 1)))
        sabotaged = draw(st.sampled_from((None, None, *range(end + 1))))  # the level with a reserved bit
        for level in range(end + 1):
            leaf, large = level == end, level == end and end != len(SPLITS[name]) - 1
            shift = sum(high - low for low, high in SPLITS[name][level + 1 :]) + 12
            bad = naive.bad_bits(level, leaf=leaf, large=large, nxe=nxe)
            entry = {
                "leaf": leaf,
                "large": large,
                "frame": (number + 1) << max(shift, 22),
                "p": draw(LIKELY) or draw(LIKELY),
                "bad": draw(st.sampled_from(bad)) if bad and sabotaged == level else None,
                "c": naive.width == 8 and draw(st.booleans()),
                "nx": draw(UNLIKELY) and (nxe or draw(UNLIKELY)),
                **{key: draw(LIKELY) for key in "wuad"},
                "g": draw(st.booleans()),
            }
            if not naive.add(gva, level, entry) and naive.digits(gva)[: level + 1] not in naive.places:
                break
    control = {"4-level": LONG, "5-level": LONG, "PAE": PAE, "32-bit": LEGACY}[name]
    cr4 = control["cr4"] | (pg.CR4_LA57 if name == "5-level" else 0)
    cr4 |= (pg.CR4_SMEP if smep else 0) | (pg.CR4_SMAP if smap else 0) | (pg.CR4_PGE if pge else 0)
    made = paging_context(
        pg.CR0_PG | (pg.CR0_WP if wp else 0),
        naive.cr3,
        cr4,
        control["efer"] & ~pg.EFER_NXE | (pg.EFER_NXE if nxe else 0),
        c_bit,
        physical_bits,
    )
    for gva in (*gvas, gvas[0] ^ 1 << draw(st.integers(0, 63))):
        access = draw(st.sampled_from((0, W_, F_))) | draw(st.sampled_from((0, U_))) | draw(st.sampled_from((0, AC_)))
        found = walk(made, gva, access, read_entry=lambda gpa, _width: naive.words.get(gpa, 0))
        expected = naive.expect(gva, access, nxe=nxe, wp=wp, smep=smep, smap=smap, pge=pge)
        assert found == expected
        assert type(found) is type(expected)


# Against another implementation: QEMU's software MMU inside Unicorn, 4 levels, 40 physical bits.

CODE, STACK, USER_CODE, TARGET = 0x10_0000, 0x11_0000, 0x12_0000, 0x4000_0000
GDT = struct.pack("<5Q", 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF)
READ_CODE, WRITE_CODE, JUMP_CODE = b"\x8a\x07\xcc", b"\x88\x07\xcc", b"\xff\xe7\xcc"  # each ends in INT3


def unicorn_says(words, access, *, cr0, cr4, efer):
    """The #PF error code that a real instruction with this access gives, None: it went through."""
    uc_module = pytest.importorskip("unicorn")
    x86 = uc_module.x86_const
    uc = uc_module.Uc(uc_module.UC_ARCH_X86, uc_module.UC_MODE_64)
    uc.ctl_set_cpu_model(x86.UC_CPU_X86_EPYC_ROME)
    uc.mem_map(0, 1 << 24)
    for place, word in words.items():
        uc.mem_write(place, word.to_bytes(8, "little"))
    code = JUMP_CODE if access & F_ else WRITE_CODE if access & W_ else READ_CODE
    uc.mem_write(0xA00000, b"\x48\xcf")  # IRETQ
    uc.mem_write(0xA00100, code)
    uc.mem_write(0xA02000, code)
    uc.mem_write(0xA01000, struct.pack("<5Q", USER_CODE, 0x23, 2, 0, 0x1B))
    uc.mem_write(0xA01800, GDT)
    uc.mem_write(0xB00000, b"\xcc" * 4096)
    context_ = uc.context_save()
    image = bytes((ctypes.c_uint8 * context_.size).from_address(ctypes.cast(context_.context, ctypes.c_void_p).value))
    # QEMU's error_code stands 112 bytes before old_exception, which is -1 at the start (unicorn 2.1.4).
    error_at = image.rfind(b"\xff\xff\xff\xff") - 112
    uc.reg_write(x86.UC_X86_REG_CR3, 0x1000)
    uc.reg_write(x86.UC_X86_REG_CR4, cr4)
    uc.reg_write(x86.UC_X86_REG_MSR, (0xC000_0080, efer | 0x1))
    uc.reg_write(x86.UC_X86_REG_CR0, cr0 | 0x11)
    uc.reg_write(x86.UC_X86_REG_GDTR, (0, STACK + 0x800, len(GDT) - 1, 0))
    uc.reg_write(x86.UC_X86_REG_RSP, STACK)
    uc.reg_write(x86.UC_X86_REG_RDI, TARGET)
    uc.reg_write(x86.UC_X86_REG_EFLAGS, 2 | (1 << 18 if access & AC_ else 0))
    seen = []

    def stopped(engine, number, _):
        engine.context_update(context_)
        raw = (ctypes.c_uint8 * context_.size).from_address(ctypes.cast(context_.context, ctypes.c_void_p).value)
        cr2 = engine.reg_read(x86.UC_X86_REG_CR2)
        seen.append((number, int.from_bytes(bytes(raw)[error_at : error_at + 4], "little"), cr2))
        engine.emu_stop()

    uc.hook_add(uc_module.UC_HOOK_INTR, stopped)
    uc.emu_start(CODE if access & U_ else CODE + 0x100, 0xFFFF_FFFF_FFFF_FFF0, count=4)
    number, error, cr2 = seen[0]
    if number == 14:
        assert cr2 == TARGET
        return error
    assert number == 3
    return None


@pytest.mark.parametrize("access", [0, W_, F_, U_, U_ | W_, U_ | F_, AC_, AC_ | W_], ids=str)
def test_unicorns_mmu_agrees(access):
    leaves = [(0, P | W | U), (0, P | W), (0, P | U), (0, P), (0, P | W | U | NX), (0, W | U), (0, P | W | U | 1 << 45)]
    uppers = [(P | W | U, leaves[0][1]), (P | U, leaves[0][1]), (P | W, leaves[0][1]), (P | W | U | NX, leaves[0][1])]
    cases = [(P | W | U, leaf) for _, leaf in leaves] + uppers
    smep_smap = pg.CR4_PAE | pg.CR4_SMEP | pg.CR4_SMAP
    registers = [
        (pg.CR0_PG | pg.CR0_WP, pg.CR4_PAE, LONG["efer"]),
        (pg.CR0_PG, pg.CR4_PAE, LONG["efer"]),
        (pg.CR0_PG | pg.CR0_WP, smep_smap, LONG["efer"]),
        (pg.CR0_PG | pg.CR0_WP, pg.CR4_PAE, pg.EFER_LMA | pg.EFER_LME),
    ]
    for upper, leaf in cases:
        tables = Tables(LONG_LEVELS).map(CODE, 0xA00000, P | W).map(STACK, 0xA01000, P | W)
        tables.map(STACK - 0x1000, 0xA03000, P | W).map(USER_CODE, 0xA02000, P | W | U)
        tables.map(TARGET, 0xB00000, leaf, upper=upper)
        for cr0, cr4, efer in registers:
            made = paging_context(cr0, 0x1000, cr4, efer, 0, 40)
            ours = walk(made, TARGET, access, read_entry=tables.read)
            expected = ours.error_code if isinstance(ours, PageFault) else None
            found = unicorn_says(tables.entries, access, cr0=cr0, cr4=cr4, efer=efer)
            assert found == expected, (hex(upper), hex(leaf), hex(cr0), hex(cr4), hex(efer))


def test_the_documentation_table_names_every_mode():
    table = pg.markdown_table()
    assert all(f"| {mode.name} |" in table for mode in pg.MODES)
    assert "2 MiB, 1024 MiB" in table or "1024 MiB, 2 MiB" in table
