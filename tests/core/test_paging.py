from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core import paging as pg
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


def test_the_documentation_table_names_every_mode():
    table = pg.markdown_table()
    assert all(f"| {mode.name} |" in table for mode in pg.MODES)
    assert "2 MiB, 1024 MiB" in table or "1024 MiB, 2 MiB" in table
