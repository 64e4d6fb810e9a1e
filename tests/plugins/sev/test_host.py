"""What the processor contributes: CPUID, model-specific registers, and the checks of VMRUN."""

from __future__ import annotations

import pytest
from sevlab.core.cpu import CONTROL_NESTED_PAGING, CONTROL_SEV, CONTROL_SEV_ES
from sevlab.core.events import Faulted, HostCpuid, HostMsr, Resumed, Schedule, Stopped
from sevlab.core.testing import make_machine
from sevlab.plugins import sev
from sevlab.plugins.sev import Command, driver
from sevlab.plugins.sev.host import SEV_STATUS, VM_PAGE_FLUSH

from tests.plugins.sev.world import MEMORY, PAGE, PLAINTEXT


@pytest.mark.parametrize(
    ("generation", "options", "most", "least"),
    [("naples", {}, 15, 5), ("milan", {}, 509, 100), ("genoa", {"min_asid": 7}, 1006, 7)],
)
def test_cpuid_tells_how_many_guests_and_which_asids(generation, options, most, least):
    machine = make_machine("sev", generation=generation, options={"sev": options})
    registers = machine.apply(HostCpuid(0x8000_001F, 0)).records[0]
    assert registers.eax & 0b110 == 0b110
    assert (registers.ecx, registers.edx) == (most, least)


def test_sev_status_tells_the_guest_that_it_is_encrypted():
    machine = make_machine("sev", guests=2)
    sev.launch_guest(machine, 0)
    read = machine.tables.guest_msrs[SEV_STATUS].read
    assert [read(machine, machine.vcpus[number], SEV_STATUS) & 1 for number in (0, 1)] == [1, 0]


def test_vm_page_flush_writes_back_what_the_guest_has_in_the_cache():
    machine = make_machine("sev", guests=(MEMORY,), caches=True, generation="rome")
    guest = sev.launch_guest(machine, 0, loads={0x1000: PLAINTEXT})
    spa = machine.hypervisor.vms[0].memory_spa + 0x1000
    machine.apply(HostMsr(VM_PAGE_FLUSH, True, spa | guest.asid))
    before = machine.memory.dram(spa, PAGE)
    machine.access.guest_physical_write(machine.vcpus[0], 0x1000, b"still in the cache", c_bit=True)
    assert machine.memory.dram(spa, PAGE) == before
    machine.apply(HostMsr(VM_PAGE_FLUSH, True, spa | guest.asid))
    assert machine.memory.dram(spa, PAGE) != before


def test_vm_page_flush_faults_without_an_asid_or_a_mapping():
    machine = make_machine("sev")
    for value in (0x5000, machine.config.memory_bytes | 1):
        assert machine.apply(HostMsr(VM_PAGE_FLUSH, True, value)).first(Faulted).vector == 13
    assert machine.apply(HostMsr(VM_PAGE_FLUSH, False, 0)).first(Faulted) is not None


def test_a_guest_runs_only_after_its_launch_and_until_it_is_deactivated():
    machine = make_machine("sev", guests=(MEMORY,))
    guest = sev.begin_launch(machine, 0)
    machine.mark()
    assert machine.apply(Schedule()).first(Stopped) is not None
    machine.reset()
    driver.measure(machine, guest)
    sev.need(machine, Command.LAUNCH_FINISH, handle=guest.handle)
    assert machine.apply(Schedule()).first(Resumed) is not None
    sev.need(machine, Command.DEACTIVATE, handle=guest.handle)
    assert machine.apply(Schedule()).first(Stopped) is not None


@pytest.mark.parametrize(
    ("control", "runs"),
    [
        (CONTROL_NESTED_PAGING | CONTROL_SEV, True),
        (CONTROL_SEV, False),
        (CONTROL_NESTED_PAGING | CONTROL_SEV_ES, False),
    ],
)
def test_vmrun_wants_nested_paging_and_sev_below_sev_es(control, runs):
    machine = make_machine("sev", guests=(MEMORY,))
    sev.launch_guest(machine, 0)
    machine.vcpus[0].vmcb.encryption_control = control
    assert (machine.apply(Schedule()).first(Resumed) is not None) == runs
