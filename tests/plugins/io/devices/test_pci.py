"""Configuration space as Linux finds it: probe of mechanism 1, enumeration, and the same through ECAM."""

from __future__ import annotations

from sevlab.plugins.io.devices.pci import ECAM_GPA, Pci

from tests.plugins.io.driver import Driver

ADDRESS, DATA = 0xCF8, 0xCFC


def select(driver, bus, device, function, register):
    driver.out(ADDRESS, 1 << 31 | bus << 16 | device << 11 | function << 8 | register, 4)


def read32(driver, bus, device, function, register):
    select(driver, bus, device, function, register)
    return driver.in_(DATA, 4)


def test_linux_probes_mechanism_1():
    driver = Driver()
    driver.out(0xCFB, 0x01)
    before = driver.in_(ADDRESS, 4)
    driver.out(ADDRESS, 0x8000_0000, 4)
    assert driver.in_(ADDRESS, 4) == 0x8000_0000
    driver.out(ADDRESS, before, 4)
    assert driver.in_(ADDRESS, 4) == before == 0


def test_enumeration_finds_the_host_bridge_alone():
    driver = Driver()
    found = [
        (bus, device, function)
        for bus in (0, 1, 255)
        for device in range(32)
        for function in (0, 7)
        if read32(driver, bus, device, function, 0) != 0xFFFF_FFFF
    ]
    assert found == [(0, 0, 0)]
    assert read32(driver, 0, 0, 0, 0) == 0x1237_8086
    assert read32(driver, 0, 0, 0, 8) >> 16 == 0x0600


def test_bytes_and_words_come_from_their_ports():
    driver = Driver()
    select(driver, 0, 0, 0, 0)
    assert [driver.in_(DATA + n) for n in range(4)] == [0x86, 0x80, 0x37, 0x12]
    assert driver.in_(DATA + 2, 2) == 0x1237
    assert driver.in_(DATA + 2, 4) == 0xFFFF_1237  # two of the ports are nobody's
    assert driver.in_(ADDRESS, 2) == 0xFFFF


def test_only_command_and_interrupt_line_are_written():
    driver = Driver()
    select(driver, 0, 0, 0, 4)
    driver.out(DATA, 0x0007, 2)
    assert driver.in_(DATA, 2) == 7
    select(driver, 0, 0, 0, 0x10)
    driver.out(DATA, 0xFFFF_FFFF, 4)
    assert driver.in_(DATA, 4) == 0  # no base address register: sizing reads zero
    select(driver, 0, 0, 0, 0)
    driver.out(DATA, 0, 4)
    assert driver.in_(DATA, 4) == 0x1237_8086


def test_nothing_answers_while_the_enable_bit_is_clear():
    driver = Driver()
    driver.out(ADDRESS, 0, 4)
    assert driver.in_(DATA, 4) == 0xFFFF_FFFF
    driver.out(DATA, 7, 4)
    assert read32(driver, 0, 0, 0, 4) == 0


def test_ecam_shows_the_same_space():
    driver = Driver()
    for register in (0, 4, 8, 0x3C):
        assert driver.load(ECAM_GPA + register) == read32(driver, 0, 0, 0, register)
    assert driver.load(ECAM_GPA + (3 << 15)) == 0xFFFF_FFFF
    assert driver.load(ECAM_GPA + 0x100) == 0xFFFF_FFFF  # no extended space
    driver.store(ECAM_GPA + 4, 6)
    assert read32(driver, 0, 0, 0, 4) & 0xFFFF == 6


def test_a_function_that_is_added_is_found_and_bounded():
    pci = Pci()
    pci.add(5 << 3, bytes(range(256)))
    assert pci.read_ecam((5 << 15) + 0xFC, 4) == 0xFFFE_FDFC
    assert pci.read_ecam((5 << 15) + 0xFE, 4) == 0xFFFF_FFFF
    pci.write_ecam((5 << 15) + 0xFE, 4, 0)
    assert pci.functions[5 << 3] == bytes(range(256))
