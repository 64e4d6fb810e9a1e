from __future__ import annotations

import pytest
from sevlab.core.cpu import CONTROL_SEV, CONTROL_SEV_ES
from sevlab.core.errors import ConfigError
from sevlab.core.events import Resumed, Schedule, VmcbWrite
from sevlab.core.testing import make_machine
from sevlab.plugins import sev
from sevlab.plugins.sev import Command, GuestState, Policy

PAGE = b"sixteen bytes !!" * 256


@pytest.fixture
def machine():
    return make_machine("sev", guests=2)


def test_a_guest_launched_by_the_commands_reads_what_was_loaded(machine):
    guest = sev.launch_guest(machine, 0, loads={0x1000: PAGE})
    vcpu, vm = machine.vcpus[0], machine.hypervisor.vms[0]
    status = sev.run(machine, Command.GUEST_STATUS, handle=guest.handle).buffer
    assert (status.state, status.asid) == (GuestState.RUNNING, guest.asid)
    assert machine.access.guest_physical_read(vcpu, 0x1000, 4096, c_bit=True) == PAGE
    assert machine.memory.dram(vm.memory_spa + 0x1000, 4096) != PAGE
    assert vm.c_bit_mask == 1 << machine.config.part.c_bit
    assert vcpu.vmcb.encryption_control & (CONTROL_SEV | CONTROL_SEV_ES) == CONTROL_SEV
    assert machine.apply(Schedule()).first(Resumed) is not None


def test_an_es_guest_gets_its_vmsa_pages_and_an_asid_of_its_range(machine):
    guest = sev.launch_guest(machine, 0, policy=Policy.ES, vmsas=[bytes(4096)])
    vmcb = machine.vcpus[0].vmcb
    assert guest.asid < sev.sev_state(machine).min_asid
    assert vmcb.encryption_control & CONTROL_SEV_ES
    assert machine.memory.dram(vmcb.vmsa_pa, 4096) != bytes(4096)


def test_es_after_an_initialisation_without_it_is_refused_in_words(machine):
    sev.initialise(machine)
    with pytest.raises(ConfigError, match="SHUTDOWN first"):
        sev.launch_guest(machine, 0, policy=Policy.ES)


def test_a_failing_command_names_its_status(machine):
    with pytest.raises(ConfigError, match="ACTIVATE: INVALID_PLATFORM_STATE"):
        sev.need(machine, Command.ACTIVATE, handle=1, asid=1)


def test_an_asid_comes_back_after_a_flush(machine):
    first = sev.launch_guest(machine, 0, asid=200)
    sev.stop_guest(machine, first)
    second = sev.launch_guest(machine, 1, asid=200)
    assert second.asid == 200
    assert sev.run(machine, Command.GUEST_STATUS, handle=first.handle).buffer.state in (0, GuestState.RUNNING)


def test_vmrun_refuses_an_asid_that_the_processor_has_not():
    machine = make_machine("sev", guests=1)
    sev.launch_guest(machine, 0)
    vcpu = machine.vcpus[0]
    machine.apply(VmcbWrite(0, 0x58, (5000).to_bytes(4, "little")))
    outcome = machine.apply(Schedule())
    assert outcome.first(Resumed) is None
    assert vcpu.stopped
