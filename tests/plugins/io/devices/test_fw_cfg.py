"""The firmware configuration device as OVMF and kvm-unit-tests use it: by port, by DMA, with a guest that races."""

from __future__ import annotations

import pytest
from sevlab.core.events import MemoryRead, MemoryWrite, Party, Race, Space
from sevlab.core.testing import assert_offsets
from sevlab.plugins.io.devices.fw_cfg import MAX_TRANSFER_BYTES, DmaDescriptor, FwCfg

from tests.plugins.io.driver import Driver

SELECTOR, DATA, DMA = 0x510, 0x511, 0x514
DESCRIPTOR, BUFFER = 0x4000, 0x5000
ERROR, READ, SKIP, SELECT, WRITE = 1, 2, 4, 8, 16


def item(driver, key, length):
    driver.out(SELECTOR, key, 2)
    return bytes(driver.in_(DATA) for _ in range(length))


def memory(driver, gpa, length):
    return driver.machine.apply(MemoryRead(Party.GUEST, 0, Space.GPA, gpa, False, length)).records[0].data


def store(driver, gpa, data):
    driver.machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, gpa, False, data))


def describe(control, length, address):
    return control.to_bytes(4, "big") + length.to_bytes(4, "big") + address.to_bytes(8, "big")


def start(driver, gpa=DESCRIPTOR):
    driver.out(DMA, int.from_bytes((gpa >> 32).to_bytes(4, "big"), "little"), 4)
    driver.out(DMA + 4, int.from_bytes((gpa & 0xFFFF_FFFF).to_bytes(4, "big"), "little"), 4)


def dma(driver, control, length, address=BUFFER):
    store(driver, DESCRIPTOR, describe(control, length, address))
    start(driver)
    return int.from_bytes(memory(driver, DESCRIPTOR, 4), "big")


def test_the_descriptor_is_the_documents():
    assert_offsets(DmaDescriptor, {"control": (0, 4), "length": (4, 4), "address": (8, 8)}, 16)


def test_detection_and_sizes_by_port():
    driver = Driver(vcpus=2)
    assert item(driver, 0, 4) == b"QEMU"
    assert item(driver, 1, 4) == b"\x03\0\0\0"
    assert int.from_bytes(item(driver, 3, 8), "little") == 1 << 20
    assert int.from_bytes(item(driver, 5, 2), "little") == 2
    assert item(driver, 0, 6) == b"QEMU\0\0"  # zeros past the end
    assert item(driver, 0x7777, 2) == b"\0\0"
    high, low = driver.in_(DMA, 4), driver.in_(DMA + 4, 4)
    assert high.to_bytes(4, "little") + low.to_bytes(4, "little") == b"QEMU CFG"


def test_a_byte_to_the_selector_selects_nothing():
    driver = Driver()
    driver.out(SELECTOR, 0, 2)
    driver.out(SELECTOR, 5, 1)
    assert driver.in_(DATA) == ord("Q")


def test_files_are_found_through_the_directory():
    driver = Driver()
    first = driver.board.fw_cfg.add_file("etc/a", b"alpha")
    second = driver.board.fw_cfg.add_file("etc/b", b"beta!!")
    directory = item(driver, 0x19, 4 + 2 * 64)
    assert int.from_bytes(directory[:4], "big") == 2
    entry = directory[68:132]
    assert int.from_bytes(entry[:4], "big") == 6
    assert int.from_bytes(entry[4:6], "big") == second == first + 1
    assert entry[8:].rstrip(b"\0") == b"etc/b"
    assert item(driver, second, 6) == b"beta!!"


def test_dma_selects_reads_and_skips():
    driver = Driver()
    key = driver.board.fw_cfg.add_file("etc/a", bytes(range(200)) * 60)
    assert dma(driver, key << 16 | SELECT | READ, 5000) == 0
    assert memory(driver, BUFFER, 5000) == (bytes(range(200)) * 60)[:5000]
    assert dma(driver, SKIP, 100) == 0
    assert dma(driver, READ, 4) == 0
    assert memory(driver, BUFFER, 4) == bytes((100, 101, 102, 103))


@pytest.mark.parametrize(
    ("control", "length", "address", "expected"),
    [
        (WRITE, 4, BUFFER, ERROR),
        (READ | WRITE, 4, BUFFER, 0),
        (READ, MAX_TRANSFER_BYTES + 1, BUFFER, ERROR),
        (READ, 16, (1 << 20) - 8, ERROR),
        (READ, 16, 1 << 50, ERROR),
        (READ, 16, (1 << 64) - 8, ERROR),
        (READ, 0, BUFFER, 0),
        (0, 4, BUFFER, 0),
    ],
)
def test_dma_errors_are_told_and_change_no_memory(control, length, address, expected):
    driver = Driver()
    before = memory(driver, (1 << 20) - 64, 64)
    assert dma(driver, control, length, address) == expected
    assert memory(driver, (1 << 20) - 64, 64) == before


def test_a_descriptor_outside_memory_is_ignored():
    driver = Driver()
    for gpa in ((1 << 20) - 8, 1 << 40, (1 << 64) - 1):
        start(driver, gpa)
    assert item(driver, 0, 4) == b"QEMU"


def test_the_descriptor_is_fetched_once():
    """A second vCPU that changes it after the fetch changes nothing; before the fetch, it decides."""
    driver = Driver()
    spa = driver.machine.hypervisor.vms[0].memory_spa
    other = describe(SELECT | READ, 4, BUFFER + 0x100)
    for before_fetch, place in ((2, BUFFER + 0x100), (3, BUFFER)):
        store(driver, DESCRIPTOR, describe(SELECT | READ, 4, BUFFER))
        store(driver, BUFFER, bytes(0x200))
        driver.out(DMA, 0, 4)
        driver.set(rax=int.from_bytes(DESCRIPTOR.to_bytes(4, "big"), "little"))
        driver.machine.apply(Race(before_fetch, spa + DESCRIPTOR, other))
        driver._exit(0x7B, (DMA + 4) << 16 | 0x40 | 0x200, 1, b"\xef")  # fetch 1 is the handler's scheduling point
        assert memory(driver, place, 4) == b"QEMU", before_fetch


def test_take_goes_on_from_the_position():
    device = FwCfg()
    device.install(ram_bytes=1, cpus=1)
    device.select(0)
    assert (device.take(2), device.take(4)) == (b"QE", b"MU\0\0")
