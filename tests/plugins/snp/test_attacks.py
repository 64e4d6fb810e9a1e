"""What works on plain SEV and what SNP makes of it: each attack fails for its documented reason, or remains."""

from __future__ import annotations

import pytest
from sevlab.core.cpu import FaultUnwind
from sevlab.core.events import Data, MemoryRead, MemoryWrite, NptEdit, Party, Space, VmExit
from sevlab.core.testing import make_machine
from sevlab.plugins.sev import Command, Status, launch_guest
from sevlab.plugins.snp import driver
from sevlab.plugins.snp.driver import LaunchPage
from sevlab.plugins.snp.launch_digest import PageType
from sevlab.plugins.snp.rmp import state_of
from sevlab.plugins.snp.states import PageState, snp_state

from tests.plugins.snp.support import MIB, PRIVATE_GPA, context, talking_machine
from tests.plugins.snp.test_commands import firmware_page, refused

SECRET = b"the guest's own secret, 32 bytes"
OTHER = PRIVATE_GPA + 0x1000
RMP = 1 << 31
NPF, VC, PF = 0x400, 29, 14


@pytest.fixture(scope="module")
def snp():
    machine, (first, _) = talking_machine(guests=2)
    machine.access.guest_physical_write(machine.vcpus[0], PRIVATE_GPA, SECRET, c_bit=True)
    machine.mark()
    return machine, first


@pytest.fixture
def machine(snp):
    snp[0].reset()
    return snp[0]


@pytest.fixture
def plain():
    """A plain SEV guest with the same secret at the same place."""
    machine = make_machine("snp", guests=1, memory_bytes=64 * MIB)
    launch_guest(machine, 0, loads={PRIVATE_GPA: SECRET.ljust(4096, b"\0"), OTHER: b"O" * 4096})
    return machine


def spa(machine, gpa, vm=0):
    return machine.hypervisor.vms[vm].memory_spa + gpa


def host_read(machine, address, count=32):
    return machine.apply(MemoryRead(Party.HYPERVISOR, 0, Space.SPA, address, False, count)).first(Data).data


def host_write(machine, address, data):
    return machine.apply(MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, address, False, data)).records[0]


def guest_read(machine, gpa, count=32, vcpu=0):
    try:
        return machine.access.guest_physical_read(machine.vcpus[vcpu], gpa, count, c_bit=True)
    except FaultUnwind as unwind:
        return unwind.fault


def remap(machine, gpa, address, vm=0):
    machine.apply(NptEdit(vm, gpa, address, 4096, 3))


def test_remapping_works_on_sev_and_is_a_reverse_map_fault_on_snp(plain, machine):
    remap(plain, PRIVATE_GPA, spa(plain, OTHER))
    assert guest_read(plain, PRIVATE_GPA) not in (SECRET, b"")
    assert guest_read(plain, PRIVATE_GPA) == b"O" * 32  # the other page, at the first one's address
    remap(machine, PRIVATE_GPA, spa(machine, OTHER))
    fault = guest_read(machine, PRIVATE_GPA)
    assert (fault.vector, bool(fault.error_code & RMP)) == (NPF, True)


def test_replaying_ciphertext_works_on_sev_and_is_a_write_fault_on_snp(plain, machine):
    for victim, works in ((plain, True), (machine, False)):
        old = host_read(victim, spa(victim, PRIVATE_GPA))
        victim.access.guest_physical_write(victim.vcpus[0], PRIVATE_GPA, b"n" * 32, c_bit=True)
        answer = host_write(victim, spa(victim, PRIVATE_GPA), old)
        if works:
            assert guest_read(victim, PRIVATE_GPA) == SECRET
        else:
            assert (answer.vector, answer.error_code) == (PF, RMP | 3)
            assert guest_read(victim, PRIVATE_GPA) == b"n" * 32


def test_corrupting_a_block_works_on_sev_and_not_on_snp(plain, machine):
    host_write(plain, spa(plain, PRIVATE_GPA), b"\0" * 16)
    assert guest_read(plain, PRIVATE_GPA)[:16] != SECRET[:16]
    assert guest_read(plain, PRIVATE_GPA)[16:] == SECRET[16:]
    assert host_write(machine, spa(machine, PRIVATE_GPA), b"\0" * 16).vector == PF
    assert guest_read(machine, PRIVATE_GPA) == SECRET


def test_dma_into_a_private_page_works_on_sev_and_not_on_snp(plain, machine):
    step = lambda victim: MemoryWrite(Party.DMA, 0, Space.SPA, spa(victim, PRIVATE_GPA), False, b"\0" * 16)
    plain.apply(step(plain))
    assert guest_read(plain, PRIVATE_GPA) != SECRET
    assert machine.apply(step(machine)).records[0].vector == PF
    assert guest_read(machine, PRIVATE_GPA) == SECRET


def test_taking_a_page_and_giving_it_back_is_seen_by_the_guest(machine):
    address = spa(machine, PRIVATE_GPA)
    old = host_read(machine, address)
    assert driver.rmp_update(machine, address) == 0
    host_write(machine, address, old)
    asid = machine.vcpus[0].vmcb.guest_asid
    assert driver.rmp_update(machine, address, gpa=PRIVATE_GPA, assigned=1, asid=asid) == 0
    fault = guest_read(machine, PRIVATE_GPA)
    assert (fault.vector, fault.error_code) == (VC, 0x404)


def test_swapping_two_pages_needs_both_validated_anew(machine):
    for gpa, other in ((PRIVATE_GPA, OTHER), (OTHER, PRIVATE_GPA)):
        asid = machine.vcpus[0].vmcb.guest_asid
        assert driver.rmp_update(machine, spa(machine, gpa), gpa=other, assigned=1, asid=asid) == 0
        remap(machine, other, spa(machine, gpa))
    assert guest_read(machine, PRIVATE_GPA).vector == VC
    assert guest_read(machine, OTHER).vector == VC


def test_running_another_guest_with_this_one_s_asid_does_not_start(machine):
    """Under plain SEV a VMCB with the victim's ASID reads the victim's memory; here the save area is not its own."""
    machine.vcpus[1].vmcb.guest_asid = machine.vcpus[0].vmcb.guest_asid
    machine.hypervisor.enter(machine, machine.vcpus[1])
    assert machine.hypervisor.vms[1].stopped


def test_mapping_a_page_of_another_guest_is_an_ownership_fault(machine):
    remap(machine, PRIVATE_GPA, spa(machine, PRIVATE_GPA), vm=1)
    assert guest_read(machine, PRIVATE_GPA, vcpu=1).vector == NPF


def test_a_save_area_cannot_be_written(machine):
    address = snp_state(machine).vcpus[0].vmsa_spa
    assert host_write(machine, address + 0x178, bytes(8)).vector == PF


def test_moved_blocks_before_the_launch_change_the_digest():
    """Plain SEV's digest does not see where data lies; SNP's has the address of each page."""
    digests = []
    for gpas in ((0x20000, 0x21000), (0x21000, 0x20000)):
        pages = tuple(
            LaunchPage(gpa, PageType.NORMAL, data * 4096) for gpa, data in zip(gpas, (b"a", b"b"), strict=True)
        )
        machine, (guest,) = talking_machine(pages=pages)
        digests.append(context(machine, guest).launch_digest)
    assert digests[0] != digests[1]


def test_debugging_needs_the_policy(snp, machine):
    _, guest = snp
    fields = {
        "gctx_spa": guest.gctx_spa,
        "source_spa": spa(machine, PRIVATE_GPA),
        "destination_spa": firmware_page(machine),
    }
    refused(machine, Command.SNP_DBG_DECRYPT, Status.POLICY_FAILURE, **fields)


def test_a_rolled_back_message_counter_is_noticed(snp, machine):
    """The guest's counter lies in its own memory, the firmware's in its context: the host reaches neither."""
    address = spa(machine, 0x3000)
    assert state_of(machine, address) is PageState.GUEST_VALID
    assert host_write(machine, address + 0xA0, bytes(16)).vector == PF


# What remains ---------------------------------------------------------------------------------------------------------


def test_ciphertext_stays_visible_and_equal_plaintext_equal(machine):
    """Without ciphertext hiding the host reads ciphertext; the same plaintext at the same place looks the same."""
    first = host_read(machine, spa(machine, PRIVATE_GPA))
    machine.access.guest_physical_write(machine.vcpus[0], PRIVATE_GPA, b"n" * 32, c_bit=True)
    second = host_read(machine, spa(machine, PRIVATE_GPA))
    machine.access.guest_physical_write(machine.vcpus[0], PRIVATE_GPA, SECRET, c_bit=True)
    assert host_read(machine, spa(machine, PRIVATE_GPA)) == first != second


def test_denial_of_service_remains(machine):
    driver.rmp_update(machine, spa(machine, PRIVATE_GPA))
    step = MemoryRead(Party.GUEST, 0, Space.GPA, PRIVATE_GPA, True, 8)
    assert machine.apply(step).first(VmExit).exit_code == NPF


def test_the_hypervisor_lies_about_cpuid_to_a_guest_without_the_table(machine):
    """A guest that asks by the GHCB believes the answer; the CPUID page is checked by the firmware."""
    from sevlab.plugins.sev_es import MsrReply, Vmgexit
    from sevlab.plugins.snp.cpuid_table import build_table, corrected_table

    machine.components["sme"].syscfg |= 0
    answer = machine.apply(Vmgexit(0, 0x8000_001F << 32 | 0x004, b"")).first(MsrReply)
    assert answer.value & 0xFFF == 0x005
    lie = build_table(((0x8000_001F, 0, (0xFFFF_FFFF, 0, 0, 0)),), 4096)
    assert corrected_table(machine, lie) != lie


def test_the_same_machine_has_no_protection_before_snpen(plain):
    assert host_write(plain, spa(plain, PRIVATE_GPA), b"x") == ()
