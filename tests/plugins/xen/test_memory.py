"""memory_op: reservations, mapping, and what may not be done."""

from __future__ import annotations

import pytest
from sevlab.plugins.xen import Errno, Memop, Nr, xen
from sevlab.plugins.xen.arguments import AddToPhysmap, AddToPhysmapBatch, E820Entry, MemoryExchange, MemoryReservation
from sevlab.plugins.xen.domains import SLACK_PAGES
from sevlab.plugins.xen.frames import frame_spa
from sevlab.plugins.xen.numbers import Domid, MapSpace

from tests.plugins.xen.world import BOUNCE, INFO, PAGE, call, guest_of, machine_of

PAGES = (16 << 20) // 4096


@pytest.fixture
def machine():
    return machine_of()


def op(guest, command, **fields):
    return guest.invoke(Nr.MEMORY_OP, command, **fields)


def reserve(guest, command, *frames, order=0, domid=Domid.SELF, extents=None):
    guest.write(PAGE, b"".join(frame.to_bytes(8, "little") for frame in frames))
    extents = len(frames) if extents is None else extents
    guest.write(BOUNCE, MemoryReservation.build(extent_start=PAGE, nr_extents=extents, extent_order=order, domid=domid))
    return guest.call(Nr.MEMORY_OP, command, BOUNCE)


def question(guest, command):
    guest.write(BOUNCE, Domid.SELF.to_bytes(2, "little"))
    return guest.call(Nr.MEMORY_OP, command, BOUNCE)


def test_pages_go_away_and_come_back_empty(machine):
    guest = guest_of(machine)
    guest.write(0x400000, b"data")
    assert question(guest, Memop.CURRENT_RESERVATION) == PAGES
    assert reserve(guest, Memop.DECREASE_RESERVATION, 0x400, 0x401) == 2
    assert question(guest, Memop.CURRENT_RESERVATION) == PAGES - 2
    assert frame_spa(machine, xen(machine).domains[1], 0x400) is None
    assert reserve(guest, Memop.DECREASE_RESERVATION, 0x400) == 0
    assert reserve(guest, Memop.POPULATE_PHYSMAP, 0x400, 0x8000) == 2
    assert guest.read(0x400000, 4) == bytes(4)
    guest.write(0x8000000, b"new")
    assert guest.read(0x8000000, 3) == b"new"


def test_a_page_that_a_domain_gave_back_shows_nothing_of_it(machine):
    one, two = guest_of(machine, 0), guest_of(machine, 1)
    one.write(0x400000, b"secret of one")
    reserve(one, Memop.DECREASE_RESERVATION, 0x400)
    assert reserve(two, Memop.POPULATE_PHYSMAP, 0x8000) == 1
    assert two.read(0x8000000, 4096) == bytes(4096)


def test_large_extents_and_the_limits(machine):
    guest = guest_of(machine)
    assert reserve(guest, Memop.POPULATE_PHYSMAP, 0x8000, order=3) == 1
    assert reserve(guest, Memop.POPULATE_PHYSMAP, 0x9000, order=10) == 0
    assert reserve(guest, Memop.DECREASE_RESERVATION, 0x8000, order=3) == 1
    assert reserve(guest, Memop.INCREASE_RESERVATION, *range(300)) == SLACK_PAGES
    assert question(guest, Memop.CURRENT_RESERVATION) == question(guest, Memop.MAXIMUM_RESERVATION)
    assert reserve(guest, Memop.POPULATE_PHYSMAP, 0xA000) == 0


def test_refused_reservations_return_how_many_were_done(machine):
    guest = guest_of(machine)
    assert reserve(guest, Memop.DECREASE_RESERVATION, 0x400, domid=2) == 0
    assert reserve(guest, Memop.DECREASE_RESERVATION, 0x400, domid=99) == 0
    assert reserve(guest, Memop.DECREASE_RESERVATION, 0x400, extents=1 << 26) == 0
    assert reserve(guest, Memop.DECREASE_RESERVATION, 0x400, 1 << 60, 0x401) == 1
    assert call(machine, Nr.MEMORY_OP, Memop.DECREASE_RESERVATION | 5 << 6, 1 << 60) == 5
    assert question(guest, Memop.CURRENT_RESERVATION) == PAGES - 1


def test_questions(machine):
    guest = guest_of(machine)
    assert question(guest, Memop.MAXIMUM_RAM_PAGE) == machine.memory.size_bytes // 4096
    assert question(guest, Memop.MAXIMUM_GPFN) == PAGES - 1
    assert question(guest, Memop.MAXIMUM_GPFN | 1 << 6) == -Errno.EINVAL
    guest.write(BOUNCE, (2).to_bytes(2, "little"))
    assert guest.call(Nr.MEMORY_OP, Memop.CURRENT_RESERVATION, BOUNCE) == -Errno.EPERM
    guest.write(BOUNCE, (9).to_bytes(2, "little"))
    assert guest.call(Nr.MEMORY_OP, Memop.CURRENT_RESERVATION, BOUNCE) == -Errno.ESRCH


def test_shared_info_is_mapped_in_the_place_of_a_page_and_moves(machine):
    guest = guest_of(machine)
    domain = xen(machine).domains[1]
    assert guest.map_page(MapSpace.SHARED_INFO, 0, INFO) == 0
    assert domain.pages == PAGES - 1
    assert guest.map_page(MapSpace.SHARED_INFO, 0, INFO) == 0
    assert guest.map_page(MapSpace.SHARED_INFO, 0, INFO + 0x1000) == 0
    assert frame_spa(machine, domain, INFO >> 12) is None
    assert list(domain.special) == [INFO + 0x1000 >> 12]
    assert domain.pages == PAGES - 2


@pytest.mark.parametrize(
    ("fields", "result"),
    [
        ({"space": MapSpace.SHARED_INFO, "idx": 1}, -Errno.EINVAL),
        ({"space": MapSpace.GRANT_TABLE, "idx": 63}, 0),
        ({"space": MapSpace.GRANT_TABLE, "idx": 64}, -Errno.EINVAL),
        ({"space": MapSpace.GRANT_TABLE, "idx": 1 << 31}, -Errno.EINVAL),
        ({"space": MapSpace.GMFN, "idx": 1 << 40}, -Errno.EACCES),
        ({"space": MapSpace.GMFN_FOREIGN}, -Errno.ENOSYS),
        ({"space": MapSpace.DEV_MMIO}, -Errno.EACCES),
        ({"space": 6}, -Errno.EINVAL),
        ({"domid": 2}, -Errno.EPERM),
        ({"domid": 99}, -Errno.ESRCH),
        ({"gpfn": (1 << 64) - 1}, -Errno.EINVAL),
        ({"gpfn": 1 << 40}, -Errno.EINVAL),
    ],
)
def test_what_may_be_mapped(machine, fields, result):
    guest = guest_of(machine)
    guest.write(BOUNCE, AddToPhysmap.build(**({"domid": Domid.SELF, "gpfn": 0x400} | fields)))
    before = machine.snapshot()
    assert guest.call(Nr.MEMORY_OP, Memop.ADD_TO_PHYSMAP, BOUNCE) == result
    if result:
        after = machine.snapshot()
        assert after.memory == before.memory
        assert xen(machine).domains[1].pages == PAGES


def test_a_frame_moves_with_its_content(machine):
    guest = guest_of(machine)
    guest.write(0x400000, b"moved")
    assert guest.map_page(MapSpace.GMFN, 0x400, 0x8000000) == 0
    assert guest.read(0x8000000, 5) == b"moved"
    assert guest.read(0x400000, 5) == b""


@pytest.mark.parametrize("target", [0x402, 0x3FE, 0x8000])
def test_a_range_moves_in_the_direction_that_keeps_it(target):
    machine = machine_of(preempt_after=3)
    guest = guest_of(machine)
    for index in range(6):
        guest.write(0x400000 + index * 4096, bytes((65 + index,)))
    fields = {"domid": Domid.SELF, "space": MapSpace.GMFN_RANGE, "size_pages": 6, "idx": 0x400, "gpfn": target}
    guest.write(BOUNCE, AddToPhysmap.build(**fields))
    assert guest.call(Nr.MEMORY_OP, Memop.ADD_TO_PHYSMAP, BOUNCE) == 0
    assert b"".join(guest.read(target * 4096 + index * 4096, 1) for index in range(6)) == b"ABCDEF"


def test_a_range_has_limits(machine):
    guest = guest_of(machine)
    fields = {"domid": Domid.SELF, "space": MapSpace.GMFN_RANGE, "size_pages": 6, "idx": 0x400}
    guest.write(BOUNCE, AddToPhysmap.build(**fields, gpfn=(1 << 64) - 3))
    assert guest.call(Nr.MEMORY_OP, Memop.ADD_TO_PHYSMAP, BOUNCE) == -Errno.EOVERFLOW
    guest.write(BOUNCE, AddToPhysmap.build(**fields, gpfn=0x8000))
    assert guest.call(Nr.MEMORY_OP, Memop.ADD_TO_PHYSMAP | 7 << 6, BOUNCE) == -Errno.EILSEQ
    assert guest.call(Nr.MEMORY_OP, Memop.ADD_TO_PHYSMAP | 1 << 22, BOUNCE) == -Errno.EDOM


def test_a_batch_has_an_error_for_each(machine):
    guest = guest_of(machine)
    guest.write(PAGE, b"".join(index.to_bytes(8, "little") for index in (0, 70, 1)))
    guest.write(PAGE + 64, b"".join(gfn.to_bytes(8, "little") for gfn in (0x400, 0x401, 0x402)))
    fields = {"domid": Domid.SELF, "space": MapSpace.GRANT_TABLE, "size_pages": 3}
    guest.write(BOUNCE, AddToPhysmapBatch.build(**fields, idxs=PAGE, gpfns=PAGE + 64, errs=PAGE + 128))
    assert guest.call(Nr.MEMORY_OP, Memop.ADD_TO_PHYSMAP_BATCH, BOUNCE) == 0
    assert [guest.number(PAGE + 128 + 4 * n) for n in range(3)] == [0, (1 << 32) - Errno.EINVAL, 0]
    guest.write(BOUNCE, AddToPhysmapBatch.build(domid=Domid.SELF, space=MapSpace.GMFN_RANGE, size_pages=1))
    assert guest.call(Nr.MEMORY_OP, Memop.ADD_TO_PHYSMAP_BATCH, BOUNCE) == -Errno.EOPNOTSUPP


def test_only_the_control_domain_maps_foreign_pages():
    machine = machine_of(control_domain=True)
    control, guest = guest_of(machine, 0), guest_of(machine, 1)
    guest.write(0x400000, b"of the guest")
    for caller, foreign, result in ((control, 1, 0), (guest, 0, -Errno.EPERM)):
        caller.write(PAGE, (0x400).to_bytes(8, "little"))
        caller.write(PAGE + 64, (0x8000).to_bytes(8, "little"))
        fields = {"domid": Domid.SELF, "space": MapSpace.GMFN_FOREIGN, "size_pages": 1, "foreign_domid": foreign}
        caller.write(BOUNCE, AddToPhysmapBatch.build(**fields, idxs=PAGE, gpfns=PAGE + 64, errs=PAGE + 128))
        assert caller.call(Nr.MEMORY_OP, Memop.ADD_TO_PHYSMAP_BATCH, BOUNCE) == 0
        assert caller.number(PAGE + 128) == result & 0xFFFF_FFFF
    assert control.read(0x8000000, 12) == b"of the guest"


def test_remove_from_physmap_leaves_a_hole(machine):
    guest = guest_of(machine)
    guest.map_page(MapSpace.SHARED_INFO, 0, INFO)
    for gpfn, result in ((INFO >> 12, 0), (INFO >> 12, -Errno.ENOENT), (1 << 50, -Errno.ENOENT)):
        guest.write(BOUNCE, Domid.SELF.to_bytes(8, "little") + gpfn.to_bytes(8, "little"))
        assert guest.call(Nr.MEMORY_OP, Memop.REMOVE_FROM_PHYSMAP, BOUNCE) == result
    assert not xen(machine).domains[1].special


def test_the_memory_map(machine):
    guest = guest_of(machine)
    answer = op(guest, Memop.MEMORY_MAP, nr_entries=8, buffer_handle=PAGE)
    assert (answer.result, answer.fields["nr_entries"]) == (0, 1)
    entry = E820Entry.from_bytes(guest.read(PAGE, 20))
    assert (entry.addr, entry.length, entry.type) == (0, 16 << 20, 1)
    guest.write(PAGE, E820Entry.build(addr=1, length=2, type=2) * 3)
    assert op(guest, Memop.SET_MEMORY_MAP, domid=Domid.SELF, nr_entries=3, buffer_handle=PAGE).result == 0
    assert op(guest, Memop.MEMORY_MAP, nr_entries=2, buffer_handle=PAGE + 64).fields["nr_entries"] == 2
    assert op(guest, Memop.SET_MEMORY_MAP, domid=Domid.SELF, nr_entries=1025).result == -Errno.EINVAL
    assert op(guest, Memop.SET_MEMORY_MAP, domid=2, nr_entries=1).result == -Errno.EPERM


def test_operations_of_toolstacks_and_unknown_ones(machine):
    for command in (10, 16, 17, 21, 22, 24, 28):
        assert call(machine, Nr.MEMORY_OP, command, PAGE) == -Errno.EPERM
    for command in (5, 8, 12, 12 | 1 << 6, 63):
        assert call(machine, Nr.MEMORY_OP, command, PAGE) == -Errno.ENOSYS


# Exchange ---------------------------------------------------------------------------------------------------------


def exchange(guest, **fields):
    """(result, nr_exchanged afterwards) of an exchange of the frames 0x100 and 0x101."""
    guest.write(PAGE, (0x100).to_bytes(8, "little") + (0x101).to_bytes(8, "little"))
    both = {"in_domid": Domid.SELF, "out_domid": Domid.SELF, "in_nr_extents": 2, "out_nr_extents": 2}
    places = {"in_extent_start": PAGE, "out_extent_start": PAGE, "nr_exchanged": 0}
    guest.write(BOUNCE, MemoryExchange.build(**(both | places | fields)))
    result = guest.call(Nr.MEMORY_OP, Memop.EXCHANGE, BOUNCE)
    return result, guest.number(BOUNCE + 64, 8)


@pytest.mark.parametrize(
    ("fields", "result", "exchanged"),
    [
        ({}, -Errno.EOPNOTSUPP, 0),
        ({"nr_exchanged": 1}, -Errno.EOPNOTSUPP, 1),
        ({"nr_exchanged": 1, "out_nr_extents": 1, "out_extent_order": 1}, -Errno.EOPNOTSUPP, 0),
        ({"nr_exchanged": 2}, 0, 2),
        ({"nr_exchanged": 3}, -Errno.EINVAL, 3),
        ({"in_extent_order": 9, "out_extent_order": 9}, -Errno.EOPNOTSUPP, 0),
        ({"in_extent_order": 10}, -Errno.EPERM, 0),
        ({"out_extent_order": 10}, -Errno.EPERM, 0),
        ({"out_nr_extents": 3}, -Errno.EINVAL, 0),
        ({"out_domid": 1}, -Errno.EINVAL, 0),
        ({"in_nr_extents": 1 << 63, "out_nr_extents": 1 << 63, "in_extent_order": 1}, -Errno.EINVAL, 0),
        ({"in_domid": 77, "out_domid": 77}, -Errno.ESRCH, 0),
        ({"in_domid": 2, "out_domid": 2}, -Errno.EPERM, 0),
        ({"in_extent_start": 1 << 40}, -Errno.EFAULT, 0),
        ({"in_extent_start": PAGE + 64}, -Errno.EOPNOTSUPP, 0),
    ],
)
def test_an_hvm_guest_gets_through_all_checks_of_an_exchange_and_no_further(machine, fields, result, exchanged):
    assert exchange(guest_of(machine), **fields) == (result, exchanged)


def test_an_exchange_of_a_hole_and_from_a_start_extent_is_einval(machine):
    guest = guest_of(machine)
    reserve(guest, Memop.DECREASE_RESERVATION, 0x100)
    assert exchange(guest) == (-Errno.EINVAL, 0)
    assert guest.call(Nr.MEMORY_OP, Memop.EXCHANGE | 1 << 6, BOUNCE) == -Errno.EINVAL
