"""grant_table_op: versions, maps, copies, pins, and whose bytes arrive."""

from __future__ import annotations

import pytest
from sevlab.plugins.xen import Errno, Gntst, Gnttabop, Memop, Nr, xen
from sevlab.plugins.xen.arguments import (
    GrantCopy,
    MapGrantRef,
    MemoryReservation,
    SetupTable,
    SwapGrantRef,
    UnmapGrantRef,
)
from sevlab.plugins.xen.layout import GrantEntryV1, GrantEntryV2
from sevlab.plugins.xen.numbers import Domid, Gntmap, Gtf, MapSpace

from tests.plugins.xen.world import FRAMES, PAGE, call, guest_of, machine_of

TARGET = 0x50000
STATUS = 0x22000


@pytest.fixture
def machine():
    return machine_of(guests=3)


def granter(machine, vm=1):
    guest = guest_of(machine, vm)
    guest.map_page(MapSpace.GRANT_TABLE, 0, FRAMES)
    guest.share(PAGE)
    guest.write(PAGE, b"granted bytes" + bytes(range(100)))
    return guest


def copy(guest, **fields):
    values = {"source": 8, "source_domid": 2, "dest": TARGET >> 12, "dest_domid": Domid.SELF, "len": 64, "flags": 1}
    result, statuses = guest.batch(Gnttabop.COPY, GrantCopy, [values | fields])
    return result or statuses[0]


def map_(guest, ref=8, gpa=0x60000, flags=Gntmap.HOST_MAP, dom=2):
    fields = {"host_addr": gpa, "flags": flags, "ref": ref, "dom": dom}
    guest.batch(Gnttabop.MAP_GRANT_REF, MapGrantRef, [fields])
    done = MapGrantRef.from_bytes(guest.read(guest.bounce_gpa, MapGrantRef.SIZE))
    return done.status - (1 << 16 if done.status >> 15 else 0), done.handle


def unmap(guest, handle, gpa=0x60000):
    return guest.batch(Gnttabop.UNMAP_GRANT_REF, UnmapGrantRef, [{"host_addr": gpa, "handle": handle}])[1][0]


def flags_of(guest, ref=8):
    return guest.number(FRAMES + ref * GrantEntryV1.SIZE, 2)


def test_a_granted_page_is_copied(machine):
    owner, user = granter(machine), guest_of(machine)
    owner.grant(FRAMES, 8, 1, PAGE, readonly=True)
    assert copy(user) == 0
    assert user.read(TARGET, 13) == b"granted bytes"
    assert flags_of(owner) == Gtf.PERMIT_ACCESS | Gtf.READONLY
    assert not xen(machine).domains[2].grants.active


def test_a_copy_into_a_grant_needs_it_to_be_writable(machine):
    owner, user = granter(machine), guest_of(machine)
    user.write(TARGET, b"to the owner")
    into = {"source": TARGET >> 12, "source_domid": Domid.SELF, "dest": 8, "dest_domid": 2, "flags": 2, "len": 12}
    owner.grant(FRAMES, 8, 1, PAGE, readonly=True)
    assert copy(user, **into) == -Gntst.GENERAL_ERROR
    owner.grant(FRAMES, 8, 1, PAGE)
    assert copy(user, **into) == 0
    assert owner.read(PAGE, 12) == b"to the owner"


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"len": 0, "source_domid": 99}, 0),
        ({"source_domid": 99}, -Gntst.BAD_DOMAIN),
        ({"flags": 0}, -Gntst.PERMISSION_DENIED),
        ({"dest_domid": 3}, -Gntst.PERMISSION_DENIED),
        ({"source": 512}, -Gntst.BAD_GNTREF),
        ({"source": 9}, -Gntst.GENERAL_ERROR),
        ({"dest": 1 << 30}, -Gntst.BAD_PAGE),
        ({"source_offset": 4032}, 0),
        ({"source_offset": 4033}, -Gntst.BAD_COPY_ARG),
        ({"dest_offset": 4033}, -Gntst.BAD_COPY_ARG),
        ({"len": 4096}, 0),
        ({"len": 4097}, -Gntst.BAD_COPY_ARG),
        ({"len": 0xFFFF}, -Gntst.BAD_COPY_ARG),
    ],
)
def test_statuses_of_a_copy(machine, fields, status):
    owner, user = granter(machine), guest_of(machine)
    owner.grant(FRAMES, 8, 1, PAGE)
    user.write(TARGET, b"before")
    assert copy(user, **fields) == status
    assert not xen(machine).domains[2].grants.active
    assert flags_of(owner) == Gtf.PERMIT_ACCESS
    if status:
        assert user.read(TARGET, 6) == b"before"


def test_a_grant_is_for_the_domain_that_it_names(machine):
    owner, third = granter(machine), guest_of(machine, 2)
    owner.grant(FRAMES, 8, 1, PAGE)
    assert copy(third) == -Gntst.GENERAL_ERROR
    assert map_(third)[0] == -Gntst.GENERAL_ERROR


def test_a_mapped_grant_is_memory_of_both(machine):
    owner, user = granter(machine), guest_of(machine)
    owner.grant(FRAMES, 8, 1, PAGE)
    status, handle = map_(user)
    assert (status, handle) == (0, 0)
    assert user.read(0x60000, 13) == b"granted bytes"
    user.write(0x60000, b"written by us")
    assert owner.read(PAGE, 13) == b"written by us"
    assert flags_of(owner) == Gtf.PERMIT_ACCESS | Gtf.READING | Gtf.WRITING
    assert unmap(user, handle) == 0
    assert flags_of(owner) == Gtf.PERMIT_ACCESS
    assert user.read(0x60000, 1) == b""  # a hole now
    assert unmap(user, handle) == -Gntst.BAD_HANDLE


def test_a_read_only_mapping_cannot_be_written(machine):
    owner, user = granter(machine), guest_of(machine)
    owner.grant(FRAMES, 8, 1, PAGE, readonly=True)
    assert map_(user)[0] == -Gntst.GENERAL_ERROR
    assert map_(user, flags=Gntmap.HOST_MAP | Gntmap.READONLY)[0] == 0
    assert flags_of(owner) & (Gtf.READING | Gtf.WRITING) == Gtf.READING
    user.write(0x60000, b"x")
    assert owner.read(PAGE, 1) == b"g"


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"flags": 0}, -Gntst.BAD_GNTREF),
        ({"flags": Gntmap.READONLY}, -Gntst.BAD_GNTREF),
        ({"flags": Gntmap.HOST_MAP | Gntmap.DEVICE_MAP}, -Gntst.GENERAL_ERROR),
        ({"flags": Gntmap.HOST_MAP | Gntmap.CONTAINS_PTE}, -Gntst.GENERAL_ERROR),
        ({"dom": 99}, -Gntst.BAD_DOMAIN),
        ({"dom": Domid.SELF}, -Gntst.BAD_DOMAIN),
        ({"ref": 512}, -Gntst.BAD_GNTREF),
        ({"ref": 9}, -Gntst.GENERAL_ERROR),
        ({"gpa": 1 << 50}, -Gntst.GENERAL_ERROR),
        ({"flags": Gntmap.HOST_MAP | 1 << 16}, -Gntst.GENERAL_ERROR),
    ],
)
def test_statuses_of_a_map(machine, fields, status):
    owner, user = granter(machine), guest_of(machine)
    owner.grant(FRAMES, 8, 1, PAGE)
    assert map_(user, **fields)[0] == status
    assert not xen(machine).domains[1].grants.maptrack
    assert not xen(machine).domains[2].grants.active
    assert flags_of(owner) == Gtf.PERMIT_ACCESS


def test_a_grant_cannot_be_mapped_over_another(machine):
    owner, user = granter(machine), guest_of(machine)
    owner.grant(FRAMES, 8, 1, PAGE)
    assert map_(user)[0] == 0
    assert map_(user)[0] == -Gntst.GENERAL_ERROR
    assert map_(user, gpa=0x61000) == (0, 1)


def test_a_page_in_use_by_others_is_not_given_to_anybody(machine):
    owner, user = granter(machine), guest_of(machine)
    owner.grant(FRAMES, 8, 1, PAGE)
    map_(user)
    free = xen(machine).free_spas
    owner.write(0x70000, (PAGE >> 12).to_bytes(8, "little"))
    owner.write(owner.bounce_gpa, MemoryReservation.build(extent_start=0x70000, nr_extents=1, domid=Domid.SELF))
    assert owner.call(Nr.MEMORY_OP, Memop.DECREASE_RESERVATION, owner.bounce_gpa) == 1
    assert xen(machine).free_spas == free
    assert user.read(0x60000, 13) == b"granted bytes"


def test_the_private_view_of_an_unmap_by_a_wrong_address(machine):
    owner, user = granter(machine), guest_of(machine)
    owner.grant(FRAMES, 8, 1, PAGE)
    _, handle = map_(user)
    assert unmap(user, handle, gpa=0x61000) == -Gntst.GENERAL_ERROR
    assert unmap(user, handle, gpa=0) == 0
    assert xen(machine).domains[1].grants.maptrack
    assert unmap(user, handle) == 0


# The table --------------------------------------------------------------------------------------------------------


def table_op(guest, command, **fields):
    return guest.invoke(Nr.GRANT_TABLE_OP, command, **fields)


def test_setup_and_query(machine):
    guest = granter(machine)
    assert table_op(guest, Gnttabop.QUERY_SIZE, dom=Domid.SELF).fields["max_nr_frames"] == 64
    answer = table_op(guest, Gnttabop.SETUP_TABLE, dom=Domid.SELF, nr_frames=2, frame_list=0x70000)
    assert (answer.result, answer.fields["status"]) == (0, 0)
    assert guest.number(0x70000, 8) == FRAMES >> 12
    assert guest.number(0x70008, 8) == (1 << 64) - 1
    assert table_op(guest, Gnttabop.QUERY_SIZE, dom=Domid.SELF).fields["nr_frames"] == 2
    for fields, status in (
        ({"nr_frames": 65}, Gntst.GENERAL_ERROR),
        ({"dom": 1}, Gntst.PERMISSION_DENIED),
        ({"dom": 77}, Gntst.BAD_DOMAIN),
    ):
        answer = table_op(
            guest, Gnttabop.SETUP_TABLE, **{"dom": Domid.SELF, "nr_frames": 1, "frame_list": 0x70000, **fields}
        )
        assert (answer.result, answer.fields["status"]) == (0, -status & 0xFFFF)


def test_counts_and_filtered_operations(machine):
    guest = granter(machine)
    guest.write(guest.bounce_gpa, SetupTable.build(dom=Domid.SELF))
    assert guest.call(Nr.GRANT_TABLE_OP, Gnttabop.SETUP_TABLE, guest.bounce_gpa, 2) == -Errno.EINVAL
    assert guest.call(Nr.GRANT_TABLE_OP, Gnttabop.COPY, guest.bounce_gpa, 1 << 31) == -Errno.EINVAL
    assert guest.call(Nr.GRANT_TABLE_OP, Gnttabop.COPY, guest.bounce_gpa, 0) == 0
    for command in (3, 4, 7, 9, 12, 13, 5 | 1 << 12):
        assert guest.call(Nr.GRANT_TABLE_OP, command, guest.bounce_gpa, 1) == -Errno.ENOSYS


def test_an_array_that_leaves_memory_ends_with_efault_after_what_was_done(machine):
    owner, user = granter(machine), guest_of(machine)
    owner.grant(FRAMES, 8, 1, PAGE)
    end = (16 << 20) - GrantCopy.SIZE
    user.write(
        end,
        GrantCopy.build(
            source=8, source_domid=2, dest=TARGET >> 12, dest_domid=Domid.SELF, len=4, flags=1, status=0x55
        ),
    )
    assert call(machine, Nr.GRANT_TABLE_OP, Gnttabop.COPY, end, 1 << 20) == -Errno.EFAULT
    assert user.number(end + 36, 2) == 0
    assert user.read(TARGET, 4) == b"gran"


def test_version_2_has_other_entries_and_a_status_array(machine):
    owner, user = granter(machine), guest_of(machine)
    owner.grant(FRAMES, 8, 1, PAGE)
    owner.grant(FRAMES, 1, 5, PAGE)
    assert table_op(owner, Gnttabop.SET_VERSION, table_version=2).fields["table_version"] == 2
    assert table_op(owner, Gnttabop.GET_VERSION, dom=Domid.SELF).fields["table_version"] == 2
    kept = GrantEntryV2.from_bytes(owner.read(FRAMES + 16, 16))
    assert (kept.flags, kept.domid, kept.frame) == (1, 5, PAGE >> 12)
    assert owner.read(FRAMES + 8 * 16, 16) == bytes(16)
    assert owner.map_page(MapSpace.GRANT_TABLE, 1 << 31, STATUS) == 0
    entry = GrantEntryV2.build(flags=Gtf.PERMIT_ACCESS, domid=1, frame=PAGE >> 12)
    owner.write(FRAMES + 8 * 16, entry)
    assert map_(user)[0] == 0
    assert owner.number(STATUS + 16, 2) == Gtf.READING | Gtf.WRITING
    assert owner.read(FRAMES + 8 * 16, 16) == entry
    assert table_op(owner, Gnttabop.SET_VERSION, table_version=1).result == -Errno.EBUSY
    assert unmap(user, 0) == 0
    assert owner.number(STATUS + 16, 2) == 0
    assert table_op(owner, Gnttabop.SET_VERSION, table_version=1).result == 0
    assert table_op(owner, Gnttabop.SET_VERSION, table_version=3).result == -Errno.EINVAL


def test_a_part_of_a_page_can_be_copied_but_not_mapped(machine):
    owner, user = granter(machine), guest_of(machine)
    table_op(owner, Gnttabop.SET_VERSION, table_version=2)
    entry = GrantEntryV2.build(
        flags=Gtf.PERMIT_ACCESS | Gtf.SUB_PAGE, domid=1, page_off_or_trans_domid=8, length=16, frame=PAGE >> 12
    )
    owner.write(FRAMES + 8 * 16, entry)
    assert map_(user)[0] == -Gntst.GENERAL_ERROR
    assert copy(user, source_offset=8, len=16) == 0
    assert copy(user, source_offset=7, len=16) == -Gntst.GENERAL_ERROR
    assert copy(user, source_offset=8, len=17) == -Gntst.GENERAL_ERROR


def test_a_transitive_grant_reaches_one_step_further(machine):
    owner, middle, user = granter(machine, 2), granter(machine, 1), guest_of(machine)
    owner.write(PAGE, b"from the third")
    owner.grant(FRAMES, 20, 2, PAGE, readonly=True)
    table_op(middle, Gnttabop.SET_VERSION, table_version=2)

    def transitive(domid, ref):
        entry = GrantEntryV2.build(flags=Gtf.TRANSITIVE, domid=1, page_off_or_trans_domid=domid, frame=ref)
        middle.write(FRAMES + 8 * 16, entry)

    transitive(3, 20)
    assert copy(user) == 0
    assert user.read(TARGET, 14) == b"from the third"
    assert map_(user)[0] == -Gntst.GENERAL_ERROR
    transitive(3, 21)
    assert copy(user) == -Gntst.GENERAL_ERROR
    transitive(2, 8)
    assert copy(user) == -Gntst.GENERAL_ERROR
    for domid in (1, 2, 3):
        assert not xen(machine).domains[domid].grants.active


def test_entries_nobody_uses_can_be_swapped(machine):
    owner, user = granter(machine), guest_of(machine)
    owner.grant(FRAMES, 8, 1, PAGE)
    assert owner.batch(Gnttabop.SWAP_GRANT_REF, SwapGrantRef, [{"ref_a": 8, "ref_b": 9}])[1] == [0]
    assert (flags_of(owner, 8), flags_of(owner, 9)) == (0, 1)
    assert owner.batch(Gnttabop.SWAP_GRANT_REF, SwapGrantRef, [{"ref_a": 8, "ref_b": 512}])[1] == [-Gntst.BAD_GNTREF]
    map_(user, ref=9)
    assert owner.batch(Gnttabop.SWAP_GRANT_REF, SwapGrantRef, [{"ref_a": 8, "ref_b": 9}])[1] == [-Gntst.EAGAIN]


def test_a_long_batch_is_preempted_and_finished():
    machine = machine_of(preempt_after=3)
    owner, user = granter(machine), guest_of(machine)
    owner.grant(FRAMES, 8, 1, PAGE)
    fields = {"source": 8, "source_domid": 2, "dest": TARGET >> 12, "dest_domid": Domid.SELF, "len": 4, "flags": 1}
    result, statuses = user.batch(Gnttabop.COPY, GrantCopy, [fields | {"dest_offset": 4 * n} for n in range(20)])
    assert (result, statuses) == (0, [0] * 20)
    assert user.read(TARGET, 80) == b"gran" * 20
