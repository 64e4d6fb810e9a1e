"""The RMP's checks on every access path: who may do what, and the exact bits of the fault otherwise."""

from __future__ import annotations

import pytest
from sevlab.core.access import AccessKind
from sevlab.core.cpu import FaultUnwind
from sevlab.core.events import Data, Faulted, MemoryRead, MemoryWrite, NptEdit, Party, Space, VmExit
from sevlab.core.testing import make_machine
from sevlab.plugins.snp.layout import PERM_ALL
from sevlab.plugins.snp.records import Pvalidate, RmpAdjust, RmpResult
from sevlab.plugins.snp.rmp_check import NEEDS
from sevlab.plugins.snp.states import snp_state

from tests.plugins.snp.support import C_BIT, rmp_machine, update

GPA = 0x3000
LARGE_GPA = 0x20_0000
P, W, U, ID = 1, 2, 4, 16
RMP, FINAL, WALK, ENC, VMPL = 1 << 31, 1 << 32, 1 << 33, 1 << 34, 1 << 36
READ, WRITE, FETCH = AccessKind.READ, AccessKind.WRITE, AccessKind.FETCH
PRIVATE, TABLE, USER = AccessKind.PRIVATE, AccessKind.TABLE, AccessKind.USER


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "caches"])
def shared(request):
    return rmp_machine(2, caches=request.param)


@pytest.fixture
def machine(shared):
    shared.reset()
    return shared


def spa_of(machine, gpa, vm=0):
    return machine.hypervisor.vms[vm].memory_spa + gpa


def own(machine, gpa=GPA, *, vm=0, validate=True):
    machine.apply(NptEdit(vm, gpa, spa_of(machine, gpa, vm), 4096, 3))
    assert update(machine, spa_of(machine, gpa, vm), gpa=gpa, asid=vm + 1) == 0
    if validate:
        vcpu = machine.hypervisor.vms[vm].vcpu_ids[0]
        assert machine.apply(Pvalidate(vcpu, gpa, 0, 1)).records == (RmpResult(0, False),)


def fault(machine, gpa, kind, vcpu=0):
    """The fault of a guest-physical access as (vector, error code, address); None: it passes."""
    try:
        machine.access.guest_physical(machine.vcpus[vcpu], gpa, kind)
    except FaultUnwind as unwind:
        return tuple(unwind.fault)
    return None


KINDS = [
    pytest.param(PRIVATE, 0, FINAL | ENC, id="read"),
    pytest.param(PRIVATE | WRITE, W, FINAL | ENC, id="write"),
    pytest.param(PRIVATE | FETCH, ID, FINAL | ENC, id="fetch"),
    pytest.param(FETCH, ID, FINAL | ENC, id="a fetch is private whatever the C-bit"),
    pytest.param(TABLE, 0, WALK | ENC, id="page-table read"),
    pytest.param(TABLE | WRITE, W, WALK | ENC, id="accessed or dirty bit"),
]


@pytest.mark.parametrize(("kind", "low", "high"), KINDS)
def test_a_private_access_needs_an_assigned_own_mutable_page_of_the_size_at_its_address(machine, kind, low, high):
    expected = (0x400, P | U | low | RMP | high, GPA)
    machine.apply(NptEdit(0, GPA, spa_of(machine, GPA), 4096, 3))
    assert fault(machine, GPA, kind) == expected  # the hypervisor's page
    for state in (
        {"gpa": GPA, "asid": 2},
        {"gpa": GPA + 0x1000, "asid": 1},
        {"gpa": GPA, "asid": 1, "immutable": 1},
    ):
        machine.reset()
        machine.apply(NptEdit(0, GPA, spa_of(machine, GPA), 4096, 3))
        assert update(machine, spa_of(machine, GPA), **state) == 0
        assert fault(machine, GPA, kind) == expected, state
    machine.reset()
    own(machine)
    assert fault(machine, GPA, kind) is None


@pytest.mark.parametrize(("kind", "low", "high"), KINDS)
def test_page_sizes_of_mapping_and_rmp_must_agree(machine, kind, low, high):
    spa = spa_of(machine, LARGE_GPA)
    assert update(machine, spa, gpa=LARGE_GPA, asid=1, page_size=1) == 0
    assert machine.apply(Pvalidate(0, LARGE_GPA, 1, 1)).records == (RmpResult(0, False),)
    assert fault(machine, LARGE_GPA + 0x5000, kind) is None
    machine.apply(NptEdit(0, LARGE_GPA + 0x5000, spa + 0x5000, 4096, 3))
    expected = (0x400, P | U | low | RMP | high, LARGE_GPA + 0x5000)  # 31 without SIZEM: that is for PVALIDATE
    assert fault(machine, LARGE_GPA + 0x5000, kind) == expected
    machine.apply(NptEdit(0, LARGE_GPA, spa, 1 << 21, 3))
    assert update(machine, spa, assigned=0, page_size=1) == 0
    assert update(machine, spa + 0x5000, gpa=LARGE_GPA + 0x5000, asid=1) == 0
    assert fault(machine, LARGE_GPA + 0x5000, kind) == expected


@pytest.mark.parametrize(("kind", "low", "high"), KINDS)
def test_a_page_that_is_not_validated_is_vc_to_the_guest(machine, kind, low, high):
    own(machine, validate=False)
    assert fault(machine, GPA, kind) == (29, 0x404, GPA)


@pytest.mark.parametrize(("kind", "low", "high"), KINDS)
def test_a_page_without_an_entry_cannot_be_private(machine, kind, low, high):
    machine.apply(NptEdit(0, GPA, 1 << 40, 4096, 3))
    assert fault(machine, GPA, kind) == (0x400, P | U | low | RMP | high, GPA)


PERMISSIONS = [
    (PRIVATE, 1),
    (PRIVATE | WRITE, 3),
    (PRIVATE | FETCH | USER, 4),
    (PRIVATE | FETCH, 8),
    (PRIVATE | TABLE, 1),
    (PRIVATE | TABLE | WRITE, 3),
]


@pytest.mark.parametrize(("kind", "need"), PERMISSIONS)
@pytest.mark.parametrize("granted", range(16))
def test_vmpl_permissions(machine, kind, need, granted):
    """Writing needs reading too: write permission alone is good for nothing."""
    own(machine)
    machine.apply(RmpAdjust(0, GPA, 0, 2 | granted << 8))
    assert fault(machine, GPA, kind) is None
    machine.vcpus[0].vmpl = 2
    found = fault(machine, GPA, kind)
    if granted & need == need:
        assert found is None
    else:
        assert found[0] == 0x400
        assert found[1] & (RMP | VMPL | ENC) == RMP | VMPL | ENC


def test_validated_comes_before_vmpl(machine):
    own(machine, validate=False)
    machine.vcpus[0].vmpl = 3
    assert fault(machine, GPA, PRIVATE) == (29, 0x404, GPA)


def test_every_kind_has_a_need():
    assert all(0 < need <= PERM_ALL for need in NEEDS)


def test_a_shared_write_needs_the_hypervisor_s_page_and_a_shared_read_nothing(machine):
    own(machine)
    assert fault(machine, GPA, READ) is None
    assert fault(machine, GPA, WRITE) == (0x400, P | U | W | RMP | FINAL, GPA)
    assert update(machine, spa_of(machine, GPA), assigned=0) == 0
    assert fault(machine, GPA, WRITE) is None


def test_a_shared_write_through_a_large_mapping_needs_all_of_the_region(machine):
    spa = spa_of(machine, LARGE_GPA)
    assert fault(machine, LARGE_GPA + 0x9000, WRITE) is None
    assert update(machine, spa + 0x5000, gpa=0x5000, asid=2) == 0
    assert fault(machine, LARGE_GPA + 0x9000, WRITE) == (0x400, P | U | W | RMP | FINAL, LARGE_GPA + 0x9000)
    machine.apply(NptEdit(0, LARGE_GPA + 0x9000, spa + 0x9000, 4096, 3))
    assert fault(machine, LARGE_GPA + 0x9000, WRITE) is None


def test_a_guest_without_snp_may_write_and_walk_only_the_hypervisor_s_pages(machine):
    own(machine, GPA, vm=1)
    machine.apply(NptEdit(0, GPA, spa_of(machine, GPA, 1), 4096, 3))
    del snp_state(machine).vcpus[0]
    assert fault(machine, GPA, PRIVATE) is None  # a read is not checked: it sees ciphertext
    assert fault(machine, GPA, PRIVATE | WRITE) == (0x400, P | U | W | RMP | FINAL | ENC, GPA)
    assert fault(machine, GPA, PRIVATE | TABLE) == (0x400, P | U | RMP | WALK | ENC, GPA)


def test_two_guests_do_not_reach_each_other(machine):
    own(machine, GPA, vm=0)
    machine.apply(NptEdit(1, GPA, spa_of(machine, GPA, 0), 4096, 3))
    other = machine.hypervisor.vms[1].vcpu_ids[0]
    for kind in (PRIVATE, PRIVATE | WRITE, WRITE, FETCH):
        assert fault(machine, GPA, kind, other)[0] == 0x400


@pytest.mark.parametrize(
    "party", [Party.HYPERVISOR, pytest.param(Party.DMA, marks=pytest.mark.unverified)], ids=["host", "DMA"]
)
def test_a_host_write_to_an_assigned_page_is_pf_with_bit_31_and_changes_nothing(machine, party):
    own(machine)
    spa = spa_of(machine, GPA)
    machine.access.guest_physical_write(machine.vcpus[0], GPA, b"secret", c_bit=True)
    before = machine.snapshot()
    outcome = machine.apply(MemoryWrite(party, 0, Space.SPA, spa - 1, False, b"xy"))
    assert outcome.records == (Faulted(14, P | W | RMP, spa),)
    assert machine.snapshot() == before
    cipher = machine.apply(MemoryRead(party, 0, Space.SPA, spa, False, 6)).first(Data).data
    assert cipher != b"secret"


def test_the_host_writes_its_own_pages(machine):
    spa = spa_of(machine, GPA)
    machine.apply(MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, spa, False, b"xy"))
    assert machine.apply(MemoryRead(Party.HYPERVISOR, 0, Space.SPA, spa, False, 2)).records == (Data(b"xy"),)


def test_vc_carries_the_linear_address(machine):
    """CR2 is what the guest used, not what its tables made of it; a walk that meets such a page counts too."""
    own(machine, 0x0, validate=True)
    vcpu = machine.vcpus[0]
    gva = 0x1234_5000
    access = machine.access
    access.guest_physical_write(vcpu, 0, (0x1000 | C_BIT | 3).to_bytes(8, "little"), c_bit=True)
    vcpu.system.cr0, vcpu.system.cr4, vcpu.system.efer, vcpu.system.cr3 = 0x8000_0001, 0x20, 0x500, 0
    own(machine, 0x1000, validate=False)
    step = MemoryRead(Party.GUEST, 0, Space.GVA, gva, False, 8)
    assert machine.apply(step).records == (Faulted(29, 0x404, gva),)


def test_a_nested_fault_is_an_exit_with_both_infos(machine):
    outcome = machine.apply(MemoryRead(Party.GUEST, 0, Space.GPA, GPA, True, 8))
    exit_ = outcome.first(VmExit)
    assert (exit_.exit_code, exit_.exit_info_1, exit_.exit_info_2) == (0x400, P | U | RMP | FINAL | ENC, GPA)


def test_nothing_is_checked_before_snpen():
    machine = make_machine("snp", guests=1)
    snp_state(machine).vcpus.clear()
    assert fault(machine, GPA, PRIVATE | WRITE) is None


def test_the_short_way_compares_whole_address_and_asid(machine):
    """Neither a page offset nor an ASID that does not fit an entry makes another page or owner look right."""
    own(machine)
    for offset in (0, 1, 2, 4, 7, 0xFFF):
        assert fault(machine, GPA + offset, PRIVATE) is None
    machine.access.forget()
    spa = spa_of(machine, GPA)
    check, vcpu = machine.slots.access_check, machine.vcpus[0]
    for gpa in (GPA ^ 0x1000, GPA ^ 1 << 12, GPA ^ 1 << 51, GPA ^ 1 << 52):
        assert check(vcpu, spa, gpa, int(PRIVATE)) is not None, hex(gpa)
    for asid in (0, 2, 1 + (1 << 10), 1 + (1 << 31)):
        vcpu.vmcb.guest_asid = asid
        assert check(vcpu, spa, GPA, int(PRIVATE)) is not None, asid


def test_a_change_of_the_table_counts_at_the_next_access(machine):
    """Whoever writes to the table, and however: nothing of it is kept."""
    own(machine)
    assert fault(machine, GPA, PRIVATE) is None
    entry = snp_state(machine).rmp_base + 0x4000 + (spa_of(machine, GPA) >> 12) * 16
    before = machine.memory.read(entry, 16, None)
    for place, bit in ((0, 1), (0, 4), (1, 0x10), (7, 0x40), (8, 1)):
        changed = bytearray(before)
        changed[place] ^= bit
        machine.memory.write(entry, bytes(changed), None, 2)
        assert fault(machine, GPA, PRIVATE) is not None, (place, bit)
        machine.memory.write(entry, before, None, 2)
        assert fault(machine, GPA, PRIVATE) is None
