"""MSRs of a guest: its processor's own, with the values that fault. The APIC's are tested with the device."""

from __future__ import annotations

import pytest
from sevlab.core.events import AdvanceClock, HostMsr
from sevlab.plugins.io.system_msrs import BASES, CANONICAL, EFER, FIELDS, PAT, TSC, canonical

from tests.plugins.io.driver import Driver

FIRST_NOT_CANONICAL = 1 << 47
FIRST_HIGH = (1 << 64) - (1 << 47)


@pytest.fixture
def driver():
    return Driver()


@pytest.mark.parametrize("number", sorted(set(FIELDS) - {PAT}), ids=hex)
def test_a_plain_register_keeps_its_value(driver, number):
    assert driver.wrmsr(number, 0x1234_5678)
    assert driver.rdmsr(number) == 0x1234_5678
    assert getattr(driver.vcpu.system, FIELDS[number]) == 0x1234_5678


@pytest.mark.parametrize("number", sorted((*CANONICAL, *BASES)), ids=hex)
def test_an_address_must_be_canonical(driver, number):
    for value, legal in (
        (FIRST_NOT_CANONICAL - 1, True),
        (FIRST_NOT_CANONICAL, False),
        (FIRST_HIGH - 1, False),
        (FIRST_HIGH, True),
    ):
        assert driver.wrmsr(number, value) == legal == canonical(value)
    assert driver.rdmsr(number) == FIRST_HIGH


def test_a_segment_base_changes_nothing_else_of_the_segment(driver):
    before = driver.vcpu.system.fs
    driver.wrmsr(0xC000_0100, 0x7000)
    assert driver.vcpu.system.fs == (*before[:3], 0x7000)


def test_tsc_aux_has_32_bits(driver):
    assert driver.wrmsr(0xC000_0103, 0xFFFF_FFFF)
    assert not driver.wrmsr(0xC000_0103, 1 << 32)


@pytest.mark.parametrize(
    ("value", "paging", "legal", "read"),
    [
        (0x901, False, True, 0x901),
        (0x501, False, True, 0x101),  # LMA follows paging
        (0x1000, False, False, 0),
        (0x4000, False, False, 0),
        (1 << 63, False, False, 0),
        (0x100, True, False, 0),
        (0x801, True, True, 0x801),
    ],
)
def test_efer(driver, value, paging, legal, read):
    if paging:
        driver.set(cr0=0x8000_0011)
    assert driver.rdmsr(EFER) == 0  # SVME, which VMRUN demands, is not the guest's
    assert driver.wrmsr(EFER, value) == legal
    assert driver.rdmsr(EFER) == read
    assert driver.vcpu.system.efer & 0x1000


@pytest.mark.parametrize(
    ("value", "legal"),
    [
        (0x0007_0406_0007_0406, True),
        (0x0105_0607_0406_0100, True),
        (2, False),
        (3 << 56, False),
        (8, False),
        (0x80, False),
    ],
)
def test_pat_takes_only_memory_types_that_exist(driver, value, legal):
    before = driver.rdmsr(PAT)
    assert driver.wrmsr(PAT, value) == legal
    assert driver.rdmsr(PAT) == (value if legal else before)


def test_the_tsc_is_the_clock_with_the_guests_offset(driver):
    driver.machine.apply(AdvanceClock(1000))
    assert driver.rdmsr(TSC) == 1000
    assert driver.wrmsr(TSC, 5)
    driver.machine.apply(AdvanceClock(10))
    assert driver.rdmsr(TSC) == 15
    assert driver.machine.tsc() == 1010


def test_the_host_has_registers_of_its_own(driver):
    assert not isinstance(driver.machine.apply(HostMsr(EFER, False, 0)).records[0], int)
    handlers = driver.machine.tables.guest_msrs
    for number in (EFER, PAT, 0xC000_0100, 0xC000_0082, 0x1B, 0x6E0, 0x802):
        assert not isinstance(handlers[number].read(driver.machine, None, number), int)
        assert handlers[number].write(driver.machine, None, number, 0) is not None
