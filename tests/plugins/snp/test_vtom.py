"""The virtual top of memory: private below, shared above, and no C-bits in the guest's tables."""

from __future__ import annotations

import pytest
from sevlab.core.cpu import FaultUnwind
from sevlab.core.events import Schedule
from sevlab.core.svm import NpfError
from sevlab.plugins.sev_es import Vmsa
from sevlab.plugins.snp.vtom import MSR_VIRTUAL_TOM

from tests.plugins.snp.support import C_BIT, PRIVATE_GPA, snp_vmsa, talking_machine

TOP = 0x20_0000
SHARED, WITH_C_BIT = 0x20_0000, 0x40_0000
TABLES = PRIVATE_GPA
DATA = PRIVATE_GPA + 0x3000


@pytest.fixture(scope="module")
def booted():
    """A guest with identity tables of 2 MiB pages, one of them with the C-bit set."""
    machine, _ = talking_machine(vmsa=snp_vmsa(sev_features=0b11, virtual_tom=TOP))
    vcpu = machine.vcpus[0]
    tables = [[0] * 512 for _ in range(3)]
    tables[0][0], tables[1][0] = TABLES + 0x1000 | 3, TABLES + 0x2000 | 3
    for number in range(4):
        tables[2][number] = number << 21 | 0x83 | (C_BIT if number << 21 == WITH_C_BIT else 0)
    raw = b"".join(word.to_bytes(8, "little") for table in tables for word in table)
    machine.access.guest_physical_write(vcpu, TABLES, raw, c_bit=True)
    vcpu.system.cr0, vcpu.system.cr3, vcpu.system.cr4, vcpu.system.efer = 0x8001_0011, TABLES, 0x20, 0x1D00
    machine.mark()
    return machine


@pytest.fixture
def machine(booted):
    booted.reset()
    return booted


def spa_of(machine, gpa):
    return machine.hypervisor.vms[0].memory_spa + gpa


def test_below_the_top_data_is_private(machine):
    vcpu = machine.vcpus[0]
    machine.access.guest_write(vcpu, DATA, b"private")
    assert machine.access.guest_physical_read(vcpu, DATA, 7, c_bit=True) == b"private"
    assert machine.memory.dram(spa_of(machine, DATA), 7) != b"private"
    assert machine.access.guest_page(vcpu, TOP - 1, 1) == (TOP - 1, True)


def test_at_and_above_the_top_it_is_shared(machine):
    vcpu = machine.vcpus[0]
    machine.access.guest_write(vcpu, SHARED, b"shared")
    assert machine.memory.dram(spa_of(machine, SHARED), 6) == b"shared"
    assert machine.access.guest_page(vcpu, TOP, 1) == (TOP, False)


def test_the_c_bit_is_a_reserved_bit_of_the_guest_s_tables(machine):
    with pytest.raises(FaultUnwind) as raised:
        machine.access.guest_read(machine.vcpus[0], WITH_C_BIT, 1)
    fault = raised.value.fault
    assert (fault.vector, fault.error_code, fault.address) == (14, 0b1001, WITH_C_BIT)


def test_an_unassigned_page_below_the_top_exits_as_a_private_access(machine):
    with pytest.raises(FaultUnwind) as raised:
        machine.access.guest_read(machine.vcpus[0], 0x19_0000, 1)
    assert raised.value.fault.error_code & NpfError.ENC


def guest_msr(machine, value=None):
    handler = machine.tables.guest_msrs[MSR_VIRTUAL_TOM]
    if value is None:
        return handler.read(machine, machine.vcpus[0], MSR_VIRTUAL_TOM)
    return handler.write(machine, machine.vcpus[0], MSR_VIRTUAL_TOM, value)


def test_the_guest_moves_the_top_and_its_save_area_has_it(machine):
    assert guest_msr(machine) == TOP
    assert guest_msr(machine, 2 * TOP) is None
    assert machine.access.guest_page(machine.vcpus[0], TOP, 1) == (TOP, True)
    machine.apply(Schedule())
    vcpu = machine.vcpus[0]
    key = machine.access.key_of(vcpu.asid, c_bit=True)
    assert Vmsa.from_bytes(machine.memory.read(vcpu.vmcb.vmsa_pa, 4096, key)).virtual_tom == 2 * TOP


@pytest.mark.unverified
@pytest.mark.parametrize("value", [1, 1 << 20, 1 << 52, (1 << 64) - 1], ids=hex)
def test_the_top_is_a_2_mib_address(machine, value):
    assert guest_msr(machine, value).vector == 13
    assert guest_msr(machine) == TOP


@pytest.mark.unverified
def test_without_the_feature_there_is_no_register_and_the_c_bits_decide():
    machine, _ = talking_machine(vmsa=snp_vmsa(virtual_tom=TOP))
    assert guest_msr(machine).vector == 13
    assert guest_msr(machine, TOP).vector == 13
    assert machine.slots.virtual_tom(machine.vcpus[0]) == 0
