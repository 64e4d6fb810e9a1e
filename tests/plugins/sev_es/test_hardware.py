"""Encrypted register state: what VMRUN loads and refuses, what an exit shows, what becomes #VC."""

from __future__ import annotations

import pytest
from sevlab.core.events import (
    CpuExit,
    Data,
    MemoryRead,
    MemoryWrite,
    Party,
    Resumed,
    Schedule,
    SetRegisters,
    Space,
    Stopped,
    VmcbWrite,
    VmExit,
)
from sevlab.core.svm import EventType, ExitCode, Vector, event
from sevlab.core.testing import assert_changes_nothing, assert_resets
from sevlab.plugins.sev import vmsa_slots
from sevlab.plugins.sev_es import ExitClass, VcDelivered, Vmgexit, Vmsa, exit_class, segment_of

from tests.plugins.sev_es.guests import GHCB_GPA, encrypted_machine, page

AE, NAE = ExitClass.AE, ExitClass.NAE


@pytest.fixture(scope="module")
def shared_machine():
    return encrypted_machine(vcpus=2)


@pytest.fixture
def machine(shared_machine):
    yield shared_machine
    shared_machine.reset()


def vmsa_of(machine, number=0):
    vcpu = machine.vcpus[number]
    key = machine.access.key_of(vcpu.asid, c_bit=True)
    return Vmsa.from_bytes(machine.memory.read(vcpu.vmcb.vmsa_pa, 4096, key))


def schedule(machine, number=0):
    machine.hypervisor.last_vcpu = number - 1 if number else 99
    return machine.apply(Schedule())


# Integrity --------------------------------------------------------------------------------------------------------


def test_the_first_vmrun_loads_the_launched_state(machine):
    vcpu = machine.vcpus[0]
    assert (vcpu.regs.rip, vcpu.regs.rdx, vcpu.system.efer) == (0xFFF0, 0xA0_0F11, 0x1000)
    assert vcpu.system.cs == (0xF000, 0x9B, 0xFFFF, 0xFFFF_0000)


def test_the_save_area_holds_the_registers_and_the_host_sees_ciphertext(machine):
    machine.apply(SetRegisters(0, (("rax", 0x1122_3344_5566_7788), ("rip", 0x1234), ("cr3", 0x9000), ("cpl", 3))))
    area = vmsa_of(machine)
    assert (area.rax, area.rip, area.cr3, area.cpl) == (0x1122_3344_5566_7788, 0x1234, 0x9000, 3)
    assert segment_of(area.cs) == machine.vcpus[0].system.cs
    spa = machine.vcpus[0].vmcb.vmsa_pa
    seen = machine.apply(MemoryRead(Party.HYPERVISOR, 0, Space.SPA, spa, False, 4096)).first(Data).data
    assert (0x1122_3344_5566_7788).to_bytes(8, "little") not in seen
    assert schedule(machine).first(Resumed) is not None


def test_two_looks_at_the_save_area_differ_when_a_register_changed(machine):
    spa = machine.vcpus[0].vmcb.vmsa_pa
    look = MemoryRead(Party.HYPERVISOR, 0, Space.SPA, spa, False, 4096)
    first = machine.apply(look).first(Data).data
    schedule(machine)
    machine.apply(SetRegisters(0, (("rbx", 7),)))
    second = machine.apply(look).first(Data).data
    changed = [block for block in range(256) if first[block * 16 :][:16] != second[block * 16 :][:16]]
    assert changed == [Vmsa.FIELDS["rbx"].offset // 16]


def test_a_snapshot_is_no_look_at_the_save_area(machine):
    machine.snapshot()
    machine.apply(SetRegisters(0, (("rax", 0x77),)))
    assert vmsa_of(machine).rax == 0x77


def test_an_exit_stores_the_state_in_a_restored_machine_too(machine):
    machine.restore(machine.snapshot())
    machine.apply(SetRegisters(0, (("rax", 0x77),)))
    machine.apply(Vmgexit(0, 0x002, b""))
    assert vmsa_of(machine).rax == 0x77


@pytest.mark.parametrize("offset", [0x000, 0x178, 0x1F8, 0x3B0, 0x388, 0xFBF])
def test_a_changed_save_area_makes_vmrun_fail(machine, offset):
    spa = machine.vcpus[0].vmcb.vmsa_pa
    machine.apply(MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, spa + offset, False, b"\x41"))
    outcome = schedule(machine)
    assert outcome.first(VmExit).exit_code == ExitCode.INVALID
    assert "VMRUN failed" in outcome.first(Stopped).reason


def test_an_old_save_area_put_back_makes_vmrun_fail(machine):
    spa = machine.vcpus[0].vmcb.vmsa_pa
    old = machine.apply(MemoryRead(Party.HYPERVISOR, 0, Space.SPA, spa, False, 4096)).first(Data).data
    schedule(machine)
    machine.apply(SetRegisters(0, (("rax", 1),)))
    machine.apply(MemoryRead(Party.HYPERVISOR, 0, Space.SPA, spa, False, 16))
    machine.apply(MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, spa, False, old))
    assert schedule(machine).first(VmExit).exit_code == ExitCode.INVALID


def test_the_same_bytes_written_back_do_not_matter(machine):
    spa = machine.vcpus[0].vmcb.vmsa_pa
    bytes_now = machine.apply(MemoryRead(Party.HYPERVISOR, 0, Space.SPA, spa, False, 4096)).first(Data).data
    machine.apply(MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, spa, False, bytes_now))
    assert schedule(machine).first(Resumed) is not None


@pytest.mark.parametrize("vmsa_pa", [0, 0x123, 0x5000, 1 << 51])
def test_vmrun_refuses_what_is_no_save_area_of_the_guest(machine, vmsa_pa):
    machine.apply(VmcbWrite(0, 0x108, vmsa_pa.to_bytes(8, "little")))
    assert schedule(machine).first(VmExit).exit_code == ExitCode.INVALID


def test_another_vcpus_save_area_is_loaded_whole(machine):
    machine.apply(SetRegisters(1, (("rax", 0xBEEF),)))
    machine.vcpus[0].vmcb.vmsa_pa = machine.vcpus[1].vmcb.vmsa_pa
    assert schedule(machine).first(Resumed) is not None
    assert machine.vcpus[0].regs.rax == 0xBEEF


def test_the_checksum_is_where_only_the_asp_and_the_processor_reach(machine):
    area = vmsa_of(machine)
    guest = next(iter(machine.components["sev"].guests.values()))
    assert vmsa_slots.matches(machine, guest, area.to_bytes())


# Exits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "info", "expected"),
    [
        (0x00, 0, NAE), (0x1F, 0, NAE), (0x2F, 0, NAE), (0x37, 0, NAE), (0x41, 0, NAE), (0x52, 0, AE), (0x5F, 0, NAE),
        *((code, 0, AE) for code in range(0x60, 0x65)), (0x65, 0, NAE), (0x6D, 0, NAE), (0x6E, 0, NAE), (0x75, 0, NAE),
        (0x76, 0, NAE), (0x77, 0, AE), (0x78, 0, AE), (0x79, 0, NAE), (0x7B, 0, NAE), (0x7C, 0, NAE), (0x7D, 0, NAE),
        (0x7F, 0, AE), (0x80, 0, NAE), (0x81, 0, NAE), (0x8B, 0, NAE), (0x8D, 0, NAE), (0x8E, 0, NAE), (0x8F, 0, AE),
        *((code, 0, AE) for code in range(0x90, 0xA0)), (0xA0, 0, NAE), (0x400, 0, AE), (0x400, 4, AE),
        (0x400, 1 << 3, NAE), (0x403, 0, AE), (0x404, 0, ExitClass.VC_ONLY), ((1 << 64) - 1, 0, AE),
        ((1 << 64) - 2, 0, AE),
    ],
)  # fmt: skip
def test_the_class_of_an_exit(code, info, expected):
    assert exit_class(code, info) is expected


@pytest.mark.unverified
@pytest.mark.parametrize("code", [0xA5, 0xA6, 0x401, 0x402], ids=["bus lock", "idle HLT", "AVIC IPI", "AVIC access"])
def test_the_class_of_an_exit_that_no_source_names(code):
    assert exit_class(code) is AE


def test_an_intercepted_instruction_is_reflected_and_the_hypervisor_sees_nothing(machine):
    before = machine.vcpus[0].vmcb.to_bytes()
    outcome = machine.apply(CpuExit(0, ExitCode.CPUID, 0, 0, b"\x0f\xa2", 0x1002))
    assert outcome.records == (VcDelivered(0, ExitCode.CPUID),)
    assert machine.vcpus[0].vmcb.to_bytes() == before


def test_an_automatic_exit_shows_neither_bytes_nor_next_rip(machine):
    machine.apply(CpuExit(0, ExitCode.INTR, 0, 0, b"\x90\x90", 0x1002))
    vmcb = machine.vcpus[0].vmcb
    assert (vmcb.exit_code, vmcb.insn_bytes, vmcb.next_rip) == (ExitCode.INTR, b"", 0)


@pytest.mark.parametrize("flags", [2, 0x202])
def test_the_hypervisor_learns_the_interrupt_flag_and_no_other(machine, flags):
    machine.apply(SetRegisters(0, (("rflags", flags | 0x10D5),)))
    machine.apply(CpuExit(0, ExitCode.INTR, 0, 0, b"", 0))
    assert machine.vcpus[0].vmcb.interrupt_state == (2 if flags & 0x200 else 0)


def test_hlt_is_automatic_and_its_rip_points_behind_it(machine):
    machine.apply(SetRegisters(0, (("rip", 0x1000),)))
    outcome = machine.apply(CpuExit(0, ExitCode.HLT, 0, 0, b"\xf4", 0))
    assert outcome.first(VmExit).exit_code == ExitCode.HLT
    assert machine.vcpus[0].regs.rip == 0x1001
    assert machine.vcpus[0].halted


def test_hlt_behind_sti_ends_the_interrupt_shadow(machine):
    machine.vcpus[0].vmcb.interrupt_state = 1
    machine.apply(SetRegisters(0, (("rip", 0x1000), ("rflags", 0x202))))
    machine.apply(CpuExit(0, ExitCode.HLT, 0, 0, b"\xf4", 0))
    assert machine.vcpus[0].vmcb.interrupt_state == 2  # the hypervisor can inject at once


def test_a_nested_page_fault_is_automatic_unless_a_reserved_bit_made_it(machine):
    assert machine.apply(CpuExit(0, ExitCode.NPF, 4, 0x2000, b"\x8b\x07", 0)).first(VmExit) is not None
    outcome = machine.apply(CpuExit(0, ExitCode.NPF, 0xD, 0xFEE0_0000, b"\x8b\x07", 0))
    assert outcome.records == (VcDelivered(0, 0x400),)


@pytest.mark.unverified
def test_an_injected_vc_is_dropped(machine):
    machine.vcpus[0].vmcb.event_inj = event(Vector.VC, EventType.EXCEPTION, 0x72)
    assert [type(record).__name__ for record in schedule(machine).records] == ["Scheduled", "Resumed"]


def test_sev_status_tells_the_guest_what_it_is(machine):
    vcpu = machine.vcpus[0]
    read = machine.tables.guest_msrs[0xC001_0131].read
    assert read(machine, vcpu, 0xC001_0131) == 3
    machine.components["sev_es"].vms[0].sev_features = 0x21
    assert read(machine, vcpu, 0xC001_0131) == 3 | 0x21 << 2


def test_a_vmgexit_outside_memory_is_a_nested_fault_of_the_guest(machine):
    outcome = machine.apply(Vmgexit(0, 0x4000_0000, page(ExitCode.CPUID)))
    assert outcome.first(VmExit).exit_code == ExitCode.NPF


def test_a_refused_step_changes_nothing(machine):
    assert_changes_nothing(machine, Vmgexit(7, 0, b""))


def test_looks_and_entries_reset(machine):
    spa = machine.vcpus[0].vmcb.vmsa_pa
    assert_resets(
        machine,
        SetRegisters(0, (("rax", 5),)),
        MemoryRead(Party.HYPERVISOR, 0, Space.SPA, spa, False, 64),
        Vmgexit(0, GHCB_GPA, page(ExitCode.CPUID, rax=0, rcx=0)),
        MemoryRead(Party.HYPERVISOR, 0, Space.SPA, spa, False, 64),
    )


def test_an_access_to_a_devices_page_is_vc_and_one_to_missing_memory_is_an_exit(machine):
    outcome = machine.apply(MemoryRead(Party.GUEST, 0, Space.GPA, 0xFEE0_0030, False, 4))
    assert outcome.records == (VcDelivered(0, ExitCode.NPF),)
    outcome = machine.apply(MemoryRead(Party.GUEST, 0, Space.GPA, 0x7000_0000, False, 4))
    assert outcome.first(VmExit).exit_code == ExitCode.NPF


def test_a_vmrun_with_another_asid_does_not_find_its_state(machine):
    machine.vcpus[0].vmcb.guest_asid += 1
    assert schedule(machine).first(VmExit).exit_code == ExitCode.INVALID
