"""SNP commands: automata, order of checks, statuses, effects on pages; a refusal changes nothing."""

from __future__ import annotations

import hashlib

import pytest
from sevlab.core.events import AspCommand, AspStatus, CacheOp, HostMsr
from sevlab.core.testing import make_machine
from sevlab.plugins import sev
from sevlab.plugins.sev import Command, Status, sev_state
from sevlab.plugins.sev import driver as sev_driver
from sevlab.plugins.sev_es import MsrReply, Vmgexit, initial_vmsa, set_up_vcpus
from sevlab.plugins.snp import driver, keys
from sevlab.plugins.snp.automata import SNP_GUEST, SNP_PLATFORM, SnpGuestState, SnpPlatformState
from sevlab.plugins.snp.buffers import (
    FeatureInfoOutput,
    RangeListEntry,
    RangeListHeader,
    SnpGuestStatus,
    SnpPlatformStatus,
)
from sevlab.plugins.snp.command_table import SNP_COMMANDS
from sevlab.plugins.snp.cpuid_table import build_table
from sevlab.plugins.snp.driver import LaunchPage, PageLender
from sevlab.plugins.snp.guest_pages import CpuidEntry, SecretsPage
from sevlab.plugins.snp.launch_digest import NO_DIGEST, PageType, extend
from sevlab.plugins.snp.registers import HWCR, RMP_BASE, VM_HSAVE_PA
from sevlab.plugins.snp.rmp import read_entry, state_of
from sevlab.plugins.snp.states import PageState, SnpVcpu, snp_state

from tests.plugins.snp.support import MIB, VMSA, context, running, snp_machine

S = Status
PAGE = bytes(range(256)) * 16


@pytest.fixture(scope="module")
def shared():
    return snp_machine(2)


@pytest.fixture
def machine(shared):
    shared.reset()
    return shared


def refused(machine, command, status, **fields):
    """The command answers `status` and changes neither the firmware nor memory (but for the command buffer)."""
    driver.put(machine, driver.pages(machine).command_spa, bytes(4096))
    before = machine.snapshot()
    assert driver.run(machine, command, **fields) == status, command.name
    driver.put(machine, driver.pages(machine).command_spa, bytes(4096))
    after = machine.snapshot()
    assert strip(after.state) == strip(before.state)
    assert after.memory.pages == before.memory.pages


def strip(image):
    """The state without the mailbox's registers."""
    tree = dict(image.values)
    tree.pop("asp")
    return tree


def firmware_page(machine):
    spa = machine.hypervisor.allocate_pages(1)
    driver.make_firmware(machine, spa)
    return spa


# Automata -------------------------------------------------------------------------------------------------------------


def test_every_snp_command_is_declared_once():
    numbers = [declared.command for declared in SNP_COMMANDS]
    assert len(set(numbers)) == len(numbers)
    expected = {command for command in Command if command.name.startswith("SNP_")}
    assert set(numbers) == expected


@pytest.mark.parametrize("command", [declared.command for declared in SNP_COMMANDS], ids=lambda command: command.name)
@pytest.mark.parametrize("state", list(SnpPlatformState), ids=lambda state: state.name)
def test_every_platform_pair(machine, state, command):
    snp_state(machine).platform.state = state
    status = driver.run(machine, command)
    assert (status == S.INVALID_PLATFORM_STATE) is not SNP_PLATFORM.allows(state, command)


GUEST_COLUMN = {
    Command.SNP_LAUNCH_START: (1, None, None),
    Command.SNP_LAUNCH_UPDATE: (None, 1, None),
    Command.SNP_LAUNCH_FINISH: (None, 2, None),
    Command.SNP_ACTIVATE: (None, 1, 2),
    Command.SNP_ACTIVATE_EX: (None, 1, 2),
    Command.SNP_GUEST_REQUEST: (None, None, 2),
    Command.SNP_HV_REPORT_REQ: (None, None, 2),
    Command.SNP_GUEST_STATUS: (0, 1, 2),
    Command.SNP_DBG_DECRYPT: (0, 1, 2),
    Command.SNP_DBG_ENCRYPT: (0, 1, 2),
    Command.SNP_PAGE_SWAP_OUT: (None, 1, 2),
    Command.SNP_PAGE_SWAP_IN: (None, 1, 2),
    Command.SNP_PAGE_MOVE: (None, 1, 2),
    Command.SNP_PAGE_MD_INIT: (None, 1, 2),
}


def test_the_guest_automaton_is_the_document_s():
    for command, row in GUEST_COLUMN.items():
        for state, target in zip(SnpGuestState, row, strict=True):
            assert SNP_GUEST.next(state, command) == target, (state, command)
    assert set(SNP_GUEST.messages) == set(GUEST_COLUMN)


# Initialisation -------------------------------------------------------------------------------------------------------


def cold(**settings):
    machine = make_machine("snp", guests=1, memory_bytes=64 * MIB, **settings)
    machine.apply(HostMsr(0xC001_0010, True, driver.SYSCFG_SNP))
    return machine


def test_init_makes_every_asid_dirty_and_every_page_the_hypervisor_s():
    machine = cold()
    assert driver.run(machine, Command.SNP_INIT) == S.SUCCESS
    sev = sev_state(machine)
    assert sev.snp_initialised
    assert sev.rmp_initialised
    assert all(ccx.dirty for ccx in sev.ccxs.values())
    assert driver.run(machine, Command.SNP_DF_FLUSH) == S.WBINVD_REQUIRED
    machine.apply(CacheOp("wbinvd", 0))
    assert driver.run(machine, Command.SNP_DF_FLUSH) == S.SUCCESS


@pytest.mark.parametrize("bit", [19, 23, 24, 25])
def test_init_wants_all_of_syscfg(bit):
    machine = make_machine("snp", guests=1, memory_bytes=64 * MIB)
    machine.apply(HostMsr(0xC001_0010, True, driver.SYSCFG_SNP & ~(1 << bit)))
    refused(machine, Command.SNP_INIT_EX, S.INVALID_CONFIG, init_rmp=1)


def test_init_wants_smmlock_no_save_area_and_an_aligned_table():
    machine = cold()
    snp_state(machine).hwcr = 0
    refused(machine, Command.SNP_INIT_EX, S.INVALID_CONFIG, init_rmp=1)
    machine.apply(HostMsr(HWCR, True, 1))
    machine.apply(HostMsr(HWCR, True, 0))
    machine.apply(HostMsr(VM_HSAVE_PA, True, 0x1000))
    refused(machine, Command.SNP_INIT_EX, S.INVALID_CONFIG, init_rmp=1)
    machine.apply(HostMsr(VM_HSAVE_PA, True, 0))
    base = snp_state(machine).rmp_base
    snp_state(machine).rmp_base = base + 0x2000
    refused(machine, Command.SNP_INIT_EX, S.INVALID_CONFIG, init_rmp=1)
    snp_state(machine).rmp_base = base | 1 << 51
    refused(machine, Command.SNP_INIT_EX, S.UNSUPPORTED, init_rmp=1)
    snp_state(machine).rmp_base = base
    assert machine.apply(HostMsr(RMP_BASE, False, 0)).records[0].value == base
    refused(machine, Command.SNP_INIT_EX, S.RMP_INIT_REQUIRED, init_rmp=0)
    refused(machine, Command.SNP_INIT_EX, S.INVALID_PARAM, init_rmp=0, list_paddr_en=1)
    refused(machine, Command.SNP_INIT_EX, S.INVALID_PARAM, init_rmp=1, reserved_4=1)
    refused(machine, Command.SNP_INIT_EX, S.UNSUPPORTED, init_rmp=1, tio_en=1)
    assert driver.run(machine, Command.SNP_INIT_EX, init_rmp=1) == S.SUCCESS


def test_ranges_of_the_list_become_hv_fixed():
    machine = cold()
    spa = driver.pages(machine).input_spa
    entry = RangeListEntry.build(base=0x80_0000, page_count=3)
    driver.put(machine, spa, RangeListHeader.build(count=1) + entry)
    assert driver.run(machine, Command.SNP_INIT_EX, init_rmp=1, list_paddr_en=1, list_spa=spa) == S.SUCCESS
    assert [state_of(machine, 0x80_0000 + n * 4096) for n in (2, 3)] == [PageState.HV_FIXED, PageState.HYPERVISOR]


@pytest.mark.parametrize(
    "raw",
    [
        RangeListHeader.build(count=1, reserved_4=1) + RangeListEntry.build(base=0x80_0000, page_count=1),
        RangeListHeader.build(count=256),
        RangeListHeader.build(count=1) + RangeListEntry.build(base=0x80_0100, page_count=1),
        RangeListHeader.build(count=1) + RangeListEntry.build(base=0x80_0000, page_count=1, reserved_c=1),
        RangeListHeader.build(count=1) + RangeListEntry.build(base=0, page_count=0xFFFF_FFFF),
    ],
)
def test_a_malformed_list_is_refused(raw):
    machine = cold()
    spa = driver.pages(machine).input_spa
    driver.put(machine, spa, raw)
    refused(machine, Command.SNP_INIT_EX, S.INVALID_PARAM, init_rmp=1, list_paddr_en=1, list_spa=spa)


def test_shutdown_waits_for_sev_and_for_clean_asids(machine):
    assert machine.apply(AspCommand("sev", Command.INIT, 0x1000, bytes(0x14))).first(AspStatus).status == 0
    assert driver.run(machine, Command.SNP_SHUTDOWN_EX, length=8) == S.INVALID_PLATFORM_STATE
    machine.reset()
    refused(machine, Command.SNP_SHUTDOWN_EX, S.INVALID_PARAM, length=8, x86_snp_shutdown=1)
    refused(machine, Command.SNP_SHUTDOWN_EX, S.INVALID_PARAM, length=4)
    guest = running(machine)
    refused(machine, Command.SNP_SHUTDOWN_EX, S.DF_FLUSH_REQUIRED, length=8)
    driver.stop(machine, guest)
    refused(machine, Command.SNP_SHUTDOWN_EX, S.DF_FLUSH_REQUIRED, length=8)
    driver.flush(machine)
    assert driver.run(machine, Command.SNP_SHUTDOWN_EX, length=8) == S.SUCCESS
    assert driver.run(machine, Command.SNP_SHUTDOWN) == S.SUCCESS  # nothing to do
    assert snp_state(machine).platform.state is SnpPlatformState.UNINIT


def test_x86_shutdown_turns_the_checks_off(machine):
    assert driver.run(machine, Command.SNP_SHUTDOWN_EX, length=8, iommu_snp_shutdown=1, x86_snp_shutdown=1) == 0
    assert not machine.components["sme"].syscfg & 1 << 24


def test_legacy_init_needs_an_rmp_once_snp_is_enabled():
    machine = cold()
    assert machine.apply(AspCommand("sev", Command.INIT, 0x1000, bytes(0x14))).first(AspStatus).status == 1
    driver.enable(machine)
    assert machine.apply(AspCommand("sev", Command.INIT, 0x1000, bytes(0x14))).first(AspStatus).status == 0


# Status and configuration ---------------------------------------------------------------------------------------------


def test_platform_status_tells_state_versions_and_tcbs(machine):
    raw = driver.output(machine, Command.SNP_PLATFORM_STATUS, SnpPlatformStatus.SIZE)
    status = SnpPlatformStatus.from_bytes(raw)
    platform = snp_state(machine).platform
    assert (status.state, status.is_rmp_initialized, status.guest_count) == (1, 1, 0)
    assert (status.api_major, status.api_minor) == (1, 55)
    assert (status.current_tcb, status.reported_tcb) == (platform.current_tcb, platform.reported_tcb)
    refused(machine, Command.SNP_PLATFORM_STATUS, S.INVALID_PAGE_STATE, page_spa=0x1000)
    refused(machine, Command.SNP_PLATFORM_STATUS, S.INVALID_PARAM, page_spa=0x1001)
    refused(machine, Command.SNP_PLATFORM_STATUS, S.INVALID_ADDRESS, page_spa=1 << 40)
    refused(machine, Command.SNP_PLATFORM_STATUS, S.INVALID_PARAM, page_spa=snp_state(machine).rmp_base)


def test_config_compares_as_one_number_where_the_firmware_does(machine):
    committed = snp_state(machine).platform.committed_tcb
    refused(machine, Command.SNP_CONFIG, S.INVALID_PARAM, reported_tcb=committed + 1)  # the boot loader's level
    lower = (committed - 1) | 0xFF << 48  # a lower boot loader hides a higher SNP
    assert driver.run(machine, Command.SNP_CONFIG, reported_tcb=lower, mask_chip_id=1) == S.SUCCESS
    assert snp_state(machine).platform.mask_chip_id
    assert driver.run(machine, Command.SNP_CONFIG) == S.SUCCESS
    assert snp_state(machine).platform.reported_tcb == committed
    turin = snp_machine(generation="turin")
    committed = snp_state(turin).platform.committed_tcb
    assert driver.run(turin, Command.SNP_CONFIG, reported_tcb=committed + (1 << 24)) == S.INVALID_PARAM


def test_commit_and_feature_information(machine):
    platform = snp_state(machine).platform
    platform.committed_tcb = platform.reported_tcb = 1
    refused(machine, Command.SNP_COMMIT, S.INVALID_PARAM, length=5)
    assert driver.run(machine, Command.SNP_COMMIT, length=4) == S.SUCCESS
    assert platform.committed_tcb == platform.reported_tcb == platform.current_tcb
    out = driver.pages(machine).output_spa
    for function, eax in ((0, 1), (1, 0x1FF)):
        fields = {"length": 0x10, "ecx_in": function, "feature_info_spa": out}
        assert driver.run(machine, Command.SNP_FEATURE_INFO, **fields) == 0
        assert FeatureInfoOutput.from_bytes(driver.get(machine, out, 16)).eax == eax
    refused(machine, Command.SNP_FEATURE_INFO, S.INVALID_PARAM, length=0x10, ecx_in=2, feature_info_spa=out)
    refused(machine, Command.SNP_FEATURE_INFO, S.INVALID_PAGE_STATE, length=0x10, ecx_in=0, feature_info_spa=0x1000)


def test_a_vlek_is_loaded_for_this_chip_and_the_reported_tcb_only(machine):
    spa = driver.pages(machine).input_spa
    tcb = snp_state(machine).platform.reported_tcb
    fields = {"length": 0x10, "wrapped_spa": spa}
    blob = keys.wrap_vlek(machine, b"provider", tcb, bytes(12))
    driver.put(machine, spa, keys.wrap_vlek(machine, b"provider", tcb - 1, bytes(12)))
    refused(machine, Command.SNP_VLEK_LOAD, S.BAD_SVN, **fields)
    driver.put(machine, spa, blob[:0x20] + bytes((blob[0x20] ^ 1,)) + blob[0x21:])
    refused(machine, Command.SNP_VLEK_LOAD, S.BAD_MEASUREMENT, **fields)
    driver.put(machine, spa, blob)
    refused(machine, Command.SNP_VLEK_LOAD, S.INVALID_PARAM, wrapped_version=1, **fields)
    assert driver.run(machine, Command.SNP_VLEK_LOAD, **fields) == S.SUCCESS
    assert snp_state(machine).platform.vlek == keys.vlek_sticks(b"provider", tcb)[-48:]


def test_set_state_fixes_firmware_pages_for_good(machine):
    spa = machine.hypervisor.allocate_pages(512, alignment_bytes=2 * MIB)
    driver.make_firmware(machine, spa)
    listing = driver.pages(machine).input_spa
    driver.put(machine, listing, RangeListHeader.build(count=1) + RangeListEntry.build(base=spa, page_count=1))
    refused(machine, Command.SNP_PAGE_SET_STATE, S.INVALID_LENGTH, length=8, list_spa=listing)
    assert driver.run(machine, Command.SNP_PAGE_SET_STATE, length=16, list_spa=listing) == S.SUCCESS
    assert state_of(machine, spa) is PageState.HV_FIXED
    refused(machine, Command.SNP_PAGE_SET_STATE, S.INVALID_PAGE_STATE, length=16, list_spa=listing)
    refused(machine, Command.SNP_PAGE_RECLAIM, S.INVALID_PAGE_STATE, page=spa >> 12)


# Guests ---------------------------------------------------------------------------------------------------------------


def test_a_context_needs_a_small_firmware_page(machine):
    refused(machine, Command.SNP_GCTX_CREATE, S.INVALID_PAGE_STATE, page_spa=0x1000)
    refused(machine, Command.SNP_GCTX_CREATE, S.INVALID_PARAM, page_spa=0x1008)
    large = machine.hypervisor.allocate_pages(512, alignment_bytes=2 * MIB)
    assert driver.rmp_update(machine, large, assigned=1, immutable=1, page_size=1) == 0
    refused(machine, Command.SNP_GCTX_CREATE, S.INVALID_PAGE_SIZE, page_spa=large)
    spa = firmware_page(machine)
    driver.need(machine, Command.SNP_GCTX_CREATE, page_spa=spa)
    assert state_of(machine, spa) is PageState.CONTEXT
    refused(machine, Command.SNP_GCTX_CREATE, S.INVALID_PAGE_STATE, page_spa=spa)
    refused(machine, Command.SNP_PAGE_RECLAIM, S.INVALID_PAGE_STATE, page=spa >> 12)
    driver.need(machine, Command.SNP_DECOMMISSION, page_spa=spa)
    assert state_of(machine, spa) is PageState.FIRMWARE
    refused(machine, Command.SNP_DECOMMISSION, S.INVALID_GUEST, page_spa=spa)
    driver.take_back(machine, spa)
    assert state_of(machine, spa) is PageState.HYPERVISOR


GOOD = 1 << 17 | 1 << 16


@pytest.mark.parametrize(
    ("policy", "status"),
    [
        (GOOD, S.SUCCESS),
        (GOOD & ~(1 << 17), S.POLICY_FAILURE),
        (GOOD & ~(1 << 16), S.POLICY_FAILURE),
        (GOOD | 1 << 26, S.POLICY_FAILURE),
        (GOOD | 1 << 63, S.POLICY_FAILURE),
        (GOOD | 1 << 8 | 55, S.SUCCESS),
        (GOOD | 1 << 8 | 56, S.POLICY_FAILURE),
        (GOOD | 2 << 8, S.POLICY_FAILURE),
        (GOOD | 1 << 21, S.SUCCESS),
        (GOOD | 1 << 22, S.POLICY_FAILURE),
        (GOOD | 1 << 23, S.POLICY_FAILURE),
        (GOOD | 1 << 24, S.POLICY_FAILURE),
        (GOOD | 1 << 20, S.SUCCESS),
    ],
)
def test_launch_start_checks_the_policy(machine, policy, status):
    spa = firmware_page(machine)
    driver.need(machine, Command.SNP_GCTX_CREATE, page_spa=spa)
    assert driver.run(machine, Command.SNP_LAUNCH_START, gctx_spa=spa, policy=policy) == status
    assert driver.run(machine, Command.SNP_LAUNCH_START, gctx_spa=0x1000, policy=policy) == S.INVALID_GUEST


def test_old_firmware_knows_no_policy_bit_from_21_on():
    machine = snp_machine(options={"snp": {"report_version": 2}})
    spa = firmware_page(machine)
    driver.need(machine, Command.SNP_GCTX_CREATE, page_spa=spa)
    fields = {"gctx_spa": spa, "policy": GOOD | 1 << 21}
    assert driver.run(machine, Command.SNP_LAUNCH_START, **fields) == S.POLICY_FAILURE


def test_activate_checks_asid_counter_and_flush(machine):
    spa = firmware_page(machine)
    driver.need(machine, Command.SNP_GCTX_CREATE, page_spa=spa)
    refused(machine, Command.SNP_ACTIVATE, S.INVALID_GUEST_STATE, gctx_spa=spa, asid=1)
    driver.need(machine, Command.SNP_LAUNCH_START, gctx_spa=spa, policy=GOOD)
    least = sev_state(machine).min_asid
    for asid in (0, least, 0xFFFF_FFFF):
        refused(machine, Command.SNP_ACTIVATE, S.INVALID_ASID, gctx_spa=spa, asid=asid)
    assert driver.rmp_update(machine, 0x1000, gpa=0, assigned=1, asid=3) == 0
    refused(machine, Command.SNP_ACTIVATE, S.INVALID_CONFIG, gctx_spa=spa, asid=3)
    driver.need(machine, Command.SNP_ACTIVATE, gctx_spa=spa, asid=least - 1)
    refused(machine, Command.SNP_ACTIVATE, S.ACTIVE, gctx_spa=spa, asid=4)
    other = driver.begin_launch(machine, 1)
    assert other.asid != least - 1
    driver.need(machine, Command.SNP_DECOMMISSION, page_spa=other.gctx_spa)
    raw = driver.output(machine, Command.SNP_GUEST_STATUS, SnpGuestStatus.SIZE, gctx_spa=spa)
    status = SnpGuestStatus.from_bytes(raw)
    assert (status.policy, status.asid, status.state) == (GOOD, least - 1, SnpGuestState.LAUNCH)


def test_an_asid_that_ran_needs_a_flush(machine):
    guest = running(machine)
    machine.vcpus[0].halted = True
    assert driver.rmp_update(machine, snp_state(machine).vcpus[0].vmsa_spa) == 0
    driver.stop(machine, guest)
    spa = firmware_page(machine)
    driver.need(machine, Command.SNP_GCTX_CREATE, page_spa=spa)
    driver.need(machine, Command.SNP_LAUNCH_START, gctx_spa=spa, policy=GOOD)
    refused(machine, Command.SNP_ACTIVATE, S.DF_FLUSH_REQUIRED, gctx_spa=spa, asid=guest.asid)
    driver.flush(machine)
    driver.need(machine, Command.SNP_ACTIVATE, gctx_spa=spa, asid=guest.asid)


def test_two_guests_do_not_share_an_asid(machine):
    first = running(machine, 0)
    second = firmware_page(machine)
    driver.need(machine, Command.SNP_GCTX_CREATE, page_spa=second)
    driver.need(machine, Command.SNP_LAUNCH_START, gctx_spa=second, policy=GOOD)
    refused(machine, Command.SNP_ACTIVATE, S.ASID_OWNED, gctx_spa=second, asid=first.asid)


# SNP_LAUNCH_UPDATE ----------------------------------------------------------------------------------------------------


def launching(machine, **fields):
    return driver.begin_launch(machine, 0, **fields)


def spa_of(machine, gpa):
    return machine.hypervisor.vms[0].memory_spa + gpa


@pytest.mark.parametrize("page_type", [PageType.NORMAL, PageType.ZERO, PageType.UNMEASURED, PageType.SECRETS])
def test_a_launched_page_is_measured_encrypted_and_valid(machine, page_type):
    guest = launching(machine)
    page = LaunchPage(0x3000, page_type, PAGE, (1, 3, 5))
    assert driver.load(machine, 0, guest, page) == S.SUCCESS
    contents = hashlib.sha384(PAGE).digest() if page_type == PageType.NORMAL else NO_DIGEST
    expected = extend(NO_DIGEST, page_type, 0x3000, contents, permissions=(1, 3, 5))
    assert context(machine, guest).launch_digest == expected
    entry = read_entry(machine, spa_of(machine, 0x3000))
    assert (entry.state, entry.asid, entry.gpa) == (PageState.GUEST_VALID, guest.asid, 0x3000)
    assert [entry.permissions(level) for level in range(4)] == [0xF, 1, 3, 5]
    snp_state(machine).vcpus[0] = SnpVcpu()
    seen = machine.access.guest_physical_read(machine.vcpus[0], 0x3000, 4096, c_bit=True)
    if page_type == PageType.ZERO:
        assert seen == bytes(4096)
    elif page_type == PageType.SECRETS:
        secrets = SecretsPage.from_bytes(seen)
        assert secrets.format_version == 3
        assert (secrets.vmpck0, secrets.vmpck3) == (
            context(machine, guest).vmpcks[0],
            context(machine, guest).vmpcks[3],
        )
    else:
        assert seen == PAGE
    assert driver.get(machine, spa_of(machine, 0x3000), 4096) != seen


def test_launch_update_checks_in_the_firmware_s_order(machine):
    guest = launching(machine)
    spa = spa_of(machine, 0x3000)
    fields = {"gctx_spa": guest.gctx_spa, "page_spa": spa, "page_type": 1}
    update = Command.SNP_LAUNCH_UPDATE
    refused(machine, update, S.INVALID_PAGE_STATE, **fields)
    assert driver.rmp_update(machine, spa, gpa=0x3000, assigned=1, asid=guest.asid) == 0
    refused(machine, update, S.INVALID_PAGE_STATE, **fields)
    assert driver.rmp_update(machine, spa) == 0
    assert driver.rmp_update(machine, spa, gpa=0x3000, assigned=1, immutable=1, asid=99) == 0
    refused(machine, update, S.INVALID_PAGE_SIZE, **(fields | {"page_size": 1}))
    refused(machine, update, S.INVALID_PAGE_OWNER, **fields)
    driver.need(machine, Command.SNP_PAGE_RECLAIM, page=spa >> 12)
    assert driver.rmp_update(machine, spa, gpa=0x3000, assigned=1, immutable=1, asid=guest.asid) == 0
    refused(machine, update, S.INVALID_PARAM, **(fields | {"page_type": 0}))
    refused(machine, update, S.INVALID_PARAM, **(fields | {"page_type": 7}))
    refused(machine, update, S.INVALID_PARAM, **(fields | {"reserved_c": 1}))
    refused(machine, update, S.INVALID_GUEST, **(fields | {"gctx_spa": 0x1000}))
    driver.load_vmsa(machine, 0, guest, VMSA)
    driver.finish(machine, guest)
    refused(machine, update, S.INVALID_GUEST_STATE, **fields)


def test_a_launch_without_an_asid_is_inactive(machine):
    gctx = firmware_page(machine)
    driver.need(machine, Command.SNP_GCTX_CREATE, page_spa=gctx)
    driver.need(machine, Command.SNP_LAUNCH_START, gctx_spa=gctx, policy=GOOD)
    spa = machine.hypervisor.allocate_pages(1)
    assert driver.rmp_update(machine, spa, gpa=0, assigned=1, immutable=1, asid=5) == 0
    refused(machine, Command.SNP_LAUNCH_UPDATE, S.INACTIVE, gctx_spa=gctx, page_spa=spa, page_type=1)
    refused(machine, Command.SNP_LAUNCH_FINISH, S.INACTIVE, gctx_spa=gctx)


def test_a_large_page_is_512_measurements_and_only_for_some_types(machine):
    guest = launching(machine)
    page = LaunchPage(0x20_0000, PageType.UNMEASURED, bytes(2 * MIB))
    spa = spa_of(machine, 0x20_0000)
    assert driver.rmp_update(machine, spa, gpa=0x20_0000, assigned=1, immutable=1, asid=guest.asid, page_size=1) == 0
    fields = {"gctx_spa": guest.gctx_spa, "page_spa": spa, "page_size": 1}
    for page_type in (PageType.VMSA, PageType.SECRETS, PageType.CPUID):
        refused(machine, Command.SNP_LAUNCH_UPDATE, S.INVALID_PAGE_SIZE, page_type=page_type, **fields)
    assert driver.launch_update(machine, guest, spa, page) == S.SUCCESS
    digest = NO_DIGEST
    for number in range(512):
        digest = extend(digest, PageType.UNMEASURED, 0x20_0000 + number * 4096, NO_DIGEST)
    assert context(machine, guest).launch_digest == digest
    assert state_of(machine, spa + 5 * 4096) is PageState.GUEST_VALID


def test_a_vmsa_is_measured_without_its_tsc_fields_and_gets_the_firmware_s(machine):
    guest = launching(machine, desired_tsc_khz=99_800)
    features = 1 | 1 << 9
    vmsa = bytearray(VMSA)
    vmsa[0x3B0:0x3B8] = features.to_bytes(8, "little")
    vmsa[0x2F0:0x300] = b"\x11" * 16
    spa = machine.hypervisor.allocate_pages(1)
    driver.put(machine, spa, bytes(vmsa))
    assert driver.rmp_update(machine, spa, gpa=0xFFFF_FFFF_F000, assigned=1, immutable=1, asid=guest.asid) == 0
    page = LaunchPage(0xFFFF_FFFF_F000, PageType.VMSA, bytes(vmsa))
    assert driver.launch_update(machine, guest, spa, page) == S.SUCCESS
    measured = bytes(vmsa[:0x2F0]) + bytes(16) + bytes(vmsa[0x300:])
    contents = hashlib.sha384(measured).digest()
    assert context(machine, guest).launch_digest == extend(NO_DIGEST, PageType.VMSA, 0xFFFF_FFFF_F000, contents)
    stored = machine.memory.read(spa, 4096, context(machine, guest).key(machine))
    assert stored[0x2F0:0x2F8] == (1 << 32).to_bytes(8, "little")
    assert stored[0x380:0x390] == bytes(8) + b"\xff" * 8
    assert read_entry(machine, spa).low >> 61 & 1


@pytest.mark.unverified
def test_a_wrong_cpuid_page_is_corrected_in_place_and_taken_the_second_time(machine):
    guest = launching(machine)
    truth = machine.cpuid(None, 0x8000_001F, 0)
    wrong = (0xFFFF_FFFF, truth[1], truth[2], truth[3])
    table = build_table(((0x8000_001F, 0, wrong), (0x4000_0000, 0, (1, 2, 3, 4))), 4096)
    spa = spa_of(machine, 0x4000)
    page = LaunchPage(0x4000, PageType.CPUID, table)
    assert driver.load(machine, 0, guest, page) == S.INVALID_PARAM
    assert context(machine, guest).launch_digest == NO_DIGEST
    assert state_of(machine, spa) is PageState.PRE_GUEST
    corrected = driver.get(machine, spa, 4096)
    assert CpuidEntry.from_bytes(corrected[16:64]).eax == truth[0]
    assert corrected[64:112] == table[64:112]
    assert driver.launch_update(machine, guest, spa, page) == S.SUCCESS
    assert context(machine, guest).launch_digest == extend(NO_DIGEST, PageType.CPUID, 0x4000, NO_DIGEST)


def test_an_imi_page_extends_both_digests(machine):
    guest = launching(machine, imi_en=1)
    assert driver.load(machine, 0, guest, LaunchPage(0x3000, 1, PAGE)) == S.INVALID_PARAM
    fields = {"gctx_spa": guest.gctx_spa, "page_spa": spa_of(machine, 0x3000), "page_type": 1, "imi_page": 1}
    driver.need(machine, Command.SNP_LAUNCH_UPDATE, **fields)
    state = context(machine, guest)
    assert state.launch_digest == state.imi_digest != NO_DIGEST
    refused(machine, Command.SNP_LAUNCH_FINISH, S.INVALID_GUEST_STATE, gctx_spa=guest.gctx_spa)


def test_finish_without_an_id_block_leaves_the_identity_zero(machine):
    guest = running(machine, auth_key_en=1, host_data=b"h" * 32, vcek_dis=1)
    state = context(machine, guest)
    assert state.state is SnpGuestState.RUNNING
    assert (state.id_key_digest, state.author_key_en, state.host_data, state.vcek_dis) == (
        bytes(48),
        True,
        b"h" * 32,
        True,
    )


def test_a_migration_agent_must_be_a_guest_that_cannot_migrate_itself(machine):
    agent = running(machine, 0)
    gctx = firmware_page(machine)
    driver.need(machine, Command.SNP_GCTX_CREATE, page_spa=gctx)
    fields = {"gctx_spa": gctx, "ma_en": 1, "ma_gctx_spa": agent.gctx_spa}
    start = Command.SNP_LAUNCH_START
    refused(machine, start, S.POLICY_FAILURE, policy=GOOD, **fields)
    refused(machine, start, S.INVALID_GUEST, policy=GOOD | 1 << 18, **(fields | {"ma_gctx_spa": 0x1000}))
    context(machine, agent).policy |= 1 << 18
    refused(machine, start, S.POLICY_FAILURE, policy=GOOD | 1 << 18, **fields)
    context(machine, agent).policy &= ~(1 << 18)
    driver.need(machine, start, policy=GOOD | 1 << 18, **fields)
    child = snp_state(machine).platform.guests[gctx]
    assert child.report_id_ma == context(machine, agent).report_id
    assert context(machine, agent).report_id_ma == b"\xff" * 32


# Legacy commands under SNP --------------------------------------------------------------------------------------------


def test_a_legacy_command_answers_only_in_a_firmware_page_and_leaves_it_to_be_reclaimed(machine):
    spa = machine.hypervisor.allocate_pages(1)
    status = machine.apply(AspCommand("sev", Command.PLATFORM_STATUS, spa, bytes(12))).first(AspStatus).status
    assert status == 0x5A
    driver.make_firmware(machine, spa)
    assert PageLender().ring(machine, Command.PLATFORM_STATUS, spa).status == S.SUCCESS
    assert state_of(machine, spa) is PageState.RECLAIM
    assert driver.rmp_update(machine, spa) == 0
    assert driver.get(machine, spa, 2) == b"\x01\x37"


def test_the_driver_lends_its_buffers_and_gets_them_back(machine):
    """The same calls as without SNP; whatever the command ends in, the pages are the host's again."""
    spa = machine.hypervisor.allocate_pages(2)
    for place in (0, spa, spa + 0xFFA):
        reply = sev.run(machine, Command.PLATFORM_STATUS, buffer_spa=place)
        assert (reply.status, reply.buffer.api_major, reply.buffer.api_minor) == (0, 1, 0x37)
    assert sev.run(machine, Command.GUEST_STATUS, buffer_spa=spa, handle=77).status != 0
    assert state_of(machine, spa) is state_of(machine, spa + 0x1000) is PageState.HYPERVISOR


def test_a_legacy_launch_is_begun_measured_and_ended_while_snp_is_initialised(machine):
    guest = sev.launch_guest(machine, 0, asid=sev.sev_state(machine).min_asid)
    assert any(guest.measurement)
    sev.stop_guest(machine, guest)


def test_a_legacy_command_without_an_answer_takes_any_buffer(machine):
    assert machine.apply(AspCommand("sev", Command.INIT, 0x1000, bytes(0x14))).first(AspStatus).status == 0


def legacy(machine, command, **fields):
    """The firmware's own answer: the command's buffer is lent, what it writes is not."""
    spa = machine.hypervisor.allocate_pages(1)
    driver.put(machine, spa, sev_driver.BUFFERS[command].build(**fields))
    if command in sev_driver.ANSWERING:
        driver.make_firmware(machine, spa)
    return PageLender().ring(machine, command, spa).status


def test_a_legacy_output_page_must_be_firmware_too(machine):
    machine.apply(AspCommand("sev", Command.INIT, 0x1000, bytes(0x14)))
    target = machine.hypervisor.allocate_pages(1)
    assert legacy(machine, Command.GET_ID, spa=target, length=64) == S.INVALID_PAGE_STATE
    driver.make_firmware(machine, target)
    assert legacy(machine, Command.GET_ID, spa=target, length=64) == S.SUCCESS
    assert any(driver.get(machine, target, 64))


@pytest.mark.parametrize("state", ["the hypervisor's", "another guest's", "the RMP's"])
def test_the_firmware_encrypts_no_page_in_place_that_is_not_its_own(machine, state):
    """The published firmware wants Firmware or Default for LAUNCH_UPDATE_DATA, as for every page that it writes."""
    guest = sev.begin_launch(machine, 0, asid=sev.sev_state(machine).min_asid)
    target = machine.hypervisor.allocate_pages(1)
    if state == "another guest's":
        assert driver.rmp_update(machine, target, assigned=1, immutable=1, asid=3) == 0
    elif state == "the RMP's":
        target = snp_state(machine).rmp_base
    before = machine.memory.dram(target, 4096)
    status = legacy(machine, Command.LAUNCH_UPDATE_DATA, handle=guest.handle, spa=target, length=4096)
    assert status == (S.INVALID_ADDRESS if state == "the RMP's" else S.INVALID_PAGE_STATE)
    assert machine.memory.dram(target, 4096) == before
    fresh = machine.hypervisor.allocate_pages(1)
    driver.make_firmware(machine, fresh)
    assert legacy(machine, Command.LAUNCH_UPDATE_DATA, handle=guest.handle, spa=fresh, length=4096) == S.SUCCESS


def test_sev_and_sev_es_guests_are_launched_beside_snp_and_get_their_pages_back():
    """The driver gives what a command writes to the firmware and reclaims it, as Linux does."""
    machine = snp_machine(guests=2)
    loads = {0x1000: b"beside" + bytes(0x2FFA)}
    plain = sev.launch_guest(machine, 0, asid=sev.sev_state(machine).min_asid, loads=loads)
    vm = machine.hypervisor.vms[0]
    assert all(state_of(machine, vm.memory_spa + n * 4096) is PageState.HYPERVISOR for n in range(5))
    assert machine.access.guest_physical_read(machine.vcpus[0], 0x1000, 6, c_bit=True) == b"beside"
    assert machine.memory.dram(vm.memory_spa + 0x1000, 6) != b"beside"
    target = machine.hypervisor.allocate_pages(1)
    decrypt = {"handle": plain.handle, "source_spa": vm.memory_spa + 0x1000, "destination_spa": target, "length": 16}
    sev.need(machine, Command.DBG_DECRYPT, **decrypt)
    assert driver.get(machine, target, 6) == b"beside"
    assert state_of(machine, target) is PageState.HYPERVISOR
    sev.need(machine, Command.SHUTDOWN)

    es = sev.launch_guest(machine, 1, policy=sev.Policy.ES, loads=loads, vmsas=[initial_vmsa()])
    set_up_vcpus(machine, 1)
    assert es.asid < sev.sev_state(machine).min_asid
    assert state_of(machine, machine.vcpus[1].vmcb.vmsa_pa) is PageState.HYPERVISOR
    assert machine.apply(Vmgexit(1, 0x002, b"")).first(MsrReply).value & 0xFFF == 1
    tmr = machine.components["sev.driver"].tmr_spa
    assert state_of(machine, tmr) is state_of(machine, tmr + 0x1F_F000) is PageState.FIRMWARE
