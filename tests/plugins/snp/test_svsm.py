"""The SVSM's core protocol: a guest at VMPL1 validates pages, makes vCPUs, and notices a call that was not taken."""

from __future__ import annotations

import pytest
from sevlab.core.events import Done, Faulted, MemoryRead, Party, Refused, Space, VmExit
from sevlab.plugins.sev_es import ForgeMsr, Vmgexit
from sevlab.plugins.snp.hypervisor import host_vcpu, make_private
from sevlab.plugins.snp.records import CreateAp, Pvalidate, RmpAdjust
from sevlab.plugins.snp.rmp import read_entry, state_of
from sevlab.plugins.snp.states import PageState
from sevlab.plugins.snp.svsm import SvsmAnswered, SvsmCall, SvsmPvalidate, SvsmPvalidateEntry

from tests.plugins.snp.support import PRIVATE_GPA, snp_vmsa, talking_machine

VMSA_GPA, CAA, LIST, NEW = PRIVATE_GPA + 0x1000, PRIVATE_GPA, PRIVATE_GPA + 0x2000, PRIVATE_GPA + 0x3000
FRESH = 0x18_0000


@pytest.fixture(scope="module")
def shared():
    """The boot VMPL0 is the SVSM; the guest runs at VMPL1 with its calling area and its list."""
    machine, _ = talking_machine(features=0b111111)
    for gpa in (CAA, LIST, NEW):
        assert machine.apply(RmpAdjust(0, gpa, 0, 1 | 0xF << 8)).records[0].rax == 0
    create = CreateAp(0, 0, VMSA_GPA, 1, 1, snp_vmsa(vmpl=1))
    assert Done() in machine.apply(create).records
    make_private(machine, 0, FRESH, large=False)
    machine.apply(Vmgexit(0, 1 << 32 | 0x016, b""))
    assert machine.vcpus[0].vmpl == 1
    machine.mark()
    return machine


@pytest.fixture
def machine(shared):
    shared.reset()
    return shared


def call(machine, number, *, protocol=0, rcx=0, caa=CAA):
    return machine.apply(SvsmCall(0, caa, VMSA_GPA, protocol << 32 | number, rcx, 0, 0)).first(SvsmAnswered)


def listing(machine, *entries, gpa=LIST, **head):
    fields = {"entries": len(entries), **head}
    data = SvsmPvalidate.build(**fields) + b"".join(SvsmPvalidateEntry.build(**entry) for entry in entries)
    machine.access.guest_physical_write(machine.vcpus[0], gpa, data, c_bit=True)


def test_the_guest_below_cannot_validate_itself(machine):
    assert machine.apply(Pvalidate(0, FRESH, 0, 1)).records == (Faulted(13, 0, 0),)


def test_the_svsm_validates_for_it_and_gives_it_the_page(machine):
    listing(machine, {"page": FRESH >> 12, "validate": 1})
    assert call(machine, 1, rcx=LIST) == SvsmAnswered(True, 0, LIST)
    assert machine.vcpus[0].vmpl == 1
    assert state_of(machine, machine.hypervisor.vms[0].memory_spa + FRESH) is PageState.GUEST_VALID
    machine.access.guest_physical_write(machine.vcpus[0], FRESH, b"mine", c_bit=True)
    assert int.from_bytes(machine.access.guest_physical_read(machine.vcpus[0], LIST + 2, 2, c_bit=True), "little") == 1
    assert call(machine, 1, rcx=LIST).rax == 0x8000_0006  # nothing is left to do


def test_no_change_is_told_unless_it_is_ignored(machine):
    for ignore, rax in ((0, 0x8000_1010), (1, 0)):
        listing(machine, {"page": NEW >> 12, "validate": 1, "ignore_carry": ignore})
        assert call(machine, 1, rcx=LIST).rax == rax


@pytest.mark.parametrize(
    ("entry", "head", "rax"),
    [
        ({"page": FRESH >> 12, "validate": 1, "page_size": 2}, {}, 0x8000_0005),
        ({"page": FRESH >> 12, "validate": 1, "reserved_4": 1}, {}, 0x8000_0005),
        ({"page": (FRESH >> 12) + 1, "validate": 1, "page_size": 1}, {}, 0x8000_0005),
        ({"page": 1 << 39, "validate": 1}, {}, 0x8000_0005),
        ({"page": 1 << 30, "validate": 1}, {}, 0x8000_0003),
        ({"page": FRESH >> 12, "validate": 1}, {"entries": 0}, 0x8000_0006),
        ({"page": FRESH >> 12, "validate": 1}, {"entries": 511}, 0x8000_0006),
        ({"page": FRESH >> 12, "validate": 1}, {"next_entry": 1}, 0x8000_0006),
        ({"page": FRESH >> 12, "validate": 1}, {"reserved_4": 1}, 0x8000_0006),
    ],
)
def test_a_list_is_checked(machine, entry, head, rax):
    listing(machine, entry, **head)
    assert call(machine, 1, rcx=LIST).rax == rax


@pytest.mark.parametrize("rcx", [LIST + 4, 1 << 51, 1 << 40, 0x30_0000])
def test_a_list_that_is_nowhere(machine, rcx):
    assert call(machine, 1, rcx=rcx).rax == 0x8000_0003


def test_protocols_and_calls(machine):
    assert call(machine, 6, rcx=1) == SvsmAnswered(True, 0, 1 << 32 | 1)
    assert call(machine, 6, rcx=2).rcx == 0
    assert call(machine, 6, rcx=1 << 32 | 1).rcx == 0
    assert call(machine, 0, protocol=1).rax == 0x8000_0001
    assert call(machine, 9).rax == 0x8000_0002
    assert call(machine, 0, rcx=NEW).rax == 0
    assert call(machine, 0, rcx=NEW + 1).rax == 0x8000_0003


def test_only_the_svsm_makes_a_save_area(machine):
    machine.access.guest_physical_write(machine.vcpus[0], NEW, snp_vmsa(vmpl=1), c_bit=True)
    spa = machine.hypervisor.vms[0].memory_spa + NEW
    assert machine.apply(RmpAdjust(0, NEW, 0, 2 | 1 << 16)).records[0].rax == 2
    assert call(machine, 2, rcx=NEW).rax == 0
    assert read_entry(machine, spa).low >> 61 & 1
    assert call(machine, 3, rcx=NEW).rax == 0
    assert not read_entry(machine, spa).low >> 61 & 1
    machine.access.guest_physical_write(machine.vcpus[0], NEW, snp_vmsa(vmpl=0), c_bit=True)
    assert call(machine, 2, rcx=NEW).rax == 0x8000_0005


def test_a_hypervisor_that_does_not_run_the_svsm_is_noticed(machine):
    host = host_vcpu(machine, 0)
    host.vmsas = (0, *host.vmsas[1:])
    assert call(machine, 6, rcx=1) == SvsmAnswered(False, 0, 0)
    machine.reset()
    machine.apply(ForgeMsr(0, 0x017))
    assert call(machine, 6, rcx=1).taken  # whatever the answer says, the area tells


def test_the_calling_area_must_be_a_page_and_the_caller_at_vmpl1(machine):
    assert machine.apply(SvsmCall(0, CAA + 8, VMSA_GPA, 6, 1, 0, 0)).first(Refused)
    machine.apply(Vmgexit(0, 0x016, b""))
    assert machine.apply(SvsmCall(0, CAA, VMSA_GPA, 6, 1, 0, 0)).first(Refused)


def test_the_caller_s_save_area_is_out_of_its_own_reach(machine):
    step = MemoryRead(Party.GUEST, 0, Space.GPA, VMSA_GPA, True, 8)
    assert machine.apply(step).first(VmExit).exit_info_1 >> 36 & 1
