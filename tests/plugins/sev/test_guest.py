"""ASIDs and their flushes, COPY, debug access, and swapping."""

from __future__ import annotations

import pytest
from sevlab.core.config import GuestConfig
from sevlab.core.events import CacheOp, Done, Refused
from sevlab.core.testing import make_machine
from sevlab.plugins import sev
from sevlab.plugins.sev import Command, CoreWbinvd, GuestState, Policy, Status, asids, driver
from sevlab.plugins.sev.layout import SwapMetadata

from tests.plugins.sev.world import PAGE, PLAINTEXT, World, rejected


@pytest.fixture(scope="module")
def fresh():
    made = World(Policy(0)).reach(GuestState.RUNNING)
    made.machine.mark()
    return made


@pytest.fixture
def world(fresh):
    yield fresh
    fresh.machine.reset()


@pytest.fixture
def other(world):
    """A second guest, not active."""
    return world.need(Command.LAUNCH_START, policy=0).handle


def private(world, gpa, length):
    return world.machine.access.guest_physical_read(world.machine.vcpus[0], gpa, length, c_bit=True)


# ASIDs --------------------------------------------------------------------------------------------------------------


def test_the_ranges_of_guests_with_and_without_es():
    for policy, legal, illegal in ((0, (100, 509), (99, 1)), (Policy.ES, (1, 99), (100, 509))):
        machine = make_machine("sev")
        sev.initialise(machine, es=True)
        driver.flush(machine)
        for asid in legal:
            handle = sev.need(machine, Command.LAUNCH_START, policy=policy).handle
            sev.need(machine, Command.ACTIVATE, handle=handle, asid=asid)
        handle = sev.need(machine, Command.LAUNCH_START, policy=policy).handle
        for asid in illegal:
            assert rejected(machine, Command.ACTIVATE, handle=handle, asid=asid) == Status.INVALID_ASID
        for asid in (0, 510, 0xFFFF_FFFF):
            assert rejected(machine, Command.ACTIVATE, handle=handle, asid=asid) == Status.INVALID_ASID


def test_an_owned_asid_is_owned_before_the_guest_is_active(world, other):
    owned = world.guest.asid
    assert rejected(world.machine, Command.ACTIVATE, handle=other, asid=owned) == Status.ASID_OWNED
    assert rejected(world.machine, Command.ACTIVATE, handle=world.handle, asid=owned) == Status.ASID_OWNED
    assert rejected(world.machine, Command.ACTIVATE, handle=world.handle, asid=owned + 1) == Status.ACTIVE


def test_an_asid_that_was_used_needs_wbinvd_and_df_flush(world, other):
    asid = world.guest.asid
    world.need(Command.DEACTIVATE, handle=world.handle)
    assert rejected(world.machine, Command.DEACTIVATE, handle=world.handle) == Status.INACTIVE
    assert rejected(world.machine, Command.ACTIVATE, handle=other, asid=asid) == Status.DF_FLUSH_REQUIRED
    assert rejected(world.machine, Command.DF_FLUSH) == Status.WBINVD_REQUIRED
    driver.flush(world.machine)
    world.need(Command.ACTIVATE, handle=other, asid=asid)


def test_an_asid_that_was_only_allocated_is_clean_again(world, other):
    world.need(Command.ACTIVATE, handle=other, asid=300)
    world.need(Command.DEACTIVATE, handle=other)
    world.need(Command.ACTIVATE, handle=other, asid=300)


def test_a_flush_is_complete_only_after_wbinvd_on_every_core():
    machine = make_machine("sev", options={"sev": {"ccxs": 2, "cores_per_ccx": 2}})
    sev.initialise(machine)
    handle = sev.need(machine, Command.LAUNCH_START, policy=0).handle
    state = sev.sev_state(machine)
    for core in (0, 1, 2):
        assert machine.apply(CoreWbinvd(core)).first(Done) is not None
    assert sev.run(machine, Command.DF_FLUSH).status == Status.WBINVD_REQUIRED
    assert not state.ccxs[0].dirty
    assert state.ccxs[1].dirty
    assert rejected(machine, Command.ACTIVATE, handle=handle, asid=200) == Status.DF_FLUSH_REQUIRED
    machine.apply(CoreWbinvd(3))
    sev.need(machine, Command.DF_FLUSH)
    sev.need(machine, Command.ACTIVATE, handle=handle, asid=200)
    assert machine.apply(CoreWbinvd(4)).first(Refused) is not None


def test_init_makes_every_asid_dirty_unless_snp_is_initialised(world):
    for snp, dirty in ((False, True), (True, False)):
        world.need(Command.SHUTDOWN)
        driver.flush(world.machine)
        sev.sev_state(world.machine).snp_initialised = snp
        world.need(Command.INIT)
        assert asids.dirty(sev.sev_state(world.machine), 250, 1) == dirty


def activate_ex(world, handle, apic_ids, asid=301, **changes):
    ids = b"".join(number.to_bytes(4, "little") for number in apic_ids)
    return {
        "length": 0x18,
        "handle": handle,
        "asid": asid,
        "id_count": len(apic_ids),
        "ids_spa": world.put(6, ids or bytes(4)),
    } | changes


def test_activate_ex_takes_only_the_named_complexes_and_may_add_more(world, other):
    state = sev.sev_state(world.machine)
    world.need(Command.ACTIVATE_EX, **activate_ex(world, other, [1]))
    assert [ccx.allocated >> 301 & 1 for ccx in state.ccxs.values()] == [1, 0]
    world.need(Command.ACTIVATE_EX, **activate_ex(world, other, [4, 7]))
    assert [ccx.allocated >> 301 & 1 for ccx in state.ccxs.values()] == [1, 1]
    fields = activate_ex(world, other, [0], asid=302)
    assert rejected(world.machine, Command.ACTIVATE_EX, **fields) == Status.ACTIVE


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"length": 0x17}, Status.INVALID_PARAM),
        ({"length": 0x17, "handle": 99}, Status.INVALID_PARAM),
        ({"asid": 0}, Status.INVALID_ASID),
        ({"asid": 510}, Status.INVALID_ASID),
        ({"asid": 50}, Status.INVALID_ASID),
        ({"id_count": 0}, Status.INVALID_PARAM),
        ({"id_count": 1025}, Status.INVALID_PARAM),
        ({"ids_spa": 1 << 46}, Status.INVALID_ADDRESS),
    ],
)
def test_activate_ex_answers_the_first_thing_that_is_wrong(world, other, change, status):
    fields = activate_ex(world, other, [0]) | change
    assert rejected(world.machine, Command.ACTIVATE_EX, **fields) == status


def test_activate_ex_knows_the_apic_ids_of_the_machine(world, other):
    assert rejected(world.machine, Command.ACTIVATE_EX, **activate_ex(world, other, [8])) == Status.INVALID_CONFIG


def test_a_guest_finds_its_memory_under_another_asid(world):
    world.need(Command.DEACTIVATE, handle=world.handle)
    driver.flush(world.machine)
    driver.activate(world.machine, 0, world.handle, es=False, asid=400)
    assert private(world, 0, PAGE) == PLAINTEXT


def test_decommission_asks_for_deactivate_and_forgets(world):
    assert rejected(world.machine, Command.DECOMMISSION, handle=world.handle) == Status.ACTIVE
    sev.stop_guest(world.machine, world.guest)
    assert world.need(Command.GUEST_STATUS, handle=world.handle).state == GuestState.UNINIT


def test_the_next_guest_of_an_asid_cannot_read_the_last_ones_memory(world, other):
    asid = world.guest.asid
    sev.stop_guest(world.machine, world.guest)
    driver.flush(world.machine)
    world.need(Command.ACTIVATE, handle=other, asid=asid)
    assert private(world, 0, PAGE) != PLAINTEXT


def test_wbinvd_of_all_cores_is_the_kernels_step(world):
    world.need(Command.DEACTIVATE, handle=world.handle)
    world.machine.apply(CacheOp("invd", 0))
    assert rejected(world.machine, Command.DF_FLUSH) == Status.WBINVD_REQUIRED
    world.machine.apply(CacheOp("wbinvd", 0))
    world.need(Command.DF_FLUSH)


# COPY ---------------------------------------------------------------------------------------------------------------


def test_copy_moves_plaintext_and_the_cells_differ(world):
    spa = world.vm.memory_spa
    world.need(Command.COPY, handle=world.handle, length=PAGE, source_spa=spa, destination_spa=spa + 8 * PAGE)
    assert private(world, 8 * PAGE, PAGE) == PLAINTEXT
    assert world.machine.memory.dram(spa, PAGE) != world.machine.memory.dram(spa + 8 * PAGE, PAGE)


def test_copy_onto_itself_succeeds_and_does_nothing(world):
    spa = world.vm.memory_spa
    before = world.machine.memory.dram(spa, 3 * PAGE)
    world.need(Command.COPY, handle=world.handle, length=2 * PAGE, source_spa=spa, destination_spa=spa)
    assert world.machine.memory.dram(spa, 3 * PAGE) == before


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"length": 0}, Status.INVALID_LENGTH),
        ({"length": PAGE + 16}, Status.INVALID_LENGTH),
        ({"source_spa": 16}, Status.INVALID_ADDRESS),
        ({"destination_spa": 16}, Status.INVALID_ADDRESS),
        ({"length": 1, "destination_spa": 16}, Status.INVALID_LENGTH),
        ({"source_spa": 1 << 46}, Status.INVALID_ADDRESS),
        ({"destination_spa": 1 << 46}, Status.INVALID_ADDRESS),
    ],
)
def test_copy_answers_the_first_thing_that_is_wrong(world, change, status):
    assert rejected(world.machine, Command.COPY, **world.fields(Command.COPY) | change) == status


# Debug --------------------------------------------------------------------------------------------------------------


def test_debug_reads_and_writes_guest_memory(world):
    spa = world.vm.memory_spa
    fields = {"handle": world.handle, "source_spa": spa + 16, "destination_spa": world.place(6), "length": 48}
    world.need(Command.DBG_DECRYPT, **fields)
    assert driver.get(world.machine, world.place(6), 48) == PLAINTEXT[16:64]
    fields = {"handle": world.handle, "source_spa": world.put(6, b"sixteen bytes..."), "destination_spa": spa + 32}
    world.need(Command.DBG_ENCRYPT, **fields, length=16)
    assert private(world, 0, 64) == PLAINTEXT[:32] + b"sixteen bytes..." + PLAINTEXT[48:64]


@pytest.mark.parametrize("command", [Command.DBG_DECRYPT, Command.DBG_ENCRYPT])
def test_debug_checks_alignment_and_length_before_the_guest(world, command):
    fields = world.fields(command)
    cases = (
        ({"source_spa": 8, "length": 8, "handle": 99}, Status.INVALID_ADDRESS),
        ({"destination_spa": 8, "length": 8, "handle": 99}, Status.INVALID_ADDRESS),
        ({"length": 8, "handle": 99}, Status.INVALID_LENGTH),
        ({"handle": 99}, Status.INVALID_GUEST),
        ({"source_spa": 1 << 46}, Status.INVALID_ADDRESS),
        ({"destination_spa": 1 << 46}, Status.INVALID_ADDRESS),
    )
    for change, status in cases:
        assert rejected(world.machine, command, **fields | change) == status
    world.need(Command.DEACTIVATE, handle=world.handle)
    assert rejected(world.machine, command, **fields) == Status.INACTIVE


@pytest.mark.unverified
def test_debug_of_nothing_is_an_invalid_length(world):
    fields = world.fields(Command.DBG_DECRYPT) | {"length": 0}
    assert rejected(world.machine, Command.DBG_DECRYPT, **fields) == Status.INVALID_LENGTH


def test_the_policy_forbids_debugging_before_the_asid_is_looked_at(world):
    handle = world.need(Command.LAUNCH_START, policy=Policy.NODBG).handle
    for command in (Command.DBG_DECRYPT, Command.DBG_ENCRYPT):
        fields = world.fields(command) | {"handle": handle}
        assert rejected(world.machine, command, **fields) == Status.POLICY_FAILURE


# Swapping -----------------------------------------------------------------------------------------------------------


def swap(world, command, number=0, **changes):
    return world.fields(command) | {"mdata_spa": world.place(9) + 64 * number} | changes


def test_a_swapped_page_comes_back_anywhere(world):
    world.need(Command.SWAP_OUT, **swap(world, Command.SWAP_OUT, software_data=0x1234))
    metadata = SwapMetadata.from_bytes(driver.get(world.machine, world.place(9), 64))
    assert (metadata.software_data, metadata.iv, metadata.large, metadata.page_type) == (0x1234, 0, 0, 0)
    assert driver.get(world.machine, world.place(7), PAGE) != PLAINTEXT
    world.need(Command.SWAP_IN, **swap(world, Command.SWAP_IN))
    assert private(world, 6 * PAGE, PAGE) == PLAINTEXT
    world.need(Command.SWAP_OUT, **swap(world, Command.SWAP_OUT))
    assert SwapMetadata.from_bytes(driver.get(world.machine, world.place(9), 64)).iv == 1


@pytest.mark.parametrize("where", [("page", 0), ("page", 4095), ("metadata", 0), ("metadata", 8), ("metadata", 0x10)])
def test_a_tampered_page_or_its_metadata_does_not_come_back(world, where):
    world.need(Command.SWAP_OUT, **swap(world, Command.SWAP_OUT))
    spa = world.place(7 if where[0] == "page" else 9) + where[1]
    byte = driver.get(world.machine, spa, 1)
    driver.put(world.machine, spa, bytes((byte[0] ^ 1,)))
    assert rejected(world.machine, Command.SWAP_IN, **swap(world, Command.SWAP_IN)) == Status.BAD_MEASUREMENT


def test_another_guest_cannot_swap_it_in(world, other):
    world.need(Command.SWAP_OUT, **swap(world, Command.SWAP_OUT))
    world.need(Command.ACTIVATE, handle=other, asid=300)
    fields = swap(world, Command.SWAP_IN, handle=other)
    assert rejected(world.machine, Command.SWAP_IN, **fields) == Status.BAD_MEASUREMENT


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"source_spa": 16}, Status.INVALID_ADDRESS),
        ({"destination_spa": 16}, Status.INVALID_ADDRESS),
        ({"mdata_spa": 32}, Status.INVALID_ADDRESS),
        ({"mdata_spa": 1 << 46}, Status.INVALID_ADDRESS),
        ({"large": 1}, Status.INVALID_ADDRESS),
        ({"handle": 99}, Status.INVALID_GUEST),
    ],
)
@pytest.mark.parametrize("command", [Command.SWAP_OUT, Command.SWAP_IN])
def test_swapping_answers_the_first_thing_that_is_wrong(world, command, change, status):
    world.need(Command.SWAP_OUT, **swap(world, Command.SWAP_OUT))
    assert rejected(world.machine, command, **swap(world, command) | change) == status


def test_swap_parameters_that_do_not_fit_together(world):
    world.need(Command.SWAP_OUT, **swap(world, Command.SWAP_OUT))
    out, into = swap(world, Command.SWAP_OUT), swap(world, Command.SWAP_IN)
    cases = (
        (Command.SWAP_OUT, out | {"mdata_spa": out["destination_spa"]}),
        (Command.SWAP_OUT, out | {"mdata_spa": out["source_spa"] + PAGE - 64}),
        (Command.SWAP_OUT, out | {"page_type": 2}),
        (Command.SWAP_IN, into | {"page_type": 2}),
        (Command.SWAP_IN, into | {"in_place": 1}),
    )
    for command, fields in cases:
        assert rejected(world.machine, command, **fields) == Status.INVALID_PARAM


def test_the_counter_of_the_offline_key_never_wraps(world):
    guest = sev.sev_state(world.machine).guests[world.handle]
    guest.oek_iv = (1 << 64) - 3
    world.need(Command.SWAP_OUT, **swap(world, Command.SWAP_OUT))
    assert rejected(world.machine, Command.SWAP_OUT, **swap(world, Command.SWAP_OUT)) == Status.AEAD_OFLOW


def test_a_vmsa_is_swapped_only_as_what_it_is():
    world = World().reach(GuestState.RUNNING)
    fields = swap(world, Command.SWAP_OUT, source_spa=world.vmsa_spa)
    assert rejected(world.machine, Command.SWAP_OUT, **fields) == Status.INVALID_PARAM
    assert rejected(world.machine, Command.SWAP_OUT, **fields | {"page_type": 2, "large": 1}) == 0x09
    world.need(Command.SWAP_OUT, **fields | {"page_type": 2})
    into = swap(world, Command.SWAP_IN, page_type=2, destination_spa=world.vmsa_spa)
    world.need(Command.SWAP_IN, **into)


def test_large_pages_are_swapped_whole():
    machine = make_machine("sev", guests=(GuestConfig(memory_bytes=4 << 20),))
    guest = sev.launch_guest(machine, 0, loads={0: PLAINTEXT})
    spa = machine.hypervisor.vms[0].memory_spa
    disk = machine.hypervisor.allocate_pages(512, alignment_bytes=2 << 20)
    mdata = driver.scratch_page(machine) + PAGE
    fields = {"handle": guest.handle, "large": 1, "mdata_spa": mdata}
    sev.need(machine, Command.SWAP_OUT, **fields, source_spa=spa, destination_spa=disk)
    sev.need(machine, Command.SWAP_IN, **fields, source_spa=disk, destination_spa=spa + (2 << 20))
    assert machine.access.guest_physical_read(machine.vcpus[0], 2 << 20, PAGE, c_bit=True) == PLAINTEXT
