"""Who gets an interrupt message, and what INIT, startup and NMI do."""

from __future__ import annotations

import pytest
from sevlab.core.cpu import CONTROL_SEV, CONTROL_SEV_ES
from sevlab.core.events import Resumed, Schedule
from sevlab.core.svm import ExitCode
from sevlab.plugins import io
from sevlab.plugins.io.devices.lapic import Lapic
from sevlab.plugins.io.devices.messages import Message, reaches

from tests.plugins.io.driver import Driver

BASE = 0xFEE0_0000
ICR_LOW, ICR_HIGH = BASE + 0x300, BASE + 0x310


def processors(count=3):
    driver = Driver(vcpus=count)
    for number in range(count):
        other = driver.other(number)
        other.store(BASE + 0xF0, 0x1FF)
        other.store(BASE + 0xD0, 1 << 24 + number)
    return driver


def requested(driver):
    """APIC numbers by vector."""
    found = {}
    for number, apic in driver.board.lapics.items():
        for vector in range(256):
            if apic.irr >> vector & 1:
                found.setdefault(vector, []).append(number)
    return found


def send(driver, low, high=0):
    driver.store(ICR_HIGH, high << 24)
    driver.store(ICR_LOW, low)


@pytest.mark.parametrize(
    ("low", "high", "reached"),
    [
        (0x4041, 1, [1]),
        (0x4041, 9, []),
        (0x4041, 0xFF, [0, 1, 2]),
        (0x4841, 0b101, [0, 2]),
        (0x4841, 0xFF, [0, 1, 2]),
        (0x4_4041, 0, [0]),
        (0x8_4041, 0, [0, 1, 2]),
        (0xC_4041, 0, [1, 2]),
        (0x4041 | 7 << 8, 1, []),
    ],
)
def test_destinations_and_shorthands(low, high, reached):
    driver = processors()
    send(driver, low, high)
    assert requested(driver) == ({0x41: reached} if reached else {})


def test_lowest_priority_goes_to_one():
    driver = processors()
    driver.store(BASE + 0x80, 0x50)
    driver.other(2).store(BASE + 0x80, 0x40)
    driver.other(1).store(BASE + 0x80, 0x60)
    send(driver, 0x4941, 0xFF)
    assert requested(driver) == {0x41: [2]}


def test_the_cluster_model():
    apic = Lapic()
    apic.write(0xE0, 0, 0)
    apic.write(0xD0, 0x2100_0000, 0)
    for destination, reached in ((0x21, True), (0x23, True), (0x22, False), (0x11, False), (0xFF, True)):
        assert reaches(apic, Message(0x41, 0, destination, logical=True)) == reached


def test_x2apic_logical_destinations_are_cluster_and_mask():
    apic = Lapic(apic_id=0x23, base=BASE | 0xC00)
    for destination, reached in ((0x2_0008, True), (0x2_000C, True), (0x2_0004, False), (0x1_0008, False)):
        assert reaches(apic, Message(0x41, 0, destination, logical=True, wide=True)) == reached
    assert reaches(apic, Message(0x41, 0, 0xFFFF_FFFF, logical=False, wide=True))
    assert not reaches(apic, Message(0x41, 0, 0xFF, logical=False, wide=True))


def test_init_and_startup_bring_up_a_second_processor():
    driver = processors(2)
    second = driver.other(1)
    second.set(rbx=5, rip=0x1234, cr0=0xE000_0011)
    send(driver, 0xC500, 1)  # INIT, level, assert
    assert second.vcpu.halted
    assert (second.vcpu.regs.rbx, second.vcpu.regs.rip, second.vcpu.system.cr0) == (0, 0xFFF0, 0x6000_0010)
    assert not second.board.lapics[1].enabled
    send(driver, 0x8500, 1)  # de-assert
    send(driver, 0x4041, 1)  # an interrupt does not end the wait
    io.wake(driver.machine, second.vcpu)
    assert second.vcpu.halted
    send(driver, 0x4608, 1)
    assert not second.vcpu.halted
    assert (second.vcpu.system.cs, second.vcpu.regs.rip) == ((0x800, 0x9B, 0xFFFF, 0x8000), 0)
    second.set(rip=0x55)
    send(driver, 0x4608, 1)  # the second startup of the sequence finds it running
    assert second.vcpu.regs.rip == 0x55


def test_a_startup_message_does_not_end_hlt():
    driver = processors(2)
    second = driver.other(1)
    second._exit(ExitCode.HLT, 0, 0, b"\xf4")
    send(driver, 0x4608, 1)
    assert second.vcpu.halted


def test_the_host_cannot_reset_an_encrypted_processor():
    driver = processors(2)
    second = driver.other(1)
    second.set(rbx=5)
    second.vcpu.vmcb.encryption_control |= CONTROL_SEV | CONTROL_SEV_ES
    send(driver, 0xC500, 1)
    assert second.vcpu.halted
    assert second.vcpu.regs.rbx == 5
    send(driver, 0x4608, 1)
    assert not second.vcpu.halted
    assert second.vcpu.regs.rip != 0


def test_the_boot_processor_starts_again_at_the_reset_vector():
    driver = processors(2)
    driver.set(rip=0x5000)
    driver.other(1).store(ICR_HIGH, 0)
    driver.other(1).store(ICR_LOW, 0xC500)
    assert not driver.vcpu.halted
    assert driver.vcpu.regs.rip == 0xFFF0


def test_an_nmi_ends_hlt_whatever_if_and_blocks_the_next_until_iret():
    driver = processors(2)
    driver.interrupts(False)
    driver._exit(ExitCode.HLT, 0, 0, b"\xf4")
    assert driver.vcpu.halted
    other = driver.other(1)
    send(other, 0x4400, 0)
    io.wake(driver.machine, driver.vcpu)
    driver.enter()
    assert driver.taken() == [2]
    assert driver.vcpu.vmcb.intercepts >> ExitCode.IRET & 1
    send(other, 0x4400, 0)
    driver.wait(1)
    assert driver.taken() == []  # in its handler
    driver.set(rip=0x9000)
    driver._exit(ExitCode.IRET, 0, 0, b"\xcf")
    assert driver.taken() == []  # the IRET itself is still to come
    assert not driver.vcpu.vmcb.intercepts >> ExitCode.IRET & 1
    driver.set(rip=0x100)
    driver.wait(1)
    assert driver.taken() == [2]


def test_an_encrypted_guest_says_that_its_nmi_is_done():
    driver = processors(1)
    driver.vcpu.vmcb.encryption_control |= CONTROL_SEV | CONTROL_SEV_ES
    apic = driver.board.lapics[0]
    apic.nmi_pending = True
    driver.enter()
    assert driver.taken() == [2]
    assert not driver.vcpu.vmcb.intercepts >> ExitCode.IRET & 1
    apic.nmi_pending = True
    driver.enter()
    assert driver.taken() == []
    io.nmi_complete(driver.machine, driver.vcpu)
    driver.enter()
    assert driver.taken() == [2]


def test_an_interrupt_with_if_clear_does_not_end_hlt():
    driver = processors(1)
    driver.interrupts(False)
    driver._exit(ExitCode.HLT, 0, 0, b"\xf4")
    driver.board.lapics[0].accept(0x41)
    assert not io.wake(driver.machine, driver.vcpu)
    assert driver.machine.apply(Schedule()).first(Resumed) is None
    driver.interrupts()
    assert io.wake(driver.machine, driver.vcpu)
