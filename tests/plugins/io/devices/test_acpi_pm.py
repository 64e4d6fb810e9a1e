"""The power-management block as Linux uses it."""

from __future__ import annotations

from sevlab.core.determinism import TSC_HZ
from sevlab.core.events import AdvanceClock
from sevlab.plugins.io.devices.acpi_pm import TIMER_HZ

from tests.plugins.io.driver import Driver

STATUS, ENABLE, CONTROL, TIMER = 0x600, 0x602, 0x604, 0x608


def test_linux_checks_that_the_timer_runs_at_its_rate():
    driver = Driver()
    first = driver.in_(TIMER, 4)
    driver.machine.apply(AdvanceClock(TSC_HZ // 10))
    elapsed = driver.in_(TIMER, 4) - first & 0xFF_FFFF
    assert abs(elapsed - TIMER_HZ // 10) <= 1


def test_the_timer_has_24_bits_and_is_read_only():
    driver = Driver()
    driver.machine.apply(AdvanceClock(TSC_HZ * ((1 << 24) + 100) // TIMER_HZ + 1))
    assert driver.in_(TIMER, 4) == 100
    driver.out(TIMER, 0, 4)
    assert driver.in_(TIMER, 4) == 100


def test_registers_keep_their_bits_and_status_clears_by_writing_ones():
    driver = Driver()
    assert driver.in_(CONTROL, 2) & 1  # ACPI is on
    driver.board.pm.status = 0x0121
    driver.out(STATUS, 0x0100_0020, 4)  # status and enable together
    assert (driver.in_(STATUS, 2), driver.in_(ENABLE, 2)) == (0x0101, 0x0100)
    driver.out(ENABLE, 0xFF)
    assert driver.in_(ENABLE, 2) == 0x0100
    assert driver.in_(STATUS, 4) == 0x0100_0101


def test_s5_ends_the_guest_and_other_sleep_types_do_not():
    driver = Driver()
    driver.out(CONTROL, 1 << 13 | 3 << 10, 2)
    assert driver.stopped is None
    driver.out(CONTROL, 1 << 13, 2)
    assert driver.stopped == "ACPI power off"
