"""The interrupt controllers against what Linux does with them, and against a naive model of full nesting."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sevlab.plugins import io
from sevlab.plugins.io.devices.pic import INITIALISATION, Pic, PicPair, Setup, Word

from tests.plugins.io.driver import Driver


def running(*unmasked):
    driver = Driver()
    driver.init_pics(unmasked=unmasked)
    driver.interrupts()
    return driver


def line(driver, irq, level=True):
    driver.machine.apply(io.InterruptLine(0, irq, level))
    driver.enter()


def test_linux_probes_by_the_mask_and_initialises():
    driver = Driver()
    driver.out(0xA1, 0xFF)
    driver.out(0x21, 0xFB)
    assert driver.in_(0x21) == 0xFB
    driver.init_pics(unmasked=(1,))
    assert (driver.in_(0x21), driver.in_(0xA1)) == (0xFD, 0xFF)


def test_an_edge_is_delivered_once_and_eoi_lets_the_next_in():
    driver = running(1, 4)
    line(driver, 4)
    assert driver.taken() == [0x24]
    driver.out(0x20, 0x0B)
    assert driver.in_(0x20) == 0x10
    line(driver, 4, False)
    line(driver, 4)
    assert driver.taken() == []  # in service
    line(driver, 1)
    assert driver.taken() == [0x21]  # a higher one interrupts it
    driver.out(0x20, 0x20)
    driver.out(0x20, 0x20)
    assert driver.taken() == [0x24]


def test_the_slave_needs_an_eoi_at_both_chips():
    driver = running(8, 12)
    line(driver, 12)
    assert driver.taken() == [0x2C]
    driver.out(0x20, 0x0B)
    driver.out(0xA0, 0x0B)
    assert (driver.in_(0x20), driver.in_(0xA0)) == (0x04, 0x10)
    driver.out(0xA0, 0x64)
    line(driver, 8)
    assert driver.taken() == []  # the master's line 2 is still in service
    driver.out(0x20, 0x62)
    assert driver.taken() == [0x28]


def test_a_masked_line_waits():
    driver = running()
    line(driver, 3)
    assert driver.taken() == []
    driver.out(0x20, 0x0A)
    assert driver.in_(0x20) == 0x08
    driver.out(0x21, 0xF7)
    assert driver.taken() == [0x23]


def test_with_interrupts_off_a_window_opens_and_the_interrupt_follows():
    driver = running(5)
    driver.interrupts(False)
    line(driver, 5)
    assert driver.taken() == []
    vmcb = driver.vcpu.vmcb
    assert vmcb.vintr & 1 << 8
    assert vmcb.intercepts >> 0x64 & 1
    driver.interrupts()
    driver._exit(0x64, 0, 0, b"")
    assert driver.taken() == [0x25]
    assert not vmcb.vintr & 1 << 8


def test_a_request_that_goes_away_is_spurious():
    pics = PicPair()
    for chip in (pics.master, pics.slave):
        chip.vector_base = 0x20 if chip is pics.master else 0x28
    assert pics.acknowledge() == 0x27
    assert pics.master.isr == 0
    pics.slave.imr = 0xFF
    pics.master.irr = 4
    assert pics.acknowledge() == 0x2F
    assert (pics.master.isr, pics.slave.isr) == (4, 0)


def test_a_level_triggered_line_asks_again_after_eoi():
    driver = Driver()
    driver.out(0x4D1, 0x08)
    driver.init_pics(unmasked=(11,))
    driver.interrupts()
    line(driver, 11)
    assert driver.taken() == [0x2B]
    driver.out(0xA0, 0x20)
    driver.out(0x20, 0x20)
    assert driver.taken() == [0x2B]
    line(driver, 11, False)
    driver.out(0xA0, 0x20)
    driver.out(0x20, 0x20)
    assert driver.taken() == []


def test_the_edge_level_register_has_fixed_bits():
    driver = Driver()
    driver.out(0x4D0, 0xFF)
    driver.out(0x4D1, 0xFF)
    assert (driver.in_(0x4D0), driver.in_(0x4D1)) == (0xF8, 0xDE)


def test_poll_takes_the_interrupt_by_hand():
    driver = running(4)
    driver.interrupts(False)
    line(driver, 4)
    driver.out(0x20, 0x0C)
    assert driver.in_(0x20) == 0x84
    driver.out(0x20, 0x0C)
    assert driver.in_(0x20) == 0x00


def test_automatic_eoi_leaves_nothing_in_service():
    chip = Pic(auto_eoi=True)
    chip.set_line(3, level=True)
    assert chip.acknowledge() == 3
    assert chip.isr == 0


def test_special_mask_mode_lets_lower_lines_through_a_masked_one():
    chip = Pic()
    chip.set_line(1, level=True)
    chip.acknowledge()
    chip.set_line(5, level=True)
    chip.write_data(0x02)
    assert chip.request() is None
    chip.write_command(0x68)
    assert chip.request() == 5
    chip.write_command(0x48)
    assert chip.request() is None


def test_special_fully_nested_mode_lets_the_slave_interrupt_itself():
    pics = PicPair()
    pics.master.special_nested = True
    pics.set_line(12, level=True)
    assert pics.acknowledge() == 4
    pics.set_line(9, level=True)
    assert pics.pending()
    assert pics.acknowledge() == 1


def test_rotation_makes_the_line_the_lowest():
    chip = Pic()
    chip.set_line(0, level=True)
    chip.acknowledge()
    chip.write_command(0xA0)  # rotate on non-specific EOI
    assert (chip.isr, chip.lowest) == (0, 0)
    for number in (0, 1):
        chip.set_line(number, level=False)
        chip.set_line(number, level=True)
    assert chip.request() == 1
    chip.write_command(0xC3)
    assert chip.lowest == 3


@pytest.mark.parametrize(
    ("icw1", "expected"),
    [
        (0x10, [Setup.VECTOR, Setup.CASCADE, Setup.MASK]),
        (0x11, [Setup.VECTOR, Setup.CASCADE, Setup.MODE, Setup.MASK]),
        (0x12, [Setup.VECTOR, Setup.MASK]),
        (0x13, [Setup.VECTOR, Setup.MODE, Setup.MASK]),
    ],
)
def test_icw1_says_which_words_follow(icw1, expected):
    chip = Pic()
    chip.write_command(icw1)
    seen = [chip.setup]
    while chip.setup is not Setup.MASK:
        chip.write_data(0x20)
        seen.append(chip.setup)
    assert seen == expected
    assert chip.vector_base == 0x20
    chip.write_data(0x5A)
    assert chip.imr == 0x5A


@pytest.mark.parametrize("setup", Setup)
@pytest.mark.parametrize("word", Word)
def test_every_word_in_every_state(setup, word):
    legal = {
        Setup.MASK: {Word.THEN_MASK: Setup.MASK},
        Setup.VECTOR: {Word.THEN_CASCADE: Setup.CASCADE, Word.THEN_MODE: Setup.MODE, Word.THEN_MASK: Setup.MASK},
        Setup.CASCADE: {Word.THEN_MODE: Setup.MODE, Word.THEN_MASK: Setup.MASK},
        Setup.MODE: {Word.THEN_MASK: Setup.MASK},
    }[setup] | {Word.ICW1: Setup.VECTOR}
    assert INITIALISATION.next(setup, word) == legal.get(word)


class NestingMachine(RuleBasedStateMachine):
    """One edge-triggered chip against sets of lines."""

    lines = st.integers(0, 7)

    def __init__(self):
        super().__init__()
        self.chip = Pic()
        self.levels, self.asked, self.serving, self.masked, self.lowest = set(), set(), set(), set(), 7

    def _rank(self, number):
        return (number - self.lowest - 1) % 8

    def _wanted(self):
        best = min((self.asked - self.masked), key=self._rank, default=None)
        limit = min(map(self._rank, self.serving), default=8)
        return best if best is not None and self._rank(best) < limit else None

    @rule(number=lines, level=st.booleans())
    def drive(self, number, level):
        self.chip.set_line(number, level=level)
        if level and number not in self.levels:
            self.asked.add(number)
        (self.levels.add if level else self.levels.discard)(number)

    @rule(mask=st.integers(0, 255))
    def write_mask(self, mask):
        self.chip.write_data(mask)
        self.masked = {n for n in range(8) if mask >> n & 1}

    @precondition(lambda self: self._wanted() is not None)
    @rule()
    def acknowledge(self):
        wanted = self._wanted()
        assert self.chip.acknowledge() == wanted
        self.asked.discard(wanted)
        self.serving.add(wanted)

    @rule(rotate=st.booleans())
    def end(self, rotate):
        self.chip.write_command(0x20 | rotate << 7)
        if self.serving:
            done = min(self.serving, key=self._rank)
            self.serving.discard(done)
            if rotate:
                self.lowest = done

    @rule(number=lines)
    def end_specific(self, number):
        self.chip.write_command(0x60 | number)
        self.serving.discard(number)

    @rule(number=lines)
    def set_priority(self, number):
        self.chip.write_command(0xC0 | number)
        self.lowest = number

    @invariant()
    def agree(self):
        assert self.chip.request() == self._wanted()
        assert {n for n in range(8) if self.chip.irr >> n & 1} == self.asked
        assert {n for n in range(8) if self.chip.isr >> n & 1} == self.serving


TestNestingMachine = NestingMachine.TestCase
