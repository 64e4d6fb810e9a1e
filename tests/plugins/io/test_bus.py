"""The buses of the emulator: pages, keys, privileges, and the one page that is known of an SEV guest."""

from __future__ import annotations

import pytest
from sevlab.core.config import GuestConfig
from sevlab.core.cpu import FaultUnwind
from sevlab.core.events import MapFlag, MemoryRead, MemoryWrite, NptEdit, Party, Race, SetRegisters, Space
from sevlab.core.svm import NpfError
from sevlab.core.testing import make_machine
from sevlab.plugins import io
from sevlab.plugins.io.bus import CannotServe, PlainBus, SevBus, map_back, window_at

APIC = 0xFEE0_0000


@pytest.fixture
def machine():
    return make_machine("io", "sme", guests=(GuestConfig(memory_bytes=1 << 20),))


def plain(machine, page=-1):
    return PlainBus(machine, machine.vcpus[0], page)


def guest_read(machine, gpa, length):
    return machine.apply(MemoryRead(Party.GUEST, 0, Space.GPA, gpa, False, length)).records[0].data


def test_memory_across_pages_is_one_number(machine):
    plain(machine).write(0x8FFD, 8, 0x8877_6655_4433_2211)
    assert guest_read(machine, 0x8FFD, 8) == bytes.fromhex("1122334455667788")
    assert plain(machine).read(0x8FFD, 8) == 0x8877_6655_4433_2211
    assert plain(machine).bytes_at(0x8FFE, 3) == b"\x22\x33\x44"


def test_memory_under_the_hosts_key_is_reached_with_it():
    machine = make_machine("io", "sme", guests=(GuestConfig(memory_bytes=1 << 20),))
    from sevlab.core.events import HostMsr

    machine.apply(HostMsr(0xC001_0010, True, 1 << 23))
    spa = machine.hypervisor.vms[0].memory_spa + 0x8000
    flags = MapFlag.WRITABLE | MapFlag.USER | MapFlag.C_BIT
    machine.apply(NptEdit(0, 0x8000, spa, 0x1000, flags))
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, 0x8000, False, b"secret!!"))
    assert plain(machine).bytes_at(0x8000, 8) == b"secret!!"
    plain(machine).write(0x8000, 2, 0x4241)
    assert guest_read(machine, 0x8000, 8) == b"ABcret!!"


def test_a_users_access_is_checked_as_a_users(machine):
    entries = ((0x10000, 0x11007), (0x11000, 0x12007), (0x12000, 0x13007), (0x13000 + 8 * 8, 0x8003))
    for place, entry in entries:
        machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, place, False, entry.to_bytes(8, "little")))
    machine.apply(SetRegisters(0, (("cr0", 0x8000_0011), ("cr3", 0x10000), ("cr4", 0x20), ("efer", 0x1500))))
    plain(machine).write(0x8000, 1, 1)
    machine.apply(SetRegisters(0, (("cpl", 3),)))
    for access in (lambda: plain(machine).read(0x8000, 1), lambda: plain(machine).probe(0x8000, 1)):
        with pytest.raises(FaultUnwind) as caught:
            access()
        assert caught.value.fault.vector == 14
        assert caught.value.fault.error_code & 5 == 5


def test_a_page_that_a_fault_has_shown_absent_is_a_device(machine):
    plain(machine).write(0x8000, 4, 0x1234)
    assert plain(machine, 0x8000).read(0x8000, 4) == 0xFFFF_FFFF
    assert plain(machine, 0x9000).read(0x8000, 4) == 0x1234


@pytest.mark.parametrize(
    ("gpa", "error", "mapped"),
    [(0x8123, 0, True), (0x8123, NpfError.P, False), ((1 << 20) - 1, NpfError.W, True), (1 << 20, 0, False)],
)
def test_only_absent_memory_of_the_vm_is_mapped_back(machine, gpa, error, mapped):
    machine.apply(NptEdit(0, gpa & -0x1000, 0, 0x1000, MapFlag.UNMAP))
    assert map_back(machine, machine.vcpus[0], gpa, error) == mapped


def test_windows_have_exact_ends(machine):
    assert window_at(machine, APIC - 1) is None
    assert window_at(machine, APIC).gpa == window_at(machine, APIC + 0xFFF).gpa == APIC
    assert window_at(machine, APIC + 0x1000) is None
    assert window_at(machine, 0) is None


def test_the_sev_bus_knows_one_page(machine):
    bus = SevBus(machine, machine.vcpus[0], APIC + 0x30)
    assert bus.read(0x7000_0030, 4) & 0xFF == 0x14
    bus.write(0x7000_0080, 4, 0x20)  # the same operand's page, further on
    assert io.devices(machine, machine.vcpus[0]).lapics[0].register(0x80) == 0x20
    for linear, size in ((0x7000_1030, 4), (0x7000_0FFE, 4)):
        with pytest.raises(CannotServe):
            bus.read(linear, size)
    with pytest.raises(CannotServe):
        SevBus(machine, machine.vcpus[0], APIC + 0x30).probe(0x7000_0034, 4)


def test_a_race_can_strike_at_the_scheduling_point_of_a_handler(machine):
    """Another vCPU changes memory after the emulator has read its operand and before the device acts."""
    spa = machine.hypervisor.vms[0].memory_spa + 0x8000
    machine.apply(Race(1, spa, b"\x99"))
    machine.apply(io.SerialInput(0, b""))  # no handler point in this step: the race is dropped with it
    assert guest_read(machine, 0x8000, 1) == b"\0"
    before = machine.fetches.count
    io.port_out(machine, machine.vcpus[0], 0x80, 1, 0)
    io.mmio_read(machine, machine.vcpus[0], APIC, 4)
    assert machine.fetches.count == before + 2
