"""The serial port against what Linux' 8250 driver and kvm-unit-tests do with it, and against a naive model."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sevlab.plugins import io
from sevlab.plugins.io.devices.uart import Uart

from tests.plugins.io.driver import Driver

COM1 = 0x3F8
RBR, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)


def serial(**start):
    driver = Driver()
    for register, value in start.items():
        driver.out(COM1 + globals()[register.upper()], value)
    return driver


def test_the_probe_of_linux_finds_a_16550a():
    driver = Driver()
    driver.out(COM1 + IER, 0)
    assert driver.in_(COM1 + IER) & 0xF == 0
    driver.out(COM1 + IER, 0xF)
    assert driver.in_(COM1 + IER) & 0xF == 0xF
    driver.out(COM1 + IER, 0)
    driver.out(COM1 + MCR, 0x1A)  # loopback with OUT2 and RTS
    assert driver.in_(COM1 + MSR) & 0xF0 == 0x90
    driver.out(COM1 + MCR, 0x08)
    driver.out(COM1 + SCR, 0x5A)
    assert driver.in_(COM1 + SCR) == 0x5A
    driver.out(COM1 + IIR, 0x01)
    assert driver.in_(COM1 + IIR) >> 6 == 3
    driver.out(COM1 + IIR, 0x21)  # 64-byte FIFO of a 16750: not there
    assert driver.in_(COM1 + IIR) & 0x20 == 0
    driver.out(COM1 + IIR, 0)
    assert driver.in_(COM1 + IIR) == 0x01


def test_kvm_unit_tests_setup_and_polled_output():
    driver = Driver()
    driver.out(COM1 + LCR, driver.in_(COM1 + LCR) | 0x80)
    driver.out(COM1, 1)
    driver.out(COM1 + IER, 0)
    assert (driver.in_(COM1), driver.in_(COM1 + IER)) == (1, 0)
    for offset, value in ((LCR, 3), (IER, 0), (IIR, 0), (MCR, 3)):
        driver.out(COM1 + offset, value)
    for byte in b"hello":
        assert driver.in_(COM1 + LSR) & 0x20
        driver.out(COM1, byte)
    assert driver.board.uart.output == b"hello"
    assert driver.in_(COM1 + LSR) == 0x60


def test_the_transmitter_asks_once_and_reading_iir_takes_it_back():
    driver = serial(mcr=0x08)
    driver.init_pics(unmasked=(4,))
    driver.interrupts()
    driver.out(COM1 + IER, 2)
    assert driver.taken() == [0x24]
    driver.out(0x20, 0x64)
    assert driver.in_(COM1 + IIR) == 0x02
    assert driver.in_(COM1 + IIR) == 0x01
    driver.out(COM1, 0x41)
    assert driver.taken() == [0x24]
    driver.out(0x20, 0x64)
    driver.in_(COM1 + IIR)
    driver.out(COM1 + IER, 0)
    driver.out(COM1 + IER, 2)  # enabling it again asks again: the driver's test for a broken THRE interrupt
    assert driver.in_(COM1 + IIR) == 0x02


def test_received_bytes_interrupt_until_they_are_read():
    driver = serial(mcr=0x08, iir=0xC1, ier=1)
    driver.init_pics(unmasked=(4,))
    driver.interrupts()
    driver.machine.apply(io.SerialInput(0, b"ab"))
    driver.enter()
    assert driver.taken() == [0x24]
    assert driver.in_(COM1 + IIR) == 0xCC  # two bytes are below the trigger: character timeout
    assert driver.in_(COM1 + LSR) & 1
    assert bytes(driver.in_(COM1) for _ in range(2)) == b"ab"
    assert driver.in_(COM1 + IIR) == 0xC1
    assert driver.in_(COM1 + LSR) == 0x60
    assert driver.in_(COM1) == 0


def test_the_trigger_level_tells_data_from_timeout():
    for fcr, level in ((0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)):
        driver = serial(iir=fcr, ier=1)
        driver.board.uart.receive(bytes(level - 1))
        assert driver.in_(COM1 + IIR) == (0xCC if level > 1 else 0xC1)
        driver.board.uart.receive(b"x")
        assert driver.in_(COM1 + IIR) == 0xC4


def test_overrun_keeps_the_fifo_but_replaces_the_only_byte_without_one():
    driver = serial(iir=1, ier=4)
    driver.board.uart.receive(bytes(range(17)))
    assert driver.in_(COM1 + IIR) == 0xC6
    assert driver.in_(COM1 + LSR) == 0x63
    assert driver.in_(COM1 + LSR) == 0x61
    assert bytes(driver.in_(COM1) for _ in range(17)) == bytes(range(16)) + b"\0"
    driver = serial()
    driver.board.uart.receive(b"ab")
    assert driver.in_(COM1 + LSR) == 0x63
    assert driver.in_(COM1) == ord("b")


def test_the_fifo_is_cleared_by_fcr():
    driver = serial(iir=1)
    driver.board.uart.receive(b"abc")
    driver.out(COM1 + IIR, 0x03)
    assert driver.in_(COM1 + LSR) == 0x60


def test_loopback_receives_what_is_sent_and_holds_the_interrupt_back():
    driver = serial(mcr=0x18, ier=1)
    driver.out(COM1, 0x55)
    assert driver.in_(COM1 + IIR) == 0x04
    assert not driver.board.uart.interrupt
    assert driver.in_(COM1) == 0x55
    assert driver.board.uart.output == b""


def test_modem_status_shows_changes_once():
    driver = serial(mcr=0x10, ier=8)
    driver.in_(COM1 + MSR)
    driver.out(COM1 + MCR, 0x12)  # RTS: CTS in loopback
    assert driver.in_(COM1 + IIR) == 0x00
    assert driver.in_(COM1 + MSR) == 0x11
    assert driver.in_(COM1 + MSR) == 0x10
    assert driver.in_(COM1 + IIR) == 0x01
    driver.out(COM1 + MCR, 0x16)  # RI counts when it goes away
    assert driver.in_(COM1 + MSR) == 0x50
    driver.out(COM1 + MCR, 0x12)
    assert driver.in_(COM1 + MSR) == 0x14


def test_a_long_log_is_kept_whole():
    uart = Uart()
    for _ in range(3):
        uart.send(b"0123456789abcdef" * 300)
    assert uart.output == b"0123456789abcdef" * 900


class SerialMachine(RuleBasedStateMachine):
    """Random register traffic against a list of bytes."""

    def __init__(self):
        super().__init__()
        self.uart = Uart()
        self.fifo, self.line, self.enabled, self.sent, self.loop, self.lost, self.empty = (
            [],
            b"",
            0,
            b"",
            False,
            False,
            False,
        )
        self.fifo_on = False

    def _arrive(self, data):
        for byte in data:
            room = 16 if self.fifo_on else 1
            if len(self.fifo) < room:
                self.fifo.append(byte)
                continue
            self.lost = True
            if not self.fifo_on:
                self.fifo[:] = [byte]

    @rule(data=st.binary(max_size=20))
    def receive(self, data):
        self.uart.receive(data)
        self._arrive(data)

    @rule()
    def read_data(self):
        assert self.uart.read(0) == (self.fifo.pop(0) if self.fifo else 0)

    @rule(byte=st.integers(0, 255))
    def write_data(self, byte):
        self.uart.write(0, byte)
        self.empty = True
        if self.loop:
            self._arrive([byte])
        else:
            self.sent += bytes([byte])

    @rule(value=st.integers(0, 15))
    def enable(self, value):
        self.uart.write(1, value)
        self.empty = self.empty or bool(value & 2 and not self.enabled & 2)
        self.enabled = value

    @rule(on=st.booleans())
    def fifo_mode(self, on):
        self.uart.write(2, int(on))
        if on != self.fifo_on:
            self.fifo.clear()
        self.fifo_on = on

    @rule(loop=st.booleans())
    def loopback(self, loop):
        self.uart.write(4, 0x08 | loop << 4)
        self.uart.read(6)
        self.loop = loop

    @rule()
    def line_status(self):
        assert self.uart.read(5) == 0x60 | bool(self.fifo) | self.lost << 1
        self.lost = False

    @rule()
    def identify(self):
        expected = self._expected()
        assert self.uart.read(2) == expected | (0xC0 if self.fifo_on else 0)
        if expected == 2:
            self.empty = False

    def _expected(self):
        if self.enabled & 4 and self.lost:
            return 6
        if self.enabled & 1 and self.fifo:
            return 4
        return 2 if self.enabled & 2 and self.empty else 1

    @invariant()
    def line_follows_what_is_pending(self):
        out2 = bool(self.uart.mcr & 8)
        assert self.uart.interrupt == (self._expected() != 1 and out2 and not self.loop)
        assert self.uart.output == self.sent


TestSerialMachine = SerialMachine.TestCase
