"""The timer against Linux' calibration and tick, and against a counter that is stepped clock by clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sevlab.core.determinism import TSC_HZ
from sevlab.core.events import AdvanceClock
from sevlab.plugins.io.devices.pit import PIT_HZ, Counter, Pit

from tests.plugins.io.driver import Driver


def ticks(clocks):
    """The TSC after `clocks` input clocks."""
    return -(-clocks * TSC_HZ // PIT_HZ)


def test_linux_calibrates_the_tsc_by_counter_2():
    driver = Driver()
    milliseconds = 10
    latch = PIT_HZ * milliseconds // 1000
    driver.out(0x61, driver.in_(0x61) & ~2 | 1)
    driver.out(0x43, 0xB0)
    driver.out(0x42, latch & 0xFF)
    driver.out(0x42, latch >> 8)
    start = driver.machine.tsc()
    polls = 0
    while not driver.in_(0x61) & 0x20:
        driver.machine.apply(AdvanceClock(TSC_HZ // 100_000))
        polls += 1
    measured_khz = (driver.machine.tsc() - start) // milliseconds
    assert abs(measured_khz - TSC_HZ // 1000) <= TSC_HZ // 1000 // 500
    assert polls > 900


def test_the_quick_calibration_sees_the_high_byte_fall():
    driver = Driver()
    driver.out(0x61, driver.in_(0x61) & ~2 | 1)
    for port, value in ((0x43, 0xB0), (0x42, 0xFF), (0x42, 0xFF)):
        driver.out(port, value)
    seen = []
    for _ in range(4):
        driver.in_(0x42)
        seen.append(driver.in_(0x42))
        driver.machine.apply(AdvanceClock(ticks(256)))
    assert seen == [0xFF, 0xFE, 0xFD, 0xFC]


def test_the_periodic_tick_interrupts_once_a_period():
    driver = Driver()
    driver.init_pics(unmasked=(0,))
    driver.interrupts()
    for port, value in ((0x43, 0x34), (0x40, 0x9C), (0x40, 0x2E)):  # rate generator, 11932: 100 Hz
        driver.out(port, value)
    taken = []
    for _ in range(10):
        driver.wait_seconds(0.0101)
        taken += driver.taken()
        driver.out(0x20, 0x60)
    assert taken == [0x20] * 10
    assert driver.board.next_event(driver.machine.tsc()) == driver.board.pit.next_event()


def test_a_one_shot_interrupts_once_at_its_time():
    driver = Driver()
    driver.init_pics(unmasked=(0,))
    driver.interrupts()
    for port, value in ((0x43, 0x30), (0x40, 0xE8), (0x40, 0x03)):
        driver.out(port, value)
    due = driver.board.next_event(driver.machine.tsc())
    driver.wait(due - driver.machine.tsc() - 1)
    assert driver.taken() == []
    driver.wait(1)
    assert driver.taken() == [0x20]
    driver.out(0x20, 0x20)
    driver.wait_seconds(1)
    assert driver.taken() == []
    assert driver.board.next_event(driver.machine.tsc()) is None


def test_the_latch_holds_until_both_bytes_are_read():
    pit = Pit()
    for value in (0x34, 0x00, 0x10):
        pit.write(0x43 if value == 0x34 else 0x40, value, 0)
    pit.write(0x43, 0x00, ticks(0x234))
    later = ticks(0x900)
    assert pit.read(0x40, later) | pit.read(0x40, later) << 8 == 0x1000 - 0x234
    assert pit.read(0x40, later) | pit.read(0x40, later) << 8 == 0x1000 - 0x900


def test_read_back_gives_status_then_count():
    pit = Pit()
    pit.write(0x43, 0xB6, 0)
    pit.write(0x43, 0xE8, 0)  # status of counter 2: no count yet
    assert pit.read(0x42, 0) == 0x40 | 0x80 | 0x36
    pit.write(0x42, 100, 0)
    pit.write(0x42, 0, 0)
    pit.write(0x61, 1, 0)
    pit.write(0x43, 0xC8, ticks(60))
    assert pit.read(0x42, 0) == 0x36  # OUT is low in the second half
    assert pit.read(0x42, 0) | pit.read(0x42, 0) << 8 == 100 - (120 - 100)


def test_decimal_counting():
    pit = Pit()
    pit.write(0x43, 0x31, 0)
    pit.write(0x40, 0x00, 0)
    pit.write(0x40, 0x10, 0)
    now = ticks(1)
    assert pit.read(0x40, now) | pit.read(0x40, now) << 8 == 0x0999
    pit.write(0x40, 0, 0)
    pit.write(0x40, 0, 0)
    assert pit.channel_0.count == 10_000


def test_the_first_byte_of_a_new_count_stops_a_one_shot():
    pit = Pit()
    pit.write(0x43, 0x30, 0)
    pit.write(0x40, 10, 0)
    pit.write(0x40, 0, 0)
    pit.write(0x40, 5, ticks(3))
    assert not pit.channel_0.output(ticks(50))
    assert not pit.due(ticks(50))
    pit.write(0x40, 0, ticks(50))
    assert pit.channel_0.output(ticks(50) + ticks(5))


@pytest.mark.parametrize(("mode", "before", "at", "after"), [(0, 0, 1, 1), (1, 0, 1, 1), (4, 1, 0, 1), (5, 1, 0, 1)])
def test_outputs_of_the_one_shot_modes(mode, before, at, after):
    counter = Counter(mode=mode)
    counter.load(10, 0)
    assert [counter.output(ticks(n)) for n in (9, 10, 11)] == [before, at, after]


def test_the_gate_holds_counter_2_and_restarts_it():
    pit = Pit()
    pit.write(0x61, 0, 0)
    for port, value in ((0x43, 0xB0), (0x42, 50), (0x42, 0)):
        pit.write(port, value, 0)
    assert pit.read(0x42, ticks(30)) == 50
    pit.read(0x42, 0)
    pit.write(0x61, 1, ticks(30))
    assert pit.read(0x42, ticks(30) + ticks(10)) == 40


class Stepped:
    """A counter of the datasheet, one clock at a time."""

    def __init__(self, mode, count):
        self.mode, self.reload, self.value, self.out = mode, count, count, mode != 0
        self.edges = 0

    def clock(self):
        before = self.out
        if self.mode == 0:
            self.value = (self.value - 1) & 0xFFFF
            self.out = self.out or self.value == 0
        elif self.mode == 2:
            self.value -= 1
            if self.value == 0:
                self.value = self.reload
            self.out = self.value != 1
        else:
            self.value -= 2
            if self.value == 0:
                self.value = self.reload
                self.out = not self.out
        self.edges += self.out and not before


@given(st.sampled_from((0, 2, 3)), st.integers(1, 60), st.integers(0, 400))
def test_value_output_and_edges_agree_with_a_stepped_counter(mode, half, clocks):
    count = half * 2
    counter, model = Counter(mode=mode), Stepped(mode, count)
    counter.load(count, 0)
    for _ in range(clocks):
        model.clock()
    now = ticks(clocks)
    assert counter.elapsed(now) == clocks
    assert counter.value(now) == model.value
    assert counter.output(now) == model.out
    assert counter.edges(now) == model.edges


class TimerMachine(RuleBasedStateMachine):
    """Bytes to all ports at any times: reads give bytes, edges never repeat, the next event is the next edge."""

    def __init__(self):
        super().__init__()
        self.pit, self.now = Pit(), 0

    @rule(port=st.sampled_from((0x40, 0x41, 0x42, 0x43, 0x61)), value=st.integers(0, 255))
    def write(self, port, value):
        self.pit.write(port, value, self.now)

    @rule(port=st.sampled_from((0x40, 0x41, 0x42, 0x43, 0x61)))
    def read(self, port):
        assert 0 <= self.pit.read(port, self.now) <= 0xFF

    @rule(clocks=st.integers(0, 70_000))
    def wait(self, clocks):
        self.now += ticks(clocks)

    @rule()
    def take_edge(self):
        self.pit.due(self.now)
        assert not self.pit.due(self.now)

    @rule()
    def jump_to_the_next_event(self):
        self.pit.due(self.now)
        due = self.pit.next_event()
        if due is None:
            assert not self.pit.due(self.now + ticks(200_000))
            return
        assert due > self.now
        assert not self.pit.due(due - 1)
        assert self.pit.due(due)
        self.now = due

    @invariant()
    def values_fit(self):
        for counter in self.pit.counters:
            assert 0 <= counter.value(self.now) <= 0xFFFF


TestTimerMachine = TimerMachine.TestCase
