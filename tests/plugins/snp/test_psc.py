"""Page state change: every rule of its progress, both forms, both sides, and a hostile hypervisor."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sevlab.core.events import Done, MemoryRead, MemoryWrite, Party, Space
from sevlab.plugins.sev_es import (
    ForgeMsr,
    ForgeReply,
    Ghcb,
    GhcbReply,
    GuestFailed,
    MsrReply,
    NaeCode,
    Terminated,
    Vmgexit,
)
from sevlab.plugins.snp import psc
from sevlab.plugins.snp.driver import rmp_update
from sevlab.plugins.snp.psc import MAX_ENTRIES, PscEntryValue, PscHeader, PscResult, build_psc, parse_psc
from sevlab.plugins.snp.records import Pvalidate, SetPages
from sevlab.plugins.snp.rmp import state_of
from sevlab.plugins.snp.states import PageState, snp_state

from tests.plugins.snp.support import GHCB_GPA, MIB, PRIVATE_GPA, talking_machine

BASE = 0x20_0000 >> 12
"""A region of 2 MiB that belongs to nobody."""


@pytest.fixture(scope="module")
def shared():
    return talking_machine(memory=8 * MIB)[0]


@pytest.fixture
def machine(shared):
    shared.reset()
    return shared


def request(machine, structure, *, length=None):
    """(SW_EXITINFO2, the structure afterwards) of a page state change with this shared buffer."""
    page = bytearray(
        Ghcb.build(
            sw_exit_code=NaeCode.SNP_PAGE_STATE_CHANGE,
            sw_exit_info_1=0,
            sw_exit_info_2=0,
            sw_scratch=GHCB_GPA + 0x800,
            protocol_version=2,
        )
    )
    page[0x800 : 0x800 + len(structure)] = structure
    reply = machine.apply(Vmgexit(0, GHCB_GPA, bytes(page))).first(GhcbReply)
    assert reply.info_1 == 0
    spa = machine.hypervisor.vms[0].memory_spa + GHCB_GPA
    return reply.info_2, machine.memory.read(spa + 0x800, length or len(structure), None)


def state(machine, gfn):
    return state_of(machine, machine.hypervisor.vms[0].memory_spa + gfn * 4096)


def test_entries_are_done_in_order_and_progress_is_written(machine):
    entries = (PscEntryValue(BASE, 1), PscEntryValue(BASE + 1, 1), PscEntryValue(BASE + 512, 1, large=True))
    result, after = request(machine, build_psc(entries))
    header, done = parse_psc(after)
    assert (result, header.cur_entry, header.end_entry) == (0, 3, 2)
    assert [entry.cur_page for entry in done] == [1, 1, 512]
    assert [entry._replace(cur_page=0) for entry in done] == list(entries)
    assert state(machine, BASE) is state(machine, BASE + 512) is PageState.GUEST_INVALID
    result, _ = request(machine, build_psc((PscEntryValue(BASE, 2), PscEntryValue(BASE + 512, 2, large=True))))
    assert result == 0
    assert state(machine, BASE) is state(machine, BASE + 700) is PageState.HYPERVISOR


@pytest.mark.parametrize(
    ("structure", "result"),
    [
        (PscHeader.build(end_entry=252), PscResult.SUCCESS),
        (PscHeader.build(end_entry=253), PscResult.INVALID_HEADER),
        (PscHeader.build(end_entry=0xFFFF), PscResult.INVALID_HEADER),
        (PscHeader.build(cur_entry=1, end_entry=0), PscResult.SUCCESS),
        (PscHeader.build(cur_entry=0xFFFF, end_entry=252), PscResult.SUCCESS),
        (build_psc((PscEntryValue(BASE + 1, 1, large=True),)), PscResult.INVALID_ENTRY),
        (build_psc((PscEntryValue(BASE, 1, large=True, cur_page=513),)), PscResult.INVALID_ENTRY),
        (build_psc((PscEntryValue(BASE, 1, large=True, cur_page=512),)), PscResult.SUCCESS),
        (build_psc((PscEntryValue(BASE, 1, cur_page=2),)), PscResult.INVALID_ENTRY),
        (build_psc((PscEntryValue(BASE, 1, cur_page=1),)), PscResult.SUCCESS),
        (build_psc((PscEntryValue(BASE, 0),)), PscResult.SUCCESS),
        (build_psc((PscEntryValue(BASE, 5),)), PscResult.SUCCESS),
        (build_psc((PscEntryValue(BASE, 15),)), PscResult.SUCCESS),
        (build_psc((PscEntryValue(1 << 39, 1),)), PscResult.GENERIC),
        (build_psc((PscEntryValue((8 * MIB >> 12) - 1, 1),)), PscResult.SUCCESS),
        (build_psc((PscEntryValue(8 * MIB >> 12, 1),)), PscResult.GENERIC),
    ],
)
def test_headers_and_entries_are_checked(machine, structure, result):
    assert request(machine, structure)[0] == result


def test_the_first_bad_entry_stops_and_is_where_the_guest_finds_it(machine):
    entries = (PscEntryValue(BASE, 1), PscEntryValue(BASE + 3, 1, large=True), PscEntryValue(BASE + 4, 1))
    result, after = request(machine, build_psc(entries))
    assert (result, parse_psc(after)[0].cur_entry) == (PscResult.INVALID_ENTRY, 1)
    assert state(machine, BASE) is PageState.GUEST_INVALID
    assert state(machine, BASE + 4) is PageState.HYPERVISOR


def test_a_large_entry_that_was_begun_goes_on_in_small_pages(machine):
    assert request(machine, build_psc((PscEntryValue(BASE, 1, large=True, cur_page=510),)))[0] == 0
    states = [state(machine, BASE + n) for n in (509, 510, 511)]
    assert states == [PageState.HYPERVISOR, PageState.GUEST_INVALID, PageState.GUEST_INVALID]


def test_one_page_of_a_large_one_becomes_shared(machine):
    assert request(machine, build_psc((PscEntryValue(BASE, 1, large=True),)))[0] == 0
    assert machine.apply(Pvalidate(0, BASE << 12, 1, 1)).records[0].rax == 0
    assert request(machine, build_psc((PscEntryValue(BASE + 9, 2),)))[0] == 0
    assert state(machine, BASE + 9) is PageState.HYPERVISOR
    assert state(machine, BASE) is state(machine, BASE + 10) is PageState.GUEST_VALID


def test_a_page_that_is_private_already_stays_as_it_is(machine):
    machine.access.guest_physical_write(machine.vcpus[0], PRIVATE_GPA, b"mine", c_bit=True)
    assert request(machine, build_psc((PscEntryValue(PRIVATE_GPA >> 12, 1),)))[0] == 0
    assert machine.access.guest_physical_read(machine.vcpus[0], PRIVATE_GPA, 4, c_bit=True) == b"mine"


def test_the_hypervisor_may_stop_in_between_and_the_guest_sends_again():
    machine, _ = talking_machine(options={"snp": {"psc_batch": 2}}, memory=8 * MIB)
    result, after = request(machine, build_psc(tuple(PscEntryValue(BASE + n, 1) for n in range(5))))
    assert (result, parse_psc(after)[0].cur_entry) == (0, 2)
    outcome = machine.apply(SetPages(0, 0x40_0000, 7, 0, True))
    assert Done() in outcome.records
    assert sum(isinstance(record, GhcbReply) for record in outcome.records) == 4


@settings(max_examples=100)
@given(structure=st.binary(min_size=8, max_size=64))
def test_any_structure_is_answered(shared, structure):
    shared.reset()
    assert request(shared, structure)[0] in set(PscResult)


RUNS = st.lists(
    st.tuples(
        st.integers(0, 5),
        st.integers(1, 8),
        st.sampled_from((0, 1, 3, 130, 511)),
        st.sampled_from((1, 2, 3)),
        st.booleans(),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(first=RUNS, second=RUNS, frozen=st.integers(0, 12))
def test_many_pages_end_as_if_each_was_alone(shared, first, second, frozen):
    """Pages in a row, apart, repeated or beyond memory: table, counters and structure are as after one for each."""
    ends = []
    for quick in (True, False):
        shared.reset()
        spa = shared.hypervisor.vms[0].memory_spa + ((BASE + 506 + frozen) << 12)
        if frozen:
            rmp_update(shared, spa, assigned=1, immutable=1)
        answers = []
        with pytest.MonkeyPatch.context() as patch:
            if not quick:
                patch.setattr(psc, "change_pages_at_once", lambda *_arguments, **_keywords: False)
            for runs in (first, second):
                entries = []
                for start, length, stride, operation, large in runs:
                    gfn = BASE if large else BASE + 506 + start
                    entries += [
                        PscEntryValue(gfn + n * (512 if large else stride), operation, large) for n in range(length)
                    ]
                answers.append(request(shared, build_psc(tuple(entries))))
        table = snp_state(shared).rmp_base
        length = 0x4000 + 16 * 0x4000
        ends.append((answers, shared.memory.read(table, length, None), shared.memory.tags(table, length)))
    assert ends[0] == ends[1]


# The MSR form ---------------------------------------------------------------------------------------------------------


def msr(machine, value):
    return machine.apply(Vmgexit(0, value, b"")).first(MsrReply).value


def test_the_msr_form_changes_one_page(machine):
    assert msr(machine, 1 << 52 | BASE << 12 | 0x14) == 0x15
    assert state(machine, BASE) is PageState.GUEST_INVALID
    assert msr(machine, 2 << 52 | BASE << 12 | 0x14) == 0x15
    assert state(machine, BASE) is PageState.HYPERVISOR


@pytest.mark.parametrize("operation", [0, 3, 4, 5, 15])
def test_the_msr_form_knows_two_operations(machine, operation):
    assert msr(machine, operation << 52 | BASE << 12 | 0x14) == 1 << 63 | 0x15
    assert state(machine, BASE) is PageState.HYPERVISOR


@pytest.mark.parametrize("value", [1 << 56 | 1 << 52 | BASE << 12 | 0x14, 1 << 52 | (1 << 39) << 12 | 0x14], ids=hex)
def test_reserved_bits_and_pages_that_are_not_there(machine, value):
    assert msr(machine, value) == 1 << 63 | 0x15


# The guest's side -----------------------------------------------------------------------------------------------------


def test_sharing_lets_both_sides_see_and_making_private_does_not(machine):
    gpa = PRIVATE_GPA
    assert Done() in machine.apply(SetPages(0, gpa, 1, 0, False)).records
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, gpa, False, b"hello"))
    spa = machine.hypervisor.vms[0].memory_spa + gpa
    assert machine.apply(MemoryRead(Party.HYPERVISOR, 0, Space.SPA, spa, False, 5)).records[0].data == b"hello"
    assert Done() in machine.apply(SetPages(0, gpa, 1, 0, True)).records
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, gpa, True, b"secret"))
    assert machine.apply(MemoryRead(Party.HYPERVISOR, 0, Space.SPA, spa, False, 6)).records[0].data != b"secret"


def test_large_pages_fall_back_to_small_ones(machine):
    assert Done() in machine.apply(SetPages(0, 0x20_0000, 1, 1, True)).records
    machine.reset()
    machine.apply(Vmgexit(0, 1 << 52 | (BASE + 5) << 12 | 0x14, b""))  # one part is private already
    machine.vcpus[0].vmcb.ghcb_gpa = GHCB_GPA
    assert Done() in machine.apply(SetPages(0, 0x20_0000, 1, 1, True)).records
    assert state(machine, BASE + 511) is PageState.GUEST_VALID


def test_253_pages_and_more_take_several_requests(machine):
    outcome = machine.apply(SetPages(0, 0x20_0000, MAX_ENTRIES + 1, 0, True))
    assert Done() in outcome.records
    assert sum(isinstance(record, GhcbReply) for record in outcome.records) == 2


LIES = {
    "another end": (0x802, b"\x07\x00"),
    "a reserved word": (0x804, b"\x01"),
    "too far": (0x800, b"\x09\x00"),
    "another page": (0x809, b"\x55"),
    "an error": (0x3A0, b"\x00\x00\x00\x00\x01"),
    "a malformed event": (0x398, b"\x02"),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
@pytest.mark.parametrize("private", [True, False])
def test_a_hypervisor_that_lies_in_the_structure_ends_the_guest(machine, lie, private):
    gpa = 0x40_0000 if private else PRIVATE_GPA
    machine.apply(ForgeReply(0, *lie))
    outcome = machine.apply(SetPages(0, gpa, 2, 0, private))
    assert outcome.first(GuestFailed) or outcome.first(Terminated)
    ended = outcome.first(Terminated)
    assert (ended.reason_set, ended.reason_code) == (1, 1)
    assert machine.hypervisor.vms[0].stopped


def test_a_page_that_was_valid_already_is_an_attack(machine):
    """PVALIDATE with CF: the hypervisor remapped a page that the guest had validated before."""
    outcome = machine.apply(SetPages(0, PRIVATE_GPA, 1, 0, True))
    assert "CF 1" in outcome.first(GuestFailed).reason
    assert (outcome.first(Terminated).reason_set, outcome.first(Terminated).reason_code) == (1, 2)


def test_a_false_msr_response_ends_the_guest_before_it_has_a_ghcb():
    machine, _ = talking_machine(memory=8 * MIB)
    machine.components["sev_es.guest"].vcpus.clear()
    assert Done() in machine.apply(SetPages(0, 0x40_0000, 2, 0, True)).records
    for value in (1 << 63 | 0x15, 0x15 | 1 << 12, 0x14):
        machine.reset()
        machine.components["sev_es.guest"].vcpus.clear()
        machine.apply(ForgeMsr(0, value))
        outcome = machine.apply(SetPages(0, 0x40_0000, 1, 0, True))
        assert (outcome.first(Terminated).reason_set, outcome.first(Terminated).reason_code) == (1, 1)
