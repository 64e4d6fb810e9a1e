"""The I/O APIC as Linux programs it: pins, triggers, masks, destinations."""

from __future__ import annotations

import pytest
from sevlab.plugins import io

from tests.plugins.io.driver import Driver

BASE, APIC = 0xFEC0_0000, 0xFEE0_0000
LEVEL, MASKED, LOGICAL, REMOTE_IRR = 1 << 15, 1 << 16, 1 << 11, 1 << 14


def read(driver, index):
    driver.store(BASE, index)
    return driver.load(BASE + 0x10)


def write(driver, index, value):
    driver.store(BASE, index)
    driver.store(BASE + 0x10, value)


def route(driver, pin, low, high=0):
    write(driver, 0x11 + 2 * pin, high << 24)
    write(driver, 0x10 + 2 * pin, low)


def line(driver, irq, level=True):
    driver.machine.apply(io.InterruptLine(0, irq, level))
    driver.enter()


@pytest.fixture
def driver():
    made = Driver()
    made.store(APIC + 0xF0, 0x1FF)
    made.interrupts()
    return made


def test_identification(driver):
    assert read(driver, 1) == 0x0017_0011
    write(driver, 0, 5 << 24)
    assert read(driver, 0) == read(driver, 2) == 5 << 24
    assert read(driver, 0x10) == MASKED
    assert read(driver, 0x40) == 0


def test_an_edge_pin_is_delivered_once_an_edge(driver):
    route(driver, 5, 0x45)
    line(driver, 5)
    assert driver.taken() == [0x45]
    driver.store(APIC + 0xB0, 0)
    line(driver, 5)  # still up: no edge
    assert driver.taken() == []
    line(driver, 5, False)
    line(driver, 5)
    assert driver.taken() == [0x45]


def test_a_level_pin_waits_for_its_eoi_and_asks_again_while_up(driver):
    route(driver, 9, LEVEL | 0x49)
    line(driver, 9)
    assert driver.taken() == [0x49]
    assert read(driver, 0x10 + 18) & REMOTE_IRR
    assert driver.load(APIC + 0x1A0) == 1 << 9  # TMR: level triggered
    driver.store(APIC + 0xB0, 0)
    assert driver.taken() == [0x49]
    line(driver, 9, False)
    driver.store(APIC + 0xB0, 0)
    assert driver.taken() == []
    assert not read(driver, 0x10 + 18) & REMOTE_IRR


def test_the_eoi_register_ends_a_vector(driver):
    route(driver, 9, LEVEL | 0x49)
    line(driver, 9)
    line(driver, 9, False)
    driver.store(BASE + 0x40, 0x49)
    assert not read(driver, 0x10 + 18) & REMOTE_IRR


def test_a_masked_pin_loses_edges_and_keeps_levels(driver):
    route(driver, 5, MASKED | 0x45)
    route(driver, 9, MASKED | LEVEL | 0x49)
    line(driver, 5)
    line(driver, 9)
    route(driver, 5, 0x45)
    route(driver, 9, LEVEL | 0x49)
    assert driver.taken() == [0x49]


def test_read_only_bits_stay(driver):
    write(driver, 0x10, 0xFFFF_FFFF)
    assert read(driver, 0x10) == 0x0001_AFFF
    write(driver, 0x11, 0xFFFF_FFFF)
    assert read(driver, 0x11) == 0xFF00_0000


def test_the_timer_arrives_at_pin_2(driver):
    route(driver, 2, 0x42)
    for port, value in ((0x43, 0x34), (0x40, 0), (0x40, 4)):
        driver.out(port, value)
    driver.wait_seconds(0.001)
    assert driver.taken() == [0x42]


def test_logical_lowest_priority_as_the_flat_driver_uses_it():
    driver = Driver(vcpus=2)
    for number in range(2):
        other = driver.other(number)
        other.store(APIC + 0xF0, 0x1FF)
        other.store(APIC + 0xD0, 1 << 24 + number)
    driver.store(APIC + 0x80, 0x80)
    route(driver, 5, LOGICAL | 1 << 8 | 0x45, 0b11)
    driver.machine.apply(io.InterruptLine(0, 5, True))
    assert [apic.irr for apic in driver.board.lapics.values()] == [0, 1 << 0x45]


def test_an_nmi_pin(driver):
    route(driver, 5, 4 << 8)
    line(driver, 5)
    assert driver.taken() == [2]


def test_a_physical_destination_of_nobody(driver):
    route(driver, 5, 0x45, 7)
    line(driver, 5)
    assert driver.taken() == []
