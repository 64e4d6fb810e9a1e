"""Hyper-V's synthetic MSRs, as Xen's viridian code answers."""

from __future__ import annotations

import pytest
from sevlab.core.determinism import TSC_HZ
from sevlab.core.events import AdvanceClock, CpuExit, Injected
from sevlab.core.svm import ExitCode, Vector
from sevlab.plugins import io
from sevlab.plugins.xen import Nr, Schedop, Vcpuop, xen
from sevlab.plugins.xen.arguments.hyperv import HvReferenceTsc
from sevlab.plugins.xen.hyperv_msrs import MSRS
from sevlab.plugins.xen.numbers import SHUTDOWN_REASONS

from tests.plugins.xen.world import guest_of, machine_of, registers_of

SECOND = 10_000_000
"""100-ns units."""


@pytest.fixture
def machine():
    machine = machine_of(guests=1, vcpus=2, viridian=True)
    for apic in io.devices(machine, machine.vcpus[0]).lapics.values():
        apic.registers[0xF0] = 0x1FF
    return machine


def refused(outcome):
    injected = outcome.first(Injected)
    return injected is not None and injected.event & 0xFF == Vector.GP


def wrmsr(machine, msr, value, vcpu=0):
    registers_of(machine, vcpu, rcx=msr, rax=value & 0xFFFF_FFFF, rdx=value >> 32)
    return machine.apply(CpuExit(vcpu, ExitCode.MSR, 1, 0, b"\x0f\x30", 0))


def rdmsr(machine, msr, vcpu=0):
    """The value, or None for #GP."""
    regs = registers_of(machine, vcpu, rcx=msr)
    outcome = machine.apply(CpuExit(vcpu, ExitCode.MSR, 0, 0, b"\x0f\x32", 0))
    return None if refused(outcome) else regs.rdx << 32 | regs.rax


def test_each_vcpu_has_its_index_and_a_write_to_it_does_nothing(machine):
    assert not refused(wrmsr(machine, 0x4000_0002, 5))
    assert rdmsr(machine, 0x4000_0002) == 0
    guest_of(machine).invoke(Nr.VCPU_OP, Vcpuop.IS_UP, on=1)
    machine.vcpus[1].halted = False
    assert rdmsr(machine, 0x4000_0002, vcpu=1) == 1


def test_time_is_counted_in_100_ns_and_cannot_be_set(machine):
    machine.apply(AdvanceClock(TSC_HZ))
    assert abs(rdmsr(machine, 0x4000_0020) - SECOND) <= 1
    assert refused(wrmsr(machine, 0x4000_0020, 0))


def test_the_reference_tsc_page_gives_the_same_time(machine):
    assert not refused(wrmsr(machine, 0x4000_0021, 0x5001))
    assert rdmsr(machine, 0x4000_0021) == 0x5001
    data = guest_of(machine).read(0x5000, 4096)
    head = HvReferenceTsc.from_bytes(data[: HvReferenceTsc.SIZE])
    assert (head.tsc_sequence, head.tsc_offset, data[24:]) == (1, 0, bytes(4072))
    machine.apply(AdvanceClock(3 * TSC_HZ))
    assert (machine.tsc() * head.tsc_scale >> 64) + head.tsc_offset == rdmsr(machine, 0x4000_0020)


@pytest.mark.parametrize("value", [0x5000, 1 << 50 | 1], ids=["off", "no such page"])
def test_a_reference_page_that_is_off_or_not_there_is_no_fault(machine, value):
    guest = guest_of(machine)
    guest.write(0x5000, b"untouched")
    assert not refused(wrmsr(machine, 0x4000_0021, value))
    assert guest.read(0x5000, 9) == b"untouched"


def test_frequencies_are_read_only(machine):
    assert rdmsr(machine, 0x4000_0022) == TSC_HZ
    apic = io.devices(machine, machine.vcpus[0]).lapics[0]
    apic.write(0x3E0, 0xB, machine.tsc())  # divide by 1
    apic.write(0x380, 0xFFFF_FFFF, machine.tsc())
    machine.apply(AdvanceClock(TSC_HZ))
    assert 0xFFFF_FFFF - apic.read(0x390, machine.tsc()) == rdmsr(machine, 0x4000_0023)
    assert refused(wrmsr(machine, 0x4000_0022, 1))
    assert refused(wrmsr(machine, 0x4000_0023, 1))


def test_the_apic_registers_are_those_of_the_local_apic(machine):
    apics = io.devices(machine, machine.vcpus[0]).lapics
    wrmsr(machine, 0x4000_0072, 0x50)
    assert apics[0].register(0x80) == 0x50
    assert rdmsr(machine, 0x4000_0072) == 0x50
    wrmsr(machine, 0x4000_0071, 1 << 56 | 0x4061)  # a fixed interrupt for the second processor
    assert apics[1].irr == 1 << 0x61
    assert rdmsr(machine, 0x4000_0071) >> 32 == 1 << 24
    apics[0].isr = 1 << 0x70
    wrmsr(machine, 0x4000_0070, 0)
    assert apics[0].isr == 0
    assert rdmsr(machine, 0x4000_0070) is None


def test_crash_parameters_are_kept_and_a_notified_crash_is_the_reason_of_the_end(machine):
    for index in range(5):
        wrmsr(machine, 0x4000_0100 + index, 100 + index)
    assert [rdmsr(machine, 0x4000_0100 + index) for index in range(5)] == [100, 101, 102, 103, 104]
    assert rdmsr(machine, 0x4000_0105) == 1 << 63
    wrmsr(machine, 0x4000_0105, 1)
    assert xen(machine).domains[1].shutdown_code is None
    wrmsr(machine, 0x4000_0105, 1 << 63)
    guest_of(machine).invoke(Nr.SCHED_OP, Schedop.SHUTDOWN, reason=0)
    assert xen(machine).domains[1].shutdown_code == SHUTDOWN_REASONS.index("crash")


def test_the_assist_page_is_named_and_never_written(machine):
    wrmsr(machine, 0x4000_0073, 0x6001)
    assert rdmsr(machine, 0x4000_0073) == 0x6001
    assert guest_of(machine).read(0x6000, 4096) == bytes(4096)


@pytest.mark.parametrize("msr", [0x4000_0003, 0x4000_0080, 0x4000_0090, 0x4000_00B0, 0x4000_0106])
def test_what_is_not_offered_is_gp(machine, msr):
    assert msr not in MSRS
    assert refused(wrmsr(machine, msr, 0))
    assert rdmsr(machine, msr) is None


def test_without_viridian_there_is_none_of_them():
    machine = machine_of(guests=1)
    for msr in MSRS:
        if msr != 0x4000_0000:  # Xen's own hypercall page
            assert rdmsr(machine, msr) is None


def test_the_leaves_say_what_is_there(machine):
    eax, ebx, ecx, edx = machine.cpuid(machine.vcpus[0], 0x4000_0003, 0)
    assert (eax, ebx, ecx, edx) == (0xA72, 0, 0, 1 << 3 | 1 << 10)
    assert machine.cpuid(machine.vcpus[0], 0x4000_0005, 0)[0] == 0xFFFF_FFFF
    assert machine.cpuid(machine.vcpus[0], 0x4000_0002, 0) == (0, 0, 0, 0)
    wrmsr(machine, 0x4000_0000, 1 << 48 | 4 << 40)
    assert machine.cpuid(machine.vcpus[0], 0x4000_0002, 0) == (0x1772, 6 << 16, 0, 0)
