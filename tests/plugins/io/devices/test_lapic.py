"""The local APIC as Linux drives it, in both forms, and against a naive model of its priorities."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sevlab.core.determinism import TSC_HZ
from sevlab.plugins.io.devices.lapic import RESET, TIMER_HZ, WRITABLE, Lapic

from tests.plugins.io.driver import Driver

BASE = 0xFEE0_0000
APIC_BASE, DEADLINE = 0x1B, 0x6E0
TIMER, TIMER_INITIAL, TIMER_CURRENT, DIVIDE = 0x832, 0x838, 0x839, 0x83E
PERIODIC, TSC_DEADLINE, MASK = 1 << 17, 2 << 17, 1 << 16
TICK = TSC_HZ // TIMER_HZ


def x2apic(vcpus=1):
    driver = Driver(vcpus=vcpus)
    for one in range(vcpus):
        other = driver.other(one) if one else driver
        assert other.wrmsr(APIC_BASE, other.rdmsr(APIC_BASE) | 1 << 10)
        assert other.wrmsr(0x80F, 0x1FF)
        other.interrupts()
    return driver


def test_the_x2apic_periodic_timer_as_linux_programs_it():
    driver = x2apic()
    assert driver.wrmsr(TIMER, PERIODIC | 0xEC)
    assert driver.wrmsr(DIVIDE, 0x3)  # by 16
    assert driver.wrmsr(TIMER_INITIAL, 1000)
    taken = []
    for _ in range(5):
        driver.wait(driver.board.next_event(driver.machine.tsc()) - driver.machine.tsc())
        taken += driver.taken()
        assert driver.wrmsr(0x80B, 0)
    assert taken == [0xEC] * 5
    assert driver.machine.tsc() == 5 * 1000 * 16 * TICK


def test_one_shot_counts_down_and_stops():
    driver = x2apic()
    driver.wrmsr(TIMER, 0x40)
    driver.wrmsr(DIVIDE, 0xB)  # by 1
    driver.wrmsr(TIMER_INITIAL, 100)
    driver.wait(60 * TICK)
    assert driver.rdmsr(TIMER_CURRENT) == 40
    driver.wait(40 * TICK)
    assert driver.taken() == [0x40]
    assert driver.rdmsr(TIMER_CURRENT) == 0
    assert driver.board.next_event(driver.machine.tsc()) is None
    driver.wrmsr(0x80B, 0)
    driver.wait(1000 * TICK)
    assert driver.taken() == []


def test_a_tsc_deadline_fires_at_its_time_and_disarms():
    driver = x2apic()
    driver.wrmsr(TIMER, TSC_DEADLINE | 0x41)
    driver.wrmsr(TIMER_INITIAL, 5)  # ignored in this mode
    assert driver.wrmsr(DEADLINE, 1000)
    assert driver.rdmsr(DEADLINE) == 1000
    driver.wait(999)
    assert driver.taken() == []
    driver.wait(1)
    assert driver.taken() == [0x41]
    assert (driver.rdmsr(DEADLINE), driver.rdmsr(TIMER_INITIAL)) == (0, 0)
    driver.wrmsr(DEADLINE, 5000)
    driver.wrmsr(TIMER, 0x41)  # changing the mode disarms
    assert driver.rdmsr(DEADLINE) == 0
    assert driver.wrmsr(DEADLINE, 5000)
    assert driver.rdmsr(DEADLINE) == 0  # not in deadline mode


def test_a_masked_timer_counts_silently():
    driver = x2apic()
    driver.wrmsr(TIMER, MASK | 0x41)
    driver.wrmsr(DIVIDE, 0xB)
    driver.wrmsr(TIMER_INITIAL, 10)
    driver.wait(20 * TICK)
    driver.wrmsr(TIMER, 0x41)
    driver.wait(20 * TICK)
    assert driver.taken() == []


def test_a_new_divisor_goes_on_from_the_present_count():
    apic = Lapic()
    apic.write(0xF0, 0x1FF, 0)
    apic.write(0x3E0, 0xB, 0)
    apic.write(0x380, 1000, 0)
    apic.write(0x3E0, 0x0, 100 * TICK)  # by 2
    assert apic.current_count(100 * TICK) == 900
    assert apic.current_count(300 * TICK) == 800


@pytest.mark.parametrize(("code", "divisor"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (0xA, 128), (0xB, 1)])
def test_divisors(code, divisor):
    apic = Lapic()
    apic.write(0x3E0, code, 0)
    apic.write(0x380, 1 << 20, 0)
    assert apic.current_count(128 * 10 * TICK) == (1 << 20) - 1280 // divisor


def test_memory_mapped_registers():
    driver = Driver(vcpus=2).other(1)
    assert driver.load(BASE + 0x20) == 1 << 24
    assert driver.load(BASE + 0x30) & 0xFF == 0x14
    driver.store(BASE + 0xF0, 0x1FF)
    driver.store(BASE + 0x80, 0x20)
    driver.store(BASE + 0xD0, 0x0200_0000)
    assert [driver.load(BASE + offset) for offset in (0xF0, 0x80, 0xA0, 0xD0)] == [0x1FF, 0x20, 0x20, 0x0200_0000]
    assert driver.vcpu.system.cr8 == 2
    driver.store(BASE + 0x84, 0xFF)  # between two registers there is nothing
    assert (driver.load(BASE + 0x80), driver.load(BASE + 0x84)) == (0x20, 0)


def test_the_window_is_gone_in_x2apic_mode_and_with_the_apic_off():
    driver = x2apic()
    assert driver.load(BASE + 0x30) == 0xFFFF_FFFF
    driver.store(BASE + 0x80, 0x50)
    assert driver.rdmsr(0x808) == 0
    assert driver.wrmsr(APIC_BASE, BASE)
    assert driver.load(BASE + 0x30) == 0xFFFF_FFFF
    assert driver.rdmsr(0x803) is None


@pytest.mark.parametrize(
    ("start", "value", "legal"),
    [
        (0x800, 0xC00, True),
        (0x800, 0x400, False),
        (0xC00, 0x800, False),
        (0xC00, 0x000, True),
        (0x800, 1 << 48, False),
        (0x000, 0x800, True),
    ],
)
def test_transitions_of_apic_base(start, value, legal):
    driver = Driver()
    driver.board.lapics[0].base = BASE | start | 0x100
    assert driver.wrmsr(APIC_BASE, value | (BASE if value < 1 << 48 else 0)) == legal
    assert driver.rdmsr(APIC_BASE) & 0xC00 == ((value if legal else start) & 0xC00)
    assert driver.rdmsr(APIC_BASE) & 0x100  # whose processor booted cannot be written


@pytest.mark.parametrize("msr", [0x80E, 0x831, 0x800, 0x801, 0x80C, 0x8FF, 0x840])
def test_x2apic_registers_that_do_not_exist(msr):
    driver = x2apic()
    assert driver.rdmsr(msr) is None
    assert not driver.wrmsr(msr, 0)


@pytest.mark.parametrize(
    ("msr", "value"), [(0x80B, 1), (0x828, 1), (0x808, 1 << 32), (0x802, 0), (0x803, 0), (0x810, 0), (0x839, 0)]
)
def test_x2apic_writes_that_fault(msr, value):
    assert not x2apic().wrmsr(msr, value)


def test_x2apic_registers_fault_outside_their_mode():
    driver = Driver()
    assert driver.rdmsr(0x802) is None
    assert not driver.wrmsr(0x80F, 0x1FF)


def test_the_task_priority_holds_interrupts_back_until_it_falls():
    driver = x2apic()
    assert driver.wrmsr(0x808, 0x50)
    driver.wrmsr(0x83F, 0x5F)
    driver.wrmsr(0x83F, 0x60)
    assert driver.taken() == [0x60]
    driver.wrmsr(0x80B, 0)
    assert driver.taken() == []
    driver.set(rbx=4)
    driver.vcpu.vmcb.intercept(0x18)
    driver._exit(0x18, 1 << 63 | 3, 0, b"\x0f\x22\xc3")  # MOV CR8, RBX is the same register
    assert driver.rdmsr(0x808) == 0x40
    assert driver.taken() == [0x5F]


def test_irr_and_isr_show_what_is_under_way():
    driver = x2apic()
    driver.wrmsr(0x83F, 0x31)
    driver.interrupts(False)
    driver.wrmsr(0x83F, 0x51)
    assert driver.taken() == [0x31]
    assert driver.rdmsr(0x811) == 1 << 0x11
    assert driver.rdmsr(0x822) == 1 << 0x11
    assert driver.rdmsr(0x80A) == 0x30


def test_software_disable_masks_every_entry_and_refuses_interrupts():
    driver = x2apic()
    driver.wrmsr(TIMER, 0x41)
    driver.wrmsr(0x80F, 0xFF)
    assert driver.rdmsr(TIMER) == MASK | 0x41
    driver.wrmsr(TIMER, 0x42)
    assert driver.rdmsr(TIMER) == MASK | 0x42
    driver.wrmsr(0x83F, 0x60)
    assert driver.taken() == []


def test_illegal_vectors_are_noted_in_the_error_register():
    driver = x2apic()
    driver.wrmsr(0x83F, 0x0F)
    assert driver.rdmsr(0x828) == 0
    driver.wrmsr(0x828, 0)
    assert driver.rdmsr(0x828) == 1 << 6
    driver.wrmsr(0x830, 0x4_0005)
    driver.wrmsr(0x828, 0)
    assert driver.rdmsr(0x828) == 1 << 5


@pytest.mark.parametrize("offset", sorted(WRITABLE))
def test_reserved_bits_read_as_they_were(offset):
    apic = Lapic()
    apic.write(offset, 0xFFFF_FFFF, 0)
    ones = apic.register(offset)
    apic.write(offset, 0, 0)
    zeros = apic.register(offset)
    assert ones ^ zeros == WRITABLE[offset]
    assert zeros == RESET.get(offset, 0) & ~WRITABLE[offset]


class PriorityMachine(RuleBasedStateMachine):
    """Vectors that arrive, are taken and end, against sets."""

    vectors = st.integers(0, 255)

    def __init__(self):
        super().__init__()
        self.apic = Lapic()
        self.apic.write(0xF0, 0x1FF, 0)
        self.asked, self.serving, self.task = set(), [], 0

    def _wanted(self):
        best = max(self.asked, default=0)
        limit = max(self.task >> 4, max(self.serving, default=0) >> 4)
        return best if best and best >> 4 > limit else None

    @rule(vector=vectors)
    def arrive(self, vector):
        assert self.apic.accept(vector) == (vector >= 16)
        if vector >= 16:
            self.asked.add(vector)

    @rule(value=vectors)
    def set_task_priority(self, value):
        self.apic.write(0x80, value, 0)
        self.task = value

    @rule()
    def acknowledge(self):
        wanted = self._wanted()
        assert self.apic.acknowledge() == wanted
        if wanted is not None:
            self.asked.discard(wanted)
            self.serving.append(wanted)

    @rule()
    def end(self):
        done = max(self.serving, default=None)
        assert self.apic.end_of_interrupt() == done
        if done is not None:
            self.serving.remove(done)

    @invariant()
    def registers_agree(self):
        for start, held in ((0x100, self.serving), (0x200, self.asked)):
            bits = sum(self.apic.read(start + 16 * n, 0) << 32 * n for n in range(8))
            assert bits == sum(1 << vector for vector in held)
        assert self.apic.pending() == self._wanted()
        service = max(self.serving, default=0)
        assert self.apic.read(0xA0, 0) == (self.task if self.task >> 4 >= service >> 4 else service & 0xF0)


TestPriorityMachine = PriorityMachine.TestCase
