"""The ports that tell the outside something."""

from __future__ import annotations

import pytest

from tests.plugins.io.driver import Driver


def test_the_post_port_keeps_the_last_code_and_serves_as_delay():
    driver = Driver()
    driver.out(0x80, 0x55)
    driver.out(0x80, 0x1234, 2)
    assert driver.board.debug.post_code == 0x34
    assert driver.in_(0x80) == 0x34


def test_the_console_answers_its_own_number_and_keeps_text():
    driver = Driver()
    assert driver.in_(0xE9) == 0xE9
    for byte in b"boot\n":
        driver.out(0xE9, byte)
    assert driver.board.debug.console == b"boot\n"


@pytest.mark.parametrize(
    ("port", "width", "value", "status"), [(0xF4, 4, 0, 1), (0xF4, 4, 0x10, 0x21), (0xF4, 1, 3, 7), (0xF6, 1, 3, 7)]
)
def test_the_exit_port_ends_the_guest_with_its_status(port, width, value, status):
    driver = Driver()
    driver.out(port, value, width)
    assert driver.board.debug.exit_status == status
    assert driver.stopped == f"debug exit with status {status}"
    driver.out(0x80, 9)
    assert driver.board.debug.post_code == 0
