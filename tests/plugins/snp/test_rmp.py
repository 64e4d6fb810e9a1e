"""RMPUPDATE, PSMASH, RMPREAD, PVALIDATE, RMPADJUST, RMPQUERY: codes, sizes, counters; RMP initialisation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.events import Data, Faulted, HostCpuid, HostMsr, MemoryWrite, NptEdit, Party, Refused, Space, VmExit
from sevlab.core.testing import assert_changes_nothing, assert_offsets, make_machine
from sevlab.plugins.sme import SYSCFG
from sevlab.plugins.snp.layout import PERM_ALL, RmpEntry, RmpState
from sevlab.plugins.snp.records import Psmash, Pvalidate, RmpAdjust, RmpQueried, RmpQuery, RmpRead, RmpResult, RmpUpdate
from sevlab.plugins.snp.registers import RMP_BASE, RMP_END
from sevlab.plugins.snp.rmp import asid_pages, initialize_rmp, read_entry, state_of
from sevlab.plugins.snp.states import PageState, snp_state

from tests.plugins.snp.support import MIB, rmp_machine, update

GPA = 0x1000
NPF_FINAL = 1 << 32
RMP = 1 << 31
ENC, SIZEM, VMPL = 1 << 34, 1 << 35, 1 << 36


@pytest.fixture(scope="module")
def shared():
    return rmp_machine()


@pytest.fixture
def machine(shared):
    shared.reset()
    return shared


def spa_of(machine, gpa, vm=0):
    return machine.hypervisor.vms[vm].memory_spa + gpa


def map_small(machine, gpa, vm=0):
    machine.apply(NptEdit(vm, gpa & -4096, spa_of(machine, gpa & -4096, vm), 4096, 3))


def own(machine, gpa=GPA, *, asid=1, validate=True):
    """Give the 4 KiB page at `gpa` to guest 0."""
    map_small(machine, gpa)
    assert update(machine, spa_of(machine, gpa), gpa=gpa, asid=asid) == 0
    if validate:
        assert machine.apply(Pvalidate(0, gpa, 0, 1)).records == (RmpResult(0, False),)


def own_large(machine, gpa=0x20_0000, *, validate=True):
    assert update(machine, spa_of(machine, gpa), gpa=gpa, asid=1, page_size=1) == 0
    if validate:
        assert machine.apply(Pvalidate(0, gpa, 1, 1)).records == (RmpResult(0, False),)


def test_layouts_have_the_published_offsets():
    assert_offsets(RmpState, {"gpa": (0, 8), "assigned": (8, 1), "immutable": (10, 1), "asid": (12, 4)}, 16)
    assert_offsets(RmpEntry, {"vmpl0": (8, 1), "vmpl3": (11, 1)}, 16)


# RMPUPDATE --------------------------------------------------------------------------------------------------------


def test_rmpupdate_gives_a_page_that_only_vmpl0_may_use_and_that_is_not_validated(machine):
    own(machine, validate=False)
    entry = read_entry(machine, spa_of(machine, GPA))
    assert (entry.state, entry.gpa, entry.asid) == (PageState.GUEST_INVALID, GPA, 1)
    assert [entry.permissions(level) for level in range(4)] == [PERM_ALL, 0, 0, 0]


@pytest.mark.unverified
@pytest.mark.parametrize(
    ("change", "rax"),
    [
        ({}, 0),
        ({"assigned": 2}, 1),
        ({"immutable": 2}, 1),
        ({"reserved": 1}, 1),
        ({"huge_region": 1}, 1),
        ({"page_size_reserved": 1}, 1),
        ({"asid": 0x3FF}, 0),
        ({"asid": 0x400}, 1),
        ({"gpa": 0x1001}, 1),
        ({"gpa": (1 << 51) - 4096}, 0),
        ({"gpa": 1 << 51}, 1),
        ({"page_size": 1, "gpa": 0}, 1),
        ({"assigned": 0}, 1),
        ({"assigned": 0, "asid": 0}, 0),
        ({"assigned": 0, "asid": 0, "immutable": 1}, 1),
        ({"asid": 0, "immutable": 1}, 1),
        ({"asid": 0, "immutable": 1, "gpa": 0}, 0),
    ],
    ids=str,
)
def test_rmpupdate_checks_its_input(machine, change, rax):
    state = RmpState.build(**({"gpa": GPA, "assigned": 1, "asid": 1} | change))
    step = RmpUpdate(spa_of(machine, GPA), state)
    if rax:
        assert assert_changes_nothing(machine, step).records == (RmpResult(rax, False),)
    else:
        assert machine.apply(step).records == (RmpResult(0, False),)


def test_rmpupdate_of_a_large_page_needs_aligned_addresses_and_no_assigned_part(machine):
    spa = spa_of(machine, 0x20_0000)
    assert update(machine, spa, gpa=0x20_1000, asid=1, page_size=1) == 1
    assert update(machine, spa + 4096, gpa=0x20_0000, asid=1, page_size=1) == 1
    assert update(machine, spa + 8 * 4096, gpa=0x20_8000, asid=1) == 0
    assert update(machine, spa, gpa=0x20_0000, asid=1, page_size=1) == 4
    assert update(machine, spa + 8 * 4096, assigned=0) == 0
    assert update(machine, spa, gpa=0x20_0000, asid=1, page_size=1) == 0


def test_a_part_of_a_large_page_cannot_be_updated_alone(machine):
    own_large(machine)
    spa = spa_of(machine, 0x20_0000)
    assert update(machine, spa + 4096, assigned=0) == 4
    assert update(machine, spa, assigned=0) == 4
    assert update(machine, spa, assigned=0, page_size=1) == 0
    assert state_of(machine, spa) is PageState.HYPERVISOR
    assert state_of(machine, spa + 511 * 4096) is PageState.HYPERVISOR


def test_an_update_that_moves_a_page_rescinds_it(machine):
    own(machine)
    spa = spa_of(machine, GPA)
    assert update(machine, spa, gpa=GPA, asid=1) == 0
    assert state_of(machine, spa) is PageState.GUEST_VALID
    assert update(machine, spa, gpa=GPA + 0x1000, asid=1) == 0
    assert state_of(machine, spa) is PageState.GUEST_INVALID


@pytest.mark.unverified
def test_rmpupdate_refuses_what_only_the_asp_may_change(machine):
    spa = spa_of(machine, GPA)
    assert update(machine, spa, immutable=1) == 0
    assert update(machine, spa, assigned=0) == 2
    table = snp_state(machine).rmp_base
    assert state_of(machine, table) is PageState.FIRMWARE
    assert update(machine, table, assigned=0) == 2


def test_the_vmsa_of_a_running_vcpu_is_in_use(machine):
    own(machine)
    spa = spa_of(machine, GPA)
    snp_state(machine).vcpus[0].vmsa_spa = spa
    assert update(machine, spa, assigned=0) == 3
    machine.vcpus[0].halted = True
    assert update(machine, spa, assigned=0) == 0


@pytest.mark.unverified
def test_pages_are_counted_for_each_asid(machine):
    assert asid_pages(machine, 1) == 0
    own(machine)
    own(machine, GPA + 0x1000)
    assert asid_pages(machine, 1) == 2
    own_large(machine)
    assert asid_pages(machine, 1) == 514
    machine.apply(Psmash(spa_of(machine, 0x20_0000)))
    assert asid_pages(machine, 1) == 514
    update(machine, spa_of(machine, GPA), gpa=GPA, asid=2)
    assert (asid_pages(machine, 1), asid_pages(machine, 2)) == (513, 1)


@pytest.mark.unverified
def test_without_snp_the_instructions_are_undefined():
    machine = make_machine("snp", guests=1)
    steps = (RmpUpdate(0x1000, RmpState.build()), Psmash(0), RmpRead(0), Pvalidate(0, 0, 0, 1), RmpQuery(0, 0, 1))
    for step in steps:
        assert assert_changes_nothing(machine, step).records == (Faulted(6, 0, 0),)


@given(spa=st.integers(0, (1 << 64) - 1), state=st.binary(min_size=14, max_size=18))
def test_rmpupdate_takes_any_bytes(shared, spa, state):
    shared.reset()
    outcome = shared.apply(RmpUpdate(spa, state))
    assert isinstance(outcome.records[0], Refused if len(state) != 16 else RmpResult)


# PSMASH, RMPREAD --------------------------------------------------------------------------------------------------


def test_psmash_keeps_state_owner_and_rights_of_every_part(machine):
    own_large(machine)
    spa = spa_of(machine, 0x20_0000)
    machine.apply(RmpAdjust(0, 0x20_0000, 1, 2 | 0x3 << 8))
    assert machine.apply(Psmash(spa)).records == (RmpResult(0, False),)
    for number in (0, 1, 255, 511):
        entry = read_entry(machine, spa + number * 4096)
        assert (entry.state, entry.gpa, entry.huge) == (PageState.GUEST_VALID, 0x20_0000 + number * 4096, False)
        assert (entry.permissions(0), entry.permissions(2)) == (PERM_ALL, 3)
    assert update(machine, spa + 4096, assigned=0) == 0
    assert update(machine, spa, gpa=0x20_0000, asid=1, page_size=1) == 4


@pytest.mark.unverified
def test_psmash_refuses_a_4_kib_page_a_misaligned_address_and_what_has_no_entry(machine):
    spa = spa_of(machine, 0x20_0000)
    assert machine.apply(Psmash(spa)).records[0].rax == 1
    assert update(machine, spa, gpa=0x20_0000, asid=1) == 0
    assert machine.apply(Psmash(spa)).records[0].rax == 1
    assert machine.apply(Psmash(spa + 4096)).records[0].rax == 1
    assert machine.apply(Psmash(1 << 40)).records[0].rax == 4
    assert update(machine, spa, assigned=0) == 0
    assert update(machine, spa, gpa=0x20_0000, asid=1, page_size=1, immutable=1) == 0
    assert machine.apply(Psmash(spa)).records[0].rax == 2


@pytest.mark.unverified
def test_rmpread_gives_the_architectural_part(machine):
    own(machine)
    outcome = machine.apply(RmpRead(spa_of(machine, GPA) + 5))
    assert outcome.first(RmpResult).rax == 0
    state = RmpState.from_bytes(outcome.first(Data).data)
    assert (state.gpa, state.assigned, state.page_size, state.immutable, state.asid) == (GPA, 1, 0, 0, 1)
    assert machine.apply(RmpRead(1 << 40)).records == (RmpResult(1, False),)


# PVALIDATE --------------------------------------------------------------------------------------------------------


def test_pvalidate_twice_sets_carry(machine):
    own(machine)
    assert assert_changes_nothing(machine, Pvalidate(0, GPA, 0, 1)).records == (RmpResult(0, True),)
    assert machine.apply(Pvalidate(0, GPA, 0, 0)).records == (RmpResult(0, False),)
    assert machine.apply(Pvalidate(0, GPA, 0, 0)).records == (RmpResult(0, True),)


def npf(machine, step):
    exit_ = assert_only_exits(machine, step)
    assert exit_.exit_code == 0x400
    return exit_.exit_info_1, exit_.exit_info_2


def assert_only_exits(machine, step):
    return machine.apply(step).first(VmExit)


def test_pvalidate_of_4_kib_in_a_large_page_exits_with_sizem(machine):
    own_large(machine, validate=False)
    code, gpa = npf(machine, Pvalidate(0, 0x20_3000, 0, 1))
    assert (code & (RMP | ENC | SIZEM | VMPL), gpa) == (RMP | ENC | SIZEM, 0x20_3000)
    assert code & (NPF_FINAL | 1) == NPF_FINAL | 1


def test_pvalidate_of_2_mib_in_small_pages_is_a_size_mismatch(machine):
    assert update(machine, spa_of(machine, 0x20_0000), gpa=0x20_0000, asid=1) == 0
    assert machine.apply(Pvalidate(0, 0x20_0000, 1, 1)).records == (RmpResult(6, False),)


def test_pvalidate_checks_its_input(machine):
    own_large(machine, validate=False)
    assert machine.apply(Pvalidate(0, 0x20_1000, 1, 1)).records == (RmpResult(1, False),)
    assert machine.apply(Pvalidate(0, 0x20_0000, 2, 1)).records == (RmpResult(1, False),)


@pytest.mark.parametrize(
    "change",
    [{"asid": 2}, {"gpa": 0x3000}, {"immutable": 1}, {"assigned": 0, "asid": 0, "gpa": 0}],
    ids=["another owner", "another address", "immutable", "the hypervisor's"],
)
def test_pvalidate_of_what_is_not_the_guest_s_exits_with_the_rmp_bit(machine, change):
    map_small(machine, GPA)
    assert update(machine, spa_of(machine, GPA), **({"gpa": GPA, "asid": 1} | change)) == 0
    code, gpa = npf(machine, Pvalidate(0, GPA, 0, 1))
    assert (code & (RMP | ENC | SIZEM | VMPL), gpa) == (RMP | ENC, GPA)


@pytest.mark.unverified
def test_pvalidate_needs_vmpl0_and_cpl0(machine):
    own(machine)
    machine.vcpus[0].vmpl = 1
    assert machine.apply(Pvalidate(0, GPA, 0, 0)).records == (Faulted(13, 0, 0),)
    machine.vcpus[0].vmpl = 0
    machine.vcpus[0].system.cpl = 3
    assert machine.apply(Pvalidate(0, GPA, 0, 0)).records == (Faulted(13, 0, 0),)


# RMPADJUST, RMPQUERY ----------------------------------------------------------------------------------------------


@pytest.mark.unverified
def test_rmpadjust_grants_and_rmpquery_tells(machine):
    own(machine)
    assert machine.apply(RmpAdjust(0, GPA, 0, 2 | 0x5 << 8)).records == (RmpResult(0, False),)
    outcome = machine.apply(RmpQuery(0, GPA, 2))
    assert outcome.first(RmpQueried) == RmpQueried(0x500, 0)
    assert machine.apply(RmpQuery(0, GPA, 4)).records == (RmpResult(1, False),)
    assert machine.apply(RmpQuery(0, GPA, 0)).records == (RmpResult(2, False),)


def test_rmpadjust_reaches_only_less_privileged_levels(machine):
    own(machine)
    assert machine.apply(RmpAdjust(0, GPA, 0, 0 | 0xF << 8)).records == (RmpResult(2, False),)
    machine.apply(RmpAdjust(0, GPA, 0, 1 | 0x3 << 8))
    machine.vcpus[0].vmpl = 1
    assert machine.apply(RmpAdjust(0, GPA, 0, 1 | 0x1 << 8)).records == (RmpResult(2, False),)
    assert machine.apply(RmpAdjust(0, GPA, 0, 2 | 0x7 << 8)).records == (RmpResult(2, False),)
    assert machine.apply(RmpAdjust(0, GPA, 0, 2 | 0x3 << 8)).records == (RmpResult(0, False),)
    assert machine.apply(RmpAdjust(0, GPA, 0, 2 | 0x3 << 8 | 1 << 16)).records == (RmpResult(2, False),)


@pytest.mark.unverified
@pytest.mark.parametrize("rdx", [1 << 17 | 1, 1 | 0x20 << 8, 4, 0xFF], ids=hex)
def test_rmpadjust_refuses_reserved_bits_and_levels_that_are_not(machine, rdx):
    own(machine)
    assert assert_changes_nothing(machine, RmpAdjust(0, GPA, 0, rdx)).records == (RmpResult(1, False),)


def test_vmpl0_makes_a_page_a_vmsa_and_none(machine):
    own(machine)
    spa = spa_of(machine, GPA)
    assert machine.apply(RmpAdjust(0, GPA, 0, 1 | 1 << 16)).records == (RmpResult(0, False),)
    assert RmpEntry.from_bytes(machine.memory.read(entry_spa(machine, spa), 16, None)).vmsa == 1
    assert machine.apply(RmpAdjust(0, GPA, 0, 1)).records == (RmpResult(0, False),)
    assert RmpEntry.from_bytes(machine.memory.read(entry_spa(machine, spa), 16, None)).vmsa == 0


def entry_spa(machine, spa):
    return snp_state(machine).rmp_base + 0x4000 + (spa >> 12) * 16


def test_rmpadjust_of_a_page_that_is_not_validated_is_vc(machine):
    own(machine, validate=False)
    assert machine.apply(RmpAdjust(0, GPA, 0, 1)).records == (Faulted(29, 0x404, GPA),)


# Registers and initialisation -------------------------------------------------------------------------------------


def test_syscfg_is_latched_by_snpen(machine):
    machine.apply(HostMsr(SYSCFG, True, 0))
    assert machine.apply(HostMsr(SYSCFG, False, 0)).records[0].value & 1 << 24


@pytest.mark.unverified
def test_the_rmp_registers_lock_with_snp_and_need_8_kib(machine):
    base = machine.apply(HostMsr(RMP_BASE, False, 0)).records[0].value
    assert base == snp_state(machine).rmp_base
    assert base % MIB == 0
    assert machine.apply(HostMsr(RMP_BASE, True, base)).records == (Faulted(13, 0, 0),)
    fresh = make_machine("snp")
    for msr, good, bad in ((RMP_BASE, 0x10_0000, 0x10_1000), (RMP_END, 0x11_FFFF, 0x12_0000)):
        assert fresh.apply(HostMsr(msr, True, bad)).records == (Faulted(13, 0, 0),)
        fresh.apply(HostMsr(msr, True, good))
        assert fresh.apply(HostMsr(msr, False, 0)).records[0].value == good


def test_a_memory_without_room_has_no_table():
    machine = make_machine("snp", guests=1, memory_bytes=19 * MIB)
    assert snp_state(machine).rmp_base == 0


def test_cpuid_announces_snp(machine):
    eax, ebx = machine.apply(HostCpuid(0x8000_001F, 0)).records[0][:2]
    assert eax & 1 << 4
    assert eax & 1 << 5
    assert ebx >> 12 & 0xF == 4


def test_a_part_without_snp_neither_announces_nor_enables_it():
    machine = make_machine("snp", generation="rome")
    assert not machine.apply(HostCpuid(0x8000_001F, 0)).records[0].eax & (1 << 4 | 1 << 5)
    machine.apply(HostMsr(SYSCFG, True, 1 << 23 | 1 << 24 | 1 << 25))
    assert machine.apply(HostMsr(SYSCFG, False, 0)).records[0].value & (1 << 24 | 1 << 25) == 0


def test_initialisation_makes_dram_the_hypervisor_s_and_protects_the_table(machine):
    own(machine)
    initialize_rmp(machine, ((0x80_0000, 2),))
    assert state_of(machine, spa_of(machine, GPA)) is PageState.HYPERVISOR
    assert [state_of(machine, 0x80_0000 + n * 4096).name for n in (0, 1, 2)] == ["HV_FIXED", "HV_FIXED", "HYPERVISOR"]
    state = snp_state(machine)
    for spa in (state.rmp_base, state.rmp_end & -4096):
        assert state_of(machine, spa) is PageState.FIRMWARE
        step = MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, spa, False, b"x")
        assert assert_changes_nothing(machine, step).records == (Faulted(14, 0x8000_0003, spa),)
    assert asid_pages(machine, 1) == 0


def test_a_write_to_the_table_counts_at_once(machine):
    """The truth is the table: what a debugger writes there is what the next check sees."""
    own(machine)
    spa = spa_of(machine, GPA)
    machine.memory.write(entry_spa(machine, spa), bytes(16), None, 2)
    assert machine.apply(MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, spa, False, b"x")).records[0] == ()
