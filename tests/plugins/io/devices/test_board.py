"""The board as a whole: declared registers, bounded windows, determinism."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.events import AdvanceClock
from sevlab.core.testing import make_machine
from sevlab.plugins import io
from sevlab.plugins.io.devices import acpi_pm, debug, fw_cfg, ioapic, lapic, pci, pic, pit, rtc, uart

from tests.plugins.io.driver import Driver

PORT_DEVICES = {uart: uart.COM1_PORT, pic: 0, pit: 0, rtc: 0, pci: 0, debug: 0, fw_cfg: 0, acpi_pm: 0}
WINDOWS = {
    ioapic: (ioapic.IOAPIC_GPA, ioapic.IOAPIC_BYTES),
    lapic: (lapic.LAPIC_GPA, lapic.LAPIC_BYTES),
    pci: (pci.ECAM_GPA, pci.ECAM_BYTES),
}


def declared_ports():
    for module, base in PORT_DEVICES.items():
        for register in module.REGISTERS:
            yield from ((base + register.offset + n) for n in range(register.width))


def test_every_port_is_declared_as_a_register_and_the_other_way_round():
    machine = make_machine("io", guests=1)
    reserved = {*range(0x512, 0x514), *range(0x606, 0x608)}  # inside a block, nothing there
    assert set(declared_ports()) == set(machine.tables.ports) - reserved


@pytest.mark.parametrize("module", [ioapic, lapic])
def test_registers_of_a_window_lie_in_it_and_do_not_overlap(module):
    _, length = WINDOWS[module]
    places = []
    for register in module.REGISTERS:
        assert register.offset + register.width <= length
        places.append(register.offset)
    assert len(set(places)) == len(places)


def test_windows_are_where_the_modules_say():
    machine = make_machine("io", guests=1)
    assert {(window.gpa, window.length_bytes) for window in machine.tables.mmio} == set(WINDOWS.values())


@pytest.fixture(scope="module")
def shared():
    return Driver()


@given(st.integers(0, 0xFFFF) | st.sampled_from(sorted(declared_ports())), st.sampled_from((1, 2, 4)), st.integers(0))
def test_any_port_access_is_answered_zero_extended(shared, port, width, value):
    shared.machine.reset()
    io.port_out(shared.machine, shared.vcpu, port, width, value)
    answer = io.port_in(shared.machine, shared.vcpu, port, width)
    assert 0 <= answer < 1 << width * 8


@given(
    st.sampled_from([edge for gpa, length in WINDOWS.values() for edge in (gpa, gpa + length)]),
    st.integers(-40, 0x420),
    st.sampled_from((1, 2, 4, 8, 16)),
    st.integers(0, (1 << 128) - 1),
)
def test_any_window_access_is_answered_and_what_is_outside_reads_ones(shared, edge, distance, width, value):
    shared.machine.reset()
    gpa = edge + distance
    io.mmio_write(shared.machine, shared.vcpu, gpa, width, value)
    answer = io.mmio_read(shared.machine, shared.vcpu, gpa, width)
    assert 0 <= answer < 1 << width * 8
    for n in range(width):
        if not any(start <= gpa + n < start + length for start, length in WINDOWS.values()):
            assert answer >> n * 8 & 0xFF == 0xFF


def test_handlers_get_only_what_lies_in_their_window():
    from sevlab.core.builder import MmioWindow
    from sevlab.core.hookspecs import hookimpl

    seen = []

    class Plugin:
        """A window of 12 bytes."""

        @staticmethod
        @hookimpl
        def sevlab_register(builder):
            builder.mmio(
                MmioWindow(
                    0xD000_0000,
                    12,
                    lambda m, v, offset, width: seen.append(("r", offset, width)) or (1 << 70) - 1,
                    lambda m, v, offset, width, value: seen.append(("w", offset, width, value)),
                )
            )

    machine = make_machine("io", given={"x": Plugin()}, guests=1)
    vcpu = machine.vcpus[0]
    assert io.mmio_read(machine, vcpu, 0xD000_0000, 16) == (1 << 128) - 1
    assert io.mmio_read(machine, vcpu, 0xD000_000A, 4) == 0xFFFF_FFFF
    io.mmio_write(machine, vcpu, 0xD000_000A, 4, 0x4433_2211)
    io.mmio_write(machine, vcpu, 0xCFFF_FFFE, 4, 5)
    assert seen == [("r", 0, 8), ("r", 8, 4), ("r", 10, 2), ("w", 10, 2, 0x2211)]


def test_two_machines_with_the_same_traffic_agree_to_the_last_bit():
    def run():
        driver = Driver(vcpus=2)
        driver.init_pics(unmasked=(0, 4, 8))
        driver.interrupts()
        driver.store(lapic.LAPIC_GPA + 0xF0, 0x1FF)
        driver.store(lapic.LAPIC_GPA + 0x350, 0x700)
        driver.store(lapic.LAPIC_GPA + 0x320, 1 << 17 | 0x61)
        driver.store(lapic.LAPIC_GPA + 0x380, 123_457)
        for port, value in ((0x43, 0x34), (0x40, 0x11), (0x40, 0x22), (0x3F9, 3), (0x3FC, 8)):
            driver.out(port, value)
        driver.machine.apply(io.SerialInput(0, b"input"))
        for _ in range(20):
            driver.wait(1_234_567)
            driver.out(0x20, 0x20)
            driver.store(lapic.LAPIC_GPA + 0xB0, 0)
        return driver.vectors, driver.machine.snapshot()

    first, second = run(), run()
    assert first == second
    assert {0x20, 0x24, 0x61} <= set(first[0])


def test_the_next_event_is_the_earliest_of_all_timers():
    driver = Driver()
    assert driver.board.next_event(0) is None
    driver.store(lapic.LAPIC_GPA + 0xF0, 0x1FF)
    driver.store(lapic.LAPIC_GPA + 0x320, 0x61)
    driver.store(lapic.LAPIC_GPA + 0x3E0, 0xB)
    driver.store(lapic.LAPIC_GPA + 0x380, 1_000_000)
    late = driver.board.next_event(0)
    assert late == 2_000_000
    for port, value in ((0x43, 0x30), (0x40, 100), (0x40, 0)):
        driver.out(port, value)
    early = driver.board.next_event(0)
    assert early < late
    driver.machine.apply(AdvanceClock(early))
    driver.wait(0)
    assert driver.board.next_event(early) == late
