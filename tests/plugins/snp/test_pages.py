"""Debug, move, swap, reclaim, unsmash: states, owners, contents, and what comes back only once."""

from __future__ import annotations

import pytest
from sevlab.plugins.sev import Command, Status
from sevlab.plugins.snp import driver
from sevlab.plugins.snp.buffers import MetadataEntry
from sevlab.plugins.snp.driver import LaunchPage
from sevlab.plugins.snp.layout import VALIDATED
from sevlab.plugins.snp.records import Pvalidate
from sevlab.plugins.snp.rmp import asid_pages, read_entry, state_of
from sevlab.plugins.snp.states import PageState

from tests.plugins.snp.support import MIB, context, running, snp_machine
from tests.plugins.snp.test_commands import PAGE, firmware_page, refused, spa_of

S = Status
GPA = 0x3000
DEBUG_BIT, PAGE_SWAP_DISABLE_BIT = 1 << 19, 1 << 25
DEBUG = driver.DEFAULT_POLICY | DEBUG_BIT


@pytest.fixture(scope="module")
def shared():
    machine = snp_machine(2)
    guests = (running(machine, 0, policy=DEBUG, pages=(LaunchPage(GPA, 1, PAGE),)), running(machine, 1))
    machine.mark()
    return machine, guests


@pytest.fixture
def machine(shared):
    shared[0].reset()
    return shared[0]


@pytest.fixture
def guest(shared):
    return shared[1][0]


@pytest.fixture
def other(shared):
    return shared[1][1]


def pre_guest(machine, asid, gpa=0x9000, *, spa=None):
    spa = spa or machine.hypervisor.allocate_pages(1)
    assert driver.rmp_update(machine, spa, gpa=gpa, assigned=1, immutable=1, asid=asid) == 0
    return spa


def freeze(machine, guest, gpa=GPA, **state):
    """RMPUPDATE that makes a valid page of the guest Pre-Swap."""
    assert (
        driver.rmp_update(machine, spa_of(machine, gpa), gpa=gpa, assigned=1, immutable=1, asid=guest.asid, **state)
        == 0
    )
    return spa_of(machine, gpa)


def plain(machine, guest, spa):
    return machine.memory.read(spa, 4096, context(machine, guest).key(machine))


# Debugging ------------------------------------------------------------------------------------------------------------


def test_debug_decrypt_gives_the_plaintext_of_a_guest_that_allows_it(machine, guest, other):
    destination = firmware_page(machine)
    fields = {"gctx_spa": guest.gctx_spa, "source_spa": spa_of(machine, GPA), "destination_spa": destination}
    driver.need(machine, Command.SNP_DBG_DECRYPT, **fields)
    assert driver.get(machine, destination, 4096) == PAGE
    decrypt = Command.SNP_DBG_DECRYPT
    refused(machine, decrypt, S.INVALID_PAGE_STATE, **(fields | {"source_spa": 0x1000}))
    refused(machine, decrypt, S.INVALID_PAGE_STATE, **(fields | {"destination_spa": 0x1000}))
    refused(machine, decrypt, S.INVALID_PAGE_OWNER, **(fields | {"gctx_spa": other.gctx_spa}))
    context(machine, guest).policy &= ~DEBUG_BIT
    refused(machine, decrypt, S.POLICY_FAILURE, **fields)


def test_debug_encrypt_writes_only_to_immutable_pages_of_the_guest(machine, guest, other):
    source = machine.hypervisor.allocate_pages(1)
    driver.put(machine, source, PAGE[::-1])
    fields = {"gctx_spa": guest.gctx_spa, "source_spa": source, "destination_spa": spa_of(machine, GPA)}
    encrypt = Command.SNP_DBG_ENCRYPT
    refused(machine, encrypt, S.INVALID_PAGE_STATE, **fields)
    freeze(machine, guest)
    refused(machine, encrypt, S.INVALID_PAGE_OWNER, **(fields | {"gctx_spa": other.gctx_spa}))
    driver.need(machine, encrypt, **fields)
    assert plain(machine, guest, spa_of(machine, GPA)) == PAGE[::-1]


# Move -----------------------------------------------------------------------------------------------------------------


def test_a_moved_page_has_other_ciphertext_and_the_same_content(machine, guest):
    source = freeze(machine, guest)
    destination = pre_guest(machine, guest.asid, GPA)
    before = driver.get(machine, source, 4096)
    fields = {"gctx_spa": guest.gctx_spa, "source_spa": source, "destination_spa": destination}
    driver.need(machine, Command.SNP_PAGE_MOVE, **fields)
    assert driver.get(machine, destination, 4096) != before
    assert plain(machine, guest, destination) == PAGE
    assert state_of(machine, destination) is PageState.GUEST_VALID
    assert state_of(machine, source) is PageState.GUEST_INVALID


def test_move_checks_states_sizes_and_owners(machine, guest, other):
    source, destination = freeze(machine, guest), pre_guest(machine, guest.asid)
    fields = {"gctx_spa": guest.gctx_spa, "source_spa": source, "destination_spa": destination}
    move = Command.SNP_PAGE_MOVE
    refused(machine, move, S.INVALID_PAGE_SIZE, page_size=1, **fields)
    refused(machine, move, S.INVALID_PAGE_STATE, **(fields | {"destination_spa": 0x1000}))
    refused(machine, move, S.INVALID_PAGE_STATE, **(fields | {"source_spa": 0x1000}))
    refused(machine, move, S.INVALID_PAGE_OWNER, **(fields | {"gctx_spa": other.gctx_spa}))
    refused(machine, move, S.INVALID_PAGE_OWNER, **(fields | {"destination_spa": pre_guest(machine, other.asid)}))


# Swap -----------------------------------------------------------------------------------------------------------------


def metadata_page(machine, guest):
    spa = firmware_page(machine)
    driver.need(machine, Command.SNP_PAGE_MD_INIT, gctx_spa=guest.gctx_spa, page_spa=spa)
    assert state_of(machine, spa) is PageState.METADATA
    assert read_entry(machine, spa).gpa == guest.gctx_spa
    return spa


def swap_out(machine, guest, *, root=0):
    """Swap the launched page out: (its SPA, where the ciphertext is, fields of the way back)."""
    source, destination = freeze(machine, guest), firmware_page(machine)
    mdata = 0 if root else metadata_page(machine, guest)
    fields = {"gctx_spa": guest.gctx_spa, "mdata_spa": mdata, "root_mdata_en": root}
    out = fields | {"source_spa": source, "destination_spa": destination, "software_data": 0x1234}
    driver.need(machine, Command.SNP_PAGE_SWAP_OUT, **out)
    return source, destination, fields | {"source_spa": destination, "destination_spa": source}


@pytest.mark.parametrize("root", [0, 1], ids=["metadata page", "root entry"])
def test_a_page_comes_back_as_it_went_and_only_once(machine, guest, root):
    source, destination, back = swap_out(machine, guest, root=root)
    assert state_of(machine, source) is PageState.PRE_GUEST
    assert driver.get(machine, destination, 4096) != PAGE
    entry = context(machine, guest).root_md_entry if root else machine.memory.read(back["mdata_spa"], 64, None)
    entry = MetadataEntry.from_bytes(entry)
    assert (entry.valid, entry.page_validated, entry.software_data, entry.gpa_page) == (1, 1, 0x1234, GPA >> 12)
    driver.take_back(machine, source)
    target = pre_guest(machine, guest.asid, GPA, spa=source)
    driver.need(machine, Command.SNP_PAGE_SWAP_IN, **back)
    assert state_of(machine, target) is PageState.PRE_SWAP
    assert plain(machine, guest, target) == PAGE
    driver.need(machine, Command.SNP_PAGE_RECLAIM, page=target >> 12)
    assert state_of(machine, target) is PageState.GUEST_VALID
    freeze(machine, guest)
    refused(machine, Command.SNP_PAGE_SWAP_IN, S.INVALID_PAGE_STATE, **back)
    driver.take_back(machine, target)
    pre_guest(machine, guest.asid, GPA, spa=target)
    refused(machine, Command.SNP_PAGE_SWAP_IN, S.INVALID_MDATA_ENTRY, **back)


def test_changed_ciphertext_does_not_come_back(machine, guest):
    source, destination, back = swap_out(machine, guest)
    driver.take_back(machine, destination)
    byte = driver.get(machine, destination, 1)[0]
    driver.put(machine, destination, bytes((byte ^ 1,)))
    refused(machine, Command.SNP_PAGE_SWAP_IN, S.BAD_MEASUREMENT, **back)
    driver.put(machine, destination, bytes((byte,)))
    driver.need(machine, Command.SNP_PAGE_SWAP_IN, **back)
    assert plain(machine, guest, source) == PAGE


def test_a_page_comes_back_only_where_it_was(machine, guest):
    source, _, back = swap_out(machine, guest)
    driver.take_back(machine, source)
    elsewhere = pre_guest(machine, guest.asid, GPA + 0x1000)
    refused(machine, Command.SNP_PAGE_SWAP_IN, S.INVALID_MDATA_ENTRY, **(back | {"destination_spa": elsewhere}))


def test_metadata_belongs_to_one_guest(machine, guest, other):
    source, destination = freeze(machine, guest), firmware_page(machine)
    foreign = metadata_page(machine, other)
    fields = {"gctx_spa": guest.gctx_spa, "source_spa": source, "destination_spa": destination}
    out = Command.SNP_PAGE_SWAP_OUT
    refused(machine, out, S.INVALID_PAGE_OWNER, mdata_spa=foreign, **fields)
    refused(machine, out, S.INVALID_PAGE_STATE, mdata_spa=destination, **fields)
    refused(machine, out, S.INVALID_PARAM, mdata_spa=foreign + 8, **fields)
    refused(machine, out, S.INVALID_PARAM, root_mdata_en=1, page_type=3, **fields)
    refused(
        machine,
        out,
        S.INVALID_PAGE_SIZE,
        root_mdata_en=1,
        page_size=1,
        **(fields | {"source_spa": spa_of(machine, 0), "destination_spa": spa_of(machine, 2 * MIB)}),
    )


def test_a_metadata_page_is_swapped_and_moved_too(machine, guest):
    mdata = metadata_page(machine, guest)
    out, moved = firmware_page(machine), firmware_page(machine)
    fields = {"gctx_spa": guest.gctx_spa, "root_mdata_en": 1, "page_type": 1}
    move = {"gctx_spa": guest.gctx_spa, "source_spa": mdata, "destination_spa": moved}
    driver.need(machine, Command.SNP_PAGE_MOVE, **move)
    assert (state_of(machine, mdata), state_of(machine, moved)) == (PageState.FIRMWARE, PageState.METADATA)
    driver.need(machine, Command.SNP_PAGE_SWAP_OUT, source_spa=moved, destination_spa=out, **fields)
    assert state_of(machine, moved) is PageState.FIRMWARE
    driver.need(machine, Command.SNP_PAGE_SWAP_IN, source_spa=out, destination_spa=moved, **fields)
    assert state_of(machine, moved) is PageState.METADATA


def test_a_policy_can_forbid_swapping(machine, guest):
    context(machine, guest).policy |= PAGE_SWAP_DISABLE_BIT
    fields = {
        "gctx_spa": guest.gctx_spa,
        "source_spa": freeze(machine, guest),
        "destination_spa": firmware_page(machine),
    }
    refused(machine, Command.SNP_PAGE_SWAP_OUT, S.POLICY_FAILURE, root_mdata_en=1, **fields)


# Reclaim, unsmash -----------------------------------------------------------------------------------------------------


def test_reclaim_checks_size_and_alignment_before_state(machine, guest):
    spa = spa_of(machine, GPA)
    refused(machine, Command.SNP_PAGE_RECLAIM, S.INVALID_PAGE_SIZE, page=spa >> 12, page_size=1)
    refused(machine, Command.SNP_PAGE_RECLAIM, S.SUCCESS, page=spa >> 12)
    refused(machine, Command.SNP_PAGE_RECLAIM, S.INVALID_PARAM, page=spa >> 12, reserved_1=1)
    refused(machine, Command.SNP_PAGE_RECLAIM, S.INVALID_ADDRESS, page=1 << 30)
    freeze(machine, guest)
    driver.need(machine, Command.SNP_PAGE_RECLAIM, page=spa >> 12)
    assert state_of(machine, spa) is PageState.GUEST_VALID


def test_512_pages_in_a_row_become_one(machine, guest):
    spa = machine.hypervisor.allocate_pages(512, alignment_bytes=2 * MIB)
    gpa = 0x4000_0000
    for number in range(512):
        pre_guest(machine, guest.asid, gpa + number * 4096, spa=spa + number * 4096)
    pages = asid_pages(machine, guest.asid)
    unsmash = Command.SNP_PAGE_UNSMASH
    refused(machine, unsmash, S.INVALID_PARAM, page_spa=spa + 4096)
    driver.need(machine, unsmash, page_spa=spa)
    entry = read_entry(machine, spa)
    assert (entry.huge, entry.gpa, entry.state) == (True, gpa, PageState.PRE_GUEST)
    assert asid_pages(machine, guest.asid) == pages
    refused(machine, unsmash, S.INVALID_PAGE_STATE, page_spa=spa)


@pytest.mark.parametrize("odd", [0, 17, 511])
def test_one_page_that_differs_prevents_unsmash(machine, guest, odd):
    spa = machine.hypervisor.allocate_pages(512, alignment_bytes=2 * MIB)
    for number in range(512):
        gpa = 0x4000_0000 + number * 4096 if number != odd else 0x9000_1000
        pre_guest(machine, guest.asid, gpa, spa=spa + number * 4096)
    refused(machine, Command.SNP_PAGE_UNSMASH, S.INVALID_PAGE_STATE, page_spa=spa)


def test_a_validated_page_stays_valid_while_it_is_frozen(machine, guest):
    freeze(machine, guest)
    assert read_entry(machine, spa_of(machine, GPA)).low & VALIDATED
    assert machine.apply(Pvalidate(0, GPA, 0, 0)).records[0].exit_code == 0x400
