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
    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.pages = 0
        self.tables = NestedTables(self.allocate, self.read, self.words.__setitem__, c_bit_mask=C51)

    def allocate(self):
        self.pages += 1
        return self.pages << 12

    def read(self, spa):
        return self.words.get(spa, 0)

    def walk(self, gpa, access=0, phase=NpfError.FINAL):
        return nested_walk(self.tables.root_spa, gpa, access, read_entry=self.read, phase=phase, c_bit_mask=C51)


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
