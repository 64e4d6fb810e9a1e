"""Every page state with every event: what the document's matrix says, done by the real instruction or firmware step."""

from __future__ import annotations

import pytest
from sevlab.core.testing import assert_changes_nothing
from sevlab.plugins.snp.layout import PERM_ALL, RmpState
from sevlab.plugins.snp.records import Psmash, Pvalidate, RmpAdjust, RmpUpdate
from sevlab.plugins.snp.rmp import change_state, fill_region, read_entry, state_of, write_entry
from sevlab.plugins.snp.states import PAGE_STATES, STATE_BITS, PageEvent, PageState

from tests.plugins.snp.support import rmp_machine

ASID = 1
GPA = 0x20_0000
H, X, R, F, C, M, PG, PS, GI, GV = (state for state in PageState if state is not PageState.DEFAULT)

# Typed from the transition matrix of 56860 and from the published firmware; - is refused.
EXPECTED = {
    #                                  H   X  R   F   C  M  PG  PS  GI  GV
    PageEvent.RMPUPDATE_HYPERVISOR: (H, 0, H, 0, 0, 0, 0, 0, H, H),
    PageEvent.RMPUPDATE_RECLAIM: (R, 0, R, 0, 0, 0, 0, 0, R, R),
    PageEvent.RMPUPDATE_FIRMWARE: (F, 0, F, 0, 0, 0, 0, 0, F, F),
    PageEvent.RMPUPDATE_GUEST: (GI, 0, GI, 0, 0, 0, 0, 0, GI, GV),
    PageEvent.RMPUPDATE_PRE_GUEST: (PG, 0, PG, 0, 0, 0, 0, 0, PG, PS),
    PageEvent.PVALIDATE: (0, 0, 0, 0, 0, 0, 0, 0, GV, GV),
    PageEvent.PVALIDATE_RESCIND: (0, 0, 0, 0, 0, 0, 0, 0, GI, GI),
    PageEvent.RMPADJUST: (0, 0, 0, 0, 0, 0, 0, 0, 0, GV),
    PageEvent.PSMASH: (0, 0, 0, 0, 0, 0, 0, 0, GI, GV),
    PageEvent.GCTX_CREATE: (0, 0, 0, C, 0, 0, 0, 0, 0, 0),
    PageEvent.DECOMMISSION: (0, 0, 0, 0, F, 0, 0, 0, 0, 0),
    PageEvent.MD_INIT: (0, 0, 0, M, 0, 0, 0, 0, 0, 0),
    PageEvent.LAUNCH_UPDATE: (0, 0, 0, 0, 0, 0, GV, 0, 0, 0),
    PageEvent.SWAP_OUT_SOURCE: (0, 0, 0, 0, 0, 0, PG, PG, 0, 0),
    PageEvent.SWAP_OUT_METADATA_SOURCE: (0, 0, 0, 0, 0, F, 0, 0, 0, 0),
    PageEvent.SWAP_IN_DESTINATION: (0, 0, 0, 0, 0, 0, PG, 0, 0, 0),
    PageEvent.SWAP_IN_VALIDATED_DESTINATION: (0, 0, 0, 0, 0, 0, PS, 0, 0, 0),
    PageEvent.SWAP_IN_METADATA_DESTINATION: (0, 0, 0, M, 0, 0, 0, 0, 0, 0),
    PageEvent.MOVE_INVALID_DESTINATION: (0, 0, 0, 0, 0, 0, GI, 0, 0, 0),
    PageEvent.MOVE_VALID_DESTINATION: (0, 0, 0, 0, 0, 0, GV, 0, 0, 0),
    PageEvent.MOVE_METADATA_DESTINATION: (0, 0, 0, M, 0, 0, 0, 0, 0, 0),
    PageEvent.MOVE_SOURCE: (0, 0, 0, 0, 0, F, GI, GI, 0, 0),
    PageEvent.RECLAIM: (H, 0, R, R, 0, R, GI, GV, GI, GV),
    PageEvent.UNSMASH: (0, 0, 0, 0, 0, 0, PG, PS, 0, 0),
    PageEvent.SET_STATE: (0, 0, 0, X, 0, 0, 0, 0, 0, 0),
    PageEvent.COMMAND_DONE: (0, 0, 0, R, 0, 0, 0, 0, 0, 0),
}
COLUMNS = (H, X, R, F, C, M, PG, PS, GI, GV)
PAIRS = [(state, event) for event in PageEvent for state in PageState]


def expected(state, event):
    if state is PageState.DEFAULT:
        return None
    target = EXPECTED[event][COLUMNS.index(state)]
    return target if isinstance(target, PageState) else None


@pytest.mark.parametrize(("state", "event"), PAIRS, ids=lambda member: member.name)
def test_the_table_is_the_document_s(state, event):
    assert PAGE_STATES.next(state, event) is expected(state, event)


UPDATES = {
    PageEvent.RMPUPDATE_HYPERVISOR: {},
    PageEvent.RMPUPDATE_RECLAIM: {"assigned": 1},
    PageEvent.RMPUPDATE_FIRMWARE: {"assigned": 1, "immutable": 1},
    PageEvent.RMPUPDATE_GUEST: {"assigned": 1, "asid": ASID, "gpa": GPA},
    PageEvent.RMPUPDATE_PRE_GUEST: {"assigned": 1, "asid": ASID, "gpa": GPA, "immutable": 1},
}


def step_of(event, spa, *, large):
    if event in UPDATES:
        gpa = {} if not large else {"page_size": 1}
        return RmpUpdate(spa, RmpState.build(**UPDATES[event], **gpa))
    return {
        PageEvent.PVALIDATE: Pvalidate(0, GPA, int(large), 1),
        PageEvent.PVALIDATE_RESCIND: Pvalidate(0, GPA, int(large), 0),
        PageEvent.RMPADJUST: RmpAdjust(0, GPA, int(large), 1 | PERM_ALL << 8),
        PageEvent.PSMASH: Psmash(spa),
    }.get(event)


@pytest.fixture(scope="module")
def machine():
    return rmp_machine(memory_bytes=32 << 20)


def put(machine, spa, state, *, large):
    """Force the page into `state`."""
    low = STATE_BITS[state]
    if state in (PG, PS, GI, GV):
        low |= ASID << 51 | GPA
    if state is M:
        low |= 0x5000
    if large and low & 1:
        fill_region(machine, spa, low | 2, PERM_ALL)
    else:
        write_entry(machine, spa, low, PERM_ALL)


@pytest.mark.parametrize("large", [False, True], ids=["4K", "2M"])
def test_every_pair_of_state_and_event(machine, large):
    spa = machine.hypervisor.vms[0].memory_spa + GPA
    for state, event in PAIRS:
        if state is PageState.DEFAULT or (large and state in (H, X, C, M)):
            continue
        machine.reset()
        put(machine, spa, state, large=large)
        if not large:  # the nested mapping has the page's size
            machine.access.nested_tables(machine.hypervisor.vms[0]).map(GPA, spa, 4096)
            machine.access.forget()
        target = expected(state, event)
        if event is PageEvent.PSMASH and not large:
            target = None
        step = step_of(event, spa, large=large)
        before = machine.snapshot()
        if step is not None:
            machine.apply(step)
            if target is None:  # an exit changes the VMCB, but neither the table nor any page
                assert machine.snapshot().memory == before.memory, (state.name, event.name)
        else:
            assert change_state(machine, spa, event, context_spa=0x7000) is (target is not None)
            if target is None:
                assert machine.snapshot() == before
        assert state_of(machine, spa) is (state if target is None else target), (state.name, event.name)
        entry = read_entry(machine, spa)
        if target in (PG, PS, GI, GV):
            assert (entry.asid, entry.gpa, entry.permissions(0)) == (ASID, GPA, PERM_ALL), (state.name, event.name)


def test_a_page_beyond_the_table_is_default_and_nobody_s(machine):
    machine.reset()
    spa = 1 << 40
    assert state_of(machine, spa) is PageState.DEFAULT
    for event in PageEvent:
        assert not change_state(machine, spa, event)
    outcome = assert_changes_nothing(machine, step_of(PageEvent.RMPUPDATE_GUEST, spa, large=False))
    assert outcome.records[0].rax == 1


def test_no_state_is_out_of_reach():
    assert set(PAGE_STATES.unreachable()) == {PageState.HV_FIXED, PageState.DEFAULT} - {PageState.HV_FIXED}
