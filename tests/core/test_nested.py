from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.errors import ConfigError
from sevlab.core.nested import NestedFault, NestedTables, NestedTranslation, nested_walk
from sevlab.core.paging import WalkAccess
from sevlab.core.svm import NpfError

KIB4, MIB2, GIB1 = 1 << 12, 1 << 21, 1 << 30
C51 = 1 << 51


class Entries:
    def __init__(self, levels=4) -> None:
        self.levels = levels
        self.words: dict[int, int] = {}
        self.pages = 0
        self.tables = NestedTables(self.allocate, self.read, self.words.__setitem__, c_bit_mask=C51, levels=levels)

    def allocate(self):
        self.pages += 1
        return self.pages << 12

    def read(self, spa):
        return self.words.get(spa, 0)

    def walk(self, gpa, access=0, phase=NpfError.FINAL):
        return nested_walk(
            self.tables.root_spa, gpa, access, read_entry=self.read, phase=phase, c_bit_mask=C51, levels=self.levels
        )


@pytest.fixture
def npt():
    return Entries()


@pytest.mark.parametrize("page", [KIB4, MIB2, GIB1])
def test_a_page_of_each_size_translates(npt, page):
    npt.tables.map(page, 5 * page, page)
    assert npt.walk(page + 0x123) == NestedTranslation(5 * page + 0x123, page, True, False, False)


def test_a_hole_is_not_present_and_says_which_walk(npt):
    assert npt.walk(0x5000) == NestedFault(NpfError.U | NpfError.FINAL, 0x5000)
    found = npt.walk(0x5000, WalkAccess.WRITE, NpfError.TABLE_WALK)
    assert found == NestedFault(NpfError.U | NpfError.W | NpfError.TABLE_WALK, 0x5000)


def test_a_write_to_a_read_only_page_is_a_protection_fault(npt):
    npt.tables.map(0x5000, 0x9000, KIB4, writable=False)
    assert isinstance(npt.walk(0x5000), NestedTranslation)
    assert npt.walk(0x5000, WalkAccess.WRITE) == NestedFault(
        NpfError.P | NpfError.W | NpfError.U | NpfError.FINAL, 0x5000
    )


def test_a_fetch_from_a_no_execute_page_faults(npt):
    npt.tables.map(0x5000, 0x9000, KIB4, no_execute=True)
    assert npt.walk(0x5000, WalkAccess.FETCH) == NestedFault(
        NpfError.P | NpfError.U | NpfError.ID | NpfError.FINAL, 0x5000
    )


def test_a_supervisor_page_is_denied_since_every_nested_access_is_user(npt):
    npt.tables.map(0x5000, 0x9000, KIB4, user=False)
    assert npt.walk(0x5000) == NestedFault(NpfError.P | NpfError.U | NpfError.FINAL, 0x5000)


def test_the_hosts_c_bit_is_reported_and_stripped(npt):
    npt.tables.map(0x5000, 0x9000, KIB4, c_bit=True)
    assert npt.walk(0x5000) == NestedTranslation(0x9000, KIB4, True, False, True)


@pytest.mark.parametrize("access", [0, WalkAccess.WRITE, WalkAccess.FETCH])
@pytest.mark.parametrize("c_bit", [False, True])
def test_the_hosts_c_bit_is_that_of_the_leaf_for_a_fetch_too(npt, access, c_bit):
    npt.tables.map(0x5000, 0x9000, KIB4, c_bit=c_bit)
    assert npt.walk(0x5000, access).host_c_bit is c_bit


def test_unmapping_removes_only_its_page(npt):
    npt.tables.map(0, GIB1, GIB1)
    npt.tables.unmap(0x5000, KIB4)
    assert isinstance(npt.walk(0x5000), NestedFault)
    assert npt.walk(0x4FFF).spa == GIB1 + 0x4FFF
    assert npt.walk(0x6000).spa == GIB1 + 0x6000
    assert npt.walk(MIB2) == NestedTranslation(GIB1 + MIB2, MIB2, True, False, False)


def test_unmapping_a_hole_allocates_nothing(npt):
    npt.tables.unmap(0x5000, KIB4)
    assert npt.pages == 1


def test_a_split_keeps_attributes(npt):
    npt.tables.map(0, MIB2, MIB2, writable=False, no_execute=True, c_bit=True)
    npt.tables.map(0x3000, 0x7000, KIB4)
    assert npt.walk(0x4000) == NestedTranslation(MIB2 + 0x4000, KIB4, False, True, True)
    assert npt.walk(0x3000) == NestedTranslation(0x7000, KIB4, True, False, False)


@pytest.mark.parametrize(("gpa", "mapped"), [((1 << 48) - KIB4, True), (1 << 47, True), (1 << 48, False)])
def test_guest_physical_addresses_have_48_bits(npt, gpa, mapped):
    if mapped:
        npt.tables.map(gpa, 0x9000, KIB4)
        assert npt.walk(gpa).spa == 0x9000
    else:
        assert isinstance(npt.walk(gpa), NestedFault)
        with pytest.raises(ConfigError, match="below 2"):
            npt.tables.map(gpa, 0x9000, KIB4)


@pytest.mark.parametrize(("gpa", "page"), [(0x1000, MIB2), (0x800, KIB4), (0, 0x2000)])
def test_an_impossible_mapping_is_refused(npt, gpa, page):
    with pytest.raises(ConfigError):
        npt.tables.map(gpa, 0, page)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from((KIB4, MIB2)), st.booleans(), st.booleans()), max_size=8))
def test_mapping_agrees_with_a_dictionary_of_small_pages(edits):
    npt = Entries()
    expected: dict[int, tuple[int, bool]] = {}
    for number, (place, page, writable, mapped) in enumerate(edits):
        gpa = place * (MIB2 if page == MIB2 else KIB4)
        spa = GIB1 + number * MIB2
        for offset in range(0, page, KIB4):
            expected.pop(gpa + offset, None)
            if mapped:
                expected[gpa + offset] = (spa + offset, writable)
        if mapped:
            npt.tables.map(gpa, spa, page, writable=writable)
        else:
            npt.tables.unmap(gpa, page)
    for gpa in (*range(0, 5 * KIB4, KIB4), MIB2, MIB2 + KIB4, 3 * MIB2):
        found = npt.walk(gpa)
        if gpa in expected:
            assert (found.spa, found.writable) == expected[gpa]
        else:
            assert isinstance(found, NestedFault)


@pytest.mark.parametrize(
    ("gpa", "spa", "page"),
    [(0, 0, 1 << 39), (0, 0, 0), (0x1000, 0x1800, KIB4), (0, MIB2 + KIB4, MIB2), (0, 1 << 48, KIB4), (-KIB4, 0, KIB4)],
)
def test_a_refused_mapping_changes_nothing(npt, gpa, spa, page):
    npt.tables.map(0, GIB1, GIB1)
    before = dict(npt.words), npt.pages
    with pytest.raises(ConfigError):
        npt.tables.map(gpa, spa, page)
    assert (npt.words, npt.pages) == before


def test_the_last_page_of_memory_can_be_mapped(npt):
    npt.tables.map(0x1000, (1 << 48) - KIB4, KIB4)
    assert npt.walk(0x1000).spa == (1 << 48) - KIB4


def test_tables_without_a_c_bit_refuse_to_set_one():
    words: dict[int, int] = {}
    tables = NestedTables(lambda: 0x1000, lambda spa: words.get(spa, 0), words.__setitem__)
    for call in (lambda: tables.map(0, 0, KIB4, c_bit=True), lambda: tables.protect(0, KIB4, c_bit=True)):
        with pytest.raises(ConfigError, match="without a C-bit"):
            call()


@pytest.mark.parametrize("bit", [48, 50])
def test_address_bits_from_48_on_are_reserved_except_the_c_bit(npt, bit):
    npt.tables.map(0x5000, 0x9000, KIB4)
    place = max(npt.words)
    npt.words[place] |= C51
    assert npt.walk(0x5000).host_c_bit
    npt.words[place] |= 1 << bit
    assert npt.walk(0x5000, WalkAccess.WRITE) == NestedFault(
        NpfError.P | NpfError.W | NpfError.U | NpfError.RSVD | NpfError.FINAL, 0x5000
    )


def test_error_codes_are_plain_numbers(npt):
    for gpa in (0x5000, 1 << 48):
        assert type(npt.walk(gpa, WalkAccess.WRITE).error_code) is int


@pytest.mark.parametrize(("levels", "good"), [(3, False), (4, True), (5, True), (6, False)])
def test_tables_have_4_or_5_levels(levels, good):
    if good:
        Entries(levels)
    else:
        with pytest.raises(ConfigError, match="4 or 5"):
            Entries(levels)


@pytest.mark.parametrize("page", [KIB4, MIB2, GIB1])
def test_five_levels_translate_each_size_up_to_52_bits(page):
    npt = Entries(5)
    for gpa in (0, 1 << 47, 1 << 48, (1 << 52) - page):
        npt.tables.map(gpa, 7 * page, page)
        assert npt.walk(gpa + 0x123) == NestedTranslation(7 * page + 0x123, page, True, False, False)
    assert npt.walk(1 << 52) == NestedFault(NpfError.U | NpfError.FINAL, 1 << 52)
    with pytest.raises(ConfigError, match="below 2"):
        npt.tables.map(1 << 52, 0, page)


def test_protecting_a_small_page_splits_the_large_one_around_it(npt):
    npt.tables.map(0, MIB2, MIB2)
    npt.tables.protect(0x3000, KIB4, writable=False)
    assert npt.walk(0x3000) == NestedTranslation(MIB2 + 0x3000, KIB4, False, False, False)
    assert npt.walk(0x4000) == NestedTranslation(MIB2 + 0x4000, KIB4, True, False, False)


def test_protecting_a_large_page_changes_every_small_one_in_it_and_fills_no_hole(npt):
    npt.tables.map(0x3000, 0x7000, KIB4)
    npt.tables.map(0x5000, 0x9000, KIB4, writable=False)
    npt.tables.protect(0, GIB1, no_execute=True, c_bit=True)
    assert npt.walk(0x3000) == NestedTranslation(0x7000, KIB4, True, True, True)
    assert npt.walk(0x5000) == NestedTranslation(0x9000, KIB4, False, True, True)
    assert isinstance(npt.walk(0x4000), NestedFault)


def test_protecting_a_hole_allocates_nothing(npt):
    npt.tables.protect(0x3000, KIB4, writable=False)
    assert npt.pages == 1
    assert not npt.words


def test_an_attribute_that_is_not_named_stays(npt):
    npt.tables.map(0x3000, 0x7000, KIB4, writable=False, no_execute=True, c_bit=True)
    npt.tables.protect(0x3000, KIB4)
    assert npt.walk(0x3000) == NestedTranslation(0x7000, KIB4, False, True, True)
    npt.tables.protect(0x3000, KIB4, writable=True, no_execute=False, c_bit=False)
    assert npt.walk(0x3000) == NestedTranslation(0x7000, KIB4, True, False, False)
    npt.tables.protect(0x3000, KIB4, user=False)
    assert isinstance(npt.walk(0x3000), NestedFault)


EDIT = st.tuples(
    st.sampled_from(("map", "unmap", "protect")),
    st.sampled_from((KIB4, MIB2, GIB1)),
    st.integers(0, 3),
    st.tuples(*[st.booleans()] * 4),
    st.tuples(*[st.sampled_from((None, False, True))] * 4),
)
NAMES = ("writable", "user", "no_execute", "c_bit")


@given(st.sampled_from((4, 5)), st.lists(EDIT, max_size=8), st.sampled_from((0, 1 << 46)), st.data())
def test_edits_of_every_size_agree_with_replaying_them_for_one_address(levels, edits, base, data):
    npt = Entries(levels)
    for number, (what, page, place, given_, changed) in enumerate(edits):
        gpa = base + place * page
        if what == "map":
            npt.tables.map(gpa, (number + 1) * GIB1, page, **dict(zip(NAMES, given_, strict=True)))
        elif what == "unmap":
            npt.tables.unmap(gpa, page)
        else:
            npt.tables.protect(gpa, page, **dict(zip(NAMES, changed, strict=True)))
    starts = [base + place * page for _, page, place, _, _ in edits] or [base]
    gpa = data.draw(st.sampled_from(starts)) + data.draw(st.sampled_from((0, 0xFFF, KIB4, MIB2 - 1, MIB2, GIB1 - 1)))
    access = data.draw(st.sampled_from((0, WalkAccess.WRITE, WalkAccess.FETCH)))
    phase = data.draw(st.sampled_from((NpfError.FINAL, NpfError.TABLE_WALK)))
    leads = None
    for number, (what, page, place, given_, changed) in enumerate(edits):
        offset = gpa - (base + place * page)
        if not 0 <= offset < page:
            continue
        if what == "map":
            leads = ((number + 1) * GIB1 + offset, *given_)
        elif what == "unmap":
            leads = None
        elif leads is not None:
            kept = [old if new is None else new for old, new in zip(leads[1:], changed, strict=True)]
            leads = (leads[0], *kept)
    found = npt.walk(gpa, access, phase)
    error = int(access) | 4 | int(phase)
    if leads is None:
        assert found == NestedFault(error, gpa)
        return
    spa, writable, user, no_execute, c_bit = leads
    if not user or (access == WalkAccess.WRITE and not writable) or (access == WalkAccess.FETCH and no_execute):
        assert found == NestedFault(error | 1, gpa)
    else:
        assert (found.spa, found.writable, found.no_execute, found.host_c_bit) == (spa, writable, no_execute, c_bit)


@pytest.mark.parametrize("access", [0, WalkAccess.WRITE, WalkAccess.FETCH])
@pytest.mark.parametrize("c_bit", [1 << 47, 1 << 51])
def test_a_page_marked_as_mmio_faults_with_the_reserved_bit(access, c_bit):
    words, pages = {}, iter(range(0x1000, 1 << 30, 0x1000))
    tables = NestedTables(lambda: next(pages), lambda spa: words.get(spa, 0), words.__setitem__, c_bit_mask=c_bit)
    tables.map(0, 0x4000_0000, MIB2)
    tables.mark_mmio(0x5000)

    def walk(gpa):
        return nested_walk(
            tables.root_spa,
            gpa,
            access,
            read_entry=lambda spa: words.get(spa, 0),
            phase=NpfError.FINAL,
            c_bit_mask=c_bit,
        )

    assert walk(0x5123) == NestedFault(int(access) | 4 | NpfError.P | NpfError.RSVD | NpfError.FINAL, 0x5123)
    assert walk(0x4FFF).spa == 0x4000_4FFF
    tables.map(0x5000, 0x9000, KIB4)
    assert walk(0x5123).spa == 0x9123
