"""The clock as Linux and kvm-unit-tests read it: outside updates, in every coding; its three interrupts."""

from __future__ import annotations

import pytest
from sevlab.core.determinism import TSC_HZ
from sevlab.core.events import AdvanceClock

from tests.plugins.io.driver import Driver

SECOND = TSC_HZ
FIELDS = (0, 2, 4, 6, 7, 8, 9, 0x32)


def cmos(driver, index):
    driver.out(0x70, index)
    return driver.in_(0x71)


def put(driver, index, value):
    driver.out(0x70, index)
    driver.out(0x71, value)


def read_clock(driver):
    """What mc146818_get_time does: wait until no update is in progress, then read everything."""
    while cmos(driver, 0x0A) & 0x80:
        driver.machine.apply(AdvanceClock(TSC_HZ // 10_000))
    return tuple(cmos(driver, index) for index in FIELDS)


def at(ticks):
    driver = Driver()
    driver.machine.apply(AdvanceClock(ticks))
    return driver


def test_the_time_is_read_in_bcd_and_24_hours():
    driver = at((13 * 3600 + 59 * 60 + 58) * SECOND)
    assert cmos(driver, 0x0D) == 0x80
    assert cmos(driver, 0x0B) & 0x06 == 0x02
    assert read_clock(driver) == (0x58, 0x59, 0x13, 4, 0x01, 0x01, 0x25, 0x20)  # 1 January 2025 is a Wednesday


def test_a_read_just_before_the_update_waits_for_it():
    driver = at(60 * SECOND - TSC_HZ // 5_000)  # 200 us before the minute
    assert cmos(driver, 0x0A) & 0x80
    assert read_clock(driver)[:2] == (0x00, 0x01)
    driver = at(60 * SECOND - TSC_HZ // 4_000)  # 250 us: a whole read fits before it
    assert not cmos(driver, 0x0A) & 0x80
    assert read_clock(driver)[:2] == (0x59, 0x00)


def test_no_update_while_the_set_bit_holds_it():
    driver = at(SECOND - TSC_HZ // 5_000)
    put(driver, 0x0B, 0x82)
    assert not cmos(driver, 0x0A) & 0x80


@pytest.mark.parametrize(
    ("status_b", "hour", "shown"),
    [(0x06, 13, 13), (0x04, 13, 0x81), (0x00, 13, 0x81), (0x00, 0, 0x12), (0x00, 12, 0x92), (0x02, 23, 0x23)],
)
def test_hours_in_every_coding(status_b, hour, shown):
    driver = at(hour * 3600 * SECOND)
    put(driver, 0x0B, status_b)
    assert cmos(driver, 4) == shown


def test_memory_keeps_its_bytes_and_the_clock_ignores_writes():
    driver = at(0)
    put(driver, 0x38, 0xA5)
    put(driver, 9, 0x99)
    assert (cmos(driver, 0x38), cmos(driver, 9)) == (0xA5, 0x25)
    assert driver.in_(0x70) == 0xFF


def interrupting(enable, status_a=0x26):
    driver = Driver()
    driver.init_pics(unmasked=(8,))
    driver.interrupts()
    put(driver, 0x0A, status_a)
    cmos(driver, 0x0C)
    put(driver, 0x0B, 0x02 | enable)
    return driver


def test_the_update_interrupt_comes_each_second_and_status_c_ends_it():
    driver = interrupting(0x10)
    for _ in range(3):
        driver.wait(driver.board.next_event(driver.machine.tsc()) - driver.machine.tsc())
        assert driver.taken() == [0x28]
        driver.out(0xA0, 0x20)
        driver.out(0x20, 0x20)
        assert cmos(driver, 0x0C) & 0x90 == 0x90
        assert cmos(driver, 0x0C) == 0
    assert driver.machine.tsc() == 3 * SECOND


def test_without_reading_status_c_no_second_interrupt_comes():
    driver = interrupting(0x10)
    driver.wait(SECOND)
    driver.out(0xA0, 0x20)
    driver.out(0x20, 0x20)
    driver.wait(SECOND)
    assert driver.taken() == [0x28]


def test_the_periodic_interrupt_has_the_rate_of_status_a():
    driver = interrupting(0x40, status_a=0x2D)  # 8 Hz
    count = 0
    while driver.machine.tsc() < SECOND:
        driver.wait(driver.board.next_event(driver.machine.tsc()) - driver.machine.tsc())
        count += len(driver.taken())
        assert cmos(driver, 0x0C) & 0xC0 == 0xC0
        driver.out(0xA0, 0x20)
        driver.out(0x20, 0x20)
    assert count == 8


def test_the_alarm_matches_its_registers_and_wildcards():
    driver = interrupting(0x20)
    for index, value in ((1, 0x05), (3, 0xC0), (5, 0xFF)):
        put(driver, index, value)
    driver.wait(4 * SECOND)
    assert driver.taken() == []
    driver.wait(SECOND)
    assert driver.taken() == [0x28]
    assert cmos(driver, 0x0C) & 0xA0 == 0xA0


def test_an_alarm_of_a_whole_jump_of_days_is_found():
    driver = interrupting(0x20)
    for index, value in ((1, 0x59), (3, 0x59), (5, 0x23)):
        put(driver, index, value)
    driver.wait(100 * 86_400 * SECOND)
    assert driver.taken() == [0x28]
