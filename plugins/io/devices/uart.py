"""16550A serial port: FIFO, loopback, interrupts. COM1 at 3F8h with IRQ 4.

Source: National Semiconductor PC16550D datasheet; probe sequence as in Linux drivers/tty/serial/8250/8250_port.c.
"""

from __future__ import annotations

from sevlab.core.state import Stateful, new
from sevlab.plugins.io.devices.registers import Register, Text

COM1_PORT = 0x3F8
COM1_IRQ = 4
FIFO_BYTES = 16

REGISTERS = (
    Register(0, "RBR / THR", 1, "r / w", "receive, transmit; with LCR.DLAB the divisor's low byte"),
    Register(1, "IER", 1, "rw", "bit 0 data, 1 THR empty, 2 line status, 3 modem; with DLAB the divisor's high byte"),
    Register(2, "IIR / FCR", 1, "r / w", "bit 0: none pending, 3:1 which; FCR bit 0 FIFO on, 1 and 2 clear"),
    Register(3, "LCR", 1, "rw", "1:0 length, 7 DLAB"),
    Register(4, "MCR", 1, "rw", "0 DTR, 1 RTS, 2 OUT1, 3 OUT2 (gates the interrupt), 4 loopback"),
    Register(5, "LSR", 1, "r", "0 data ready, 1 overrun, 5 THR empty, 6 transmitter empty"),
    Register(6, "MSR", 1, "r", "4 CTS, 5 DSR, 6 RI, 7 DCD; 3:0 what changed since the last read"),
    Register(7, "SCR", 1, "rw", "scratch"),
)

IER_DATA, IER_THRE, IER_LINE, IER_MODEM = 1, 2, 4, 8
LSR_DATA, LSR_OVERRUN, LSR_IDLE = 0x01, 0x02, 0x60
LCR_DLAB = 0x80
MCR_OUT2, MCR_LOOP = 0x08, 0x10
FCR_ENABLE, FCR_CLEAR_RECEIVE = 0x01, 0x02
IIR_MODEM, IIR_NONE, IIR_THRE, IIR_DATA, IIR_LINE, IIR_TIMEOUT = 0x00, 0x01, 0x02, 0x04, 0x06, 0x0C
TRIGGERS = (1, 4, 8, 14)
"""Bytes in the FIFO at which FCR 7:6 asks for service; fewer ask by the timeout, at once in a model without baud."""

IIR_FIFO = 0xC0
MSR_RI, MSR_CONNECTED = 0x40, 0xB0


class Uart(Stateful):
    """One serial port, without speed: a byte is on the line as soon as it is written."""

    ier: int = 0
    fcr: int = 0
    lcr: int = 3
    mcr: int = 0
    scratch: int = 0
    divisor: int = 1
    received: bytes = b""
    overrun: bool = False
    thre_pending: bool = False
    modem_delta: int = 0
    sent: Text = new(Text)

    @property
    def output(self) -> bytes:
        """Everything the guest has sent."""
        return bytes(self.sent)

    def receive(self, data: bytes) -> None:
        """Bytes arrive on the line. A full FIFO loses them; without FIFO the last one replaces the one before."""
        if self.fcr & FCR_ENABLE:
            room = FIFO_BYTES - len(self.received)
            self.received += data[:room]
            self.overrun = self.overrun or len(data) > room
        elif data:
            self.overrun = self.overrun or len(self.received) + len(data) > 1
            self.received = data[-1:]

    @property
    def interrupt(self) -> bool:
        """The level of the interrupt line: gated by the OUT2 pin, which loopback holds inactive."""
        return self._pending() != IIR_NONE and self.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2

    def _pending(self) -> int:
        if self.ier & IER_LINE and self.overrun:
            return IIR_LINE
        if self.ier & IER_DATA and self.received:
            few = self.fcr & FCR_ENABLE and len(self.received) < TRIGGERS[self.fcr >> 6]
            return IIR_TIMEOUT if few else IIR_DATA
        if self.ier & IER_THRE and self.thre_pending:
            return IIR_THRE
        if self.ier & IER_MODEM and self.modem_delta:
            return IIR_MODEM
        return IIR_NONE

    def read(self, offset: int) -> int:
        """Read register `offset` (0 to 7)."""
        if offset == 0:
            if self.lcr & LCR_DLAB:
                return self.divisor & 0xFF
            first, self.received = self.received[:1], self.received[1:]
            return first[0] if first else 0
        if offset == 1:
            return self.divisor >> 8 if self.lcr & LCR_DLAB else self.ier
        if offset == 2:
            pending = self._pending()
            if pending == IIR_THRE:
                self.thre_pending = False
            return pending | (IIR_FIFO if self.fcr & FCR_ENABLE else 0)
        if offset == 5:
            status = LSR_IDLE | (LSR_DATA if self.received else 0) | (LSR_OVERRUN if self.overrun else 0)
            self.overrun = False
            return status
        if offset == 6:
            delta, self.modem_delta = self.modem_delta, 0
            return self._modem_status() | delta
        return (self.lcr, self.mcr, 0, 0, self.scratch)[offset - 3]

    def _modem_status(self) -> int:
        if not self.mcr & MCR_LOOP:
            return MSR_CONNECTED
        mcr = self.mcr
        return (mcr & 2) << 3 | (mcr & 1) << 5 | (mcr & 4) << 4 | (mcr & 8) << 4

    def _modem_changed(self, before: int) -> None:
        """Note which inputs changed; RI counts when it goes away."""
        changed = before ^ self._modem_status()
        if changed & MSR_RI and not before & MSR_RI:
            changed &= ~MSR_RI
        self.modem_delta |= changed >> 4

    def write(self, offset: int, value: int) -> None:
        """Write the low byte of `value` to register `offset` (0 to 7)."""
        value &= 0xFF
        if offset == 0:
            self._transmit(value)
        elif offset == 1:
            if self.lcr & LCR_DLAB:
                self.divisor = self.divisor & 0xFF | value << 8
            else:
                if value & ~self.ier & IER_THRE:
                    self.thre_pending = True
                self.ier = value & 0xF
        elif offset == 2:
            if (value ^ self.fcr) & FCR_ENABLE or value & FCR_CLEAR_RECEIVE:
                self.received = b""
            self.fcr = value & 0xC9
        elif offset == 3:
            self.lcr = value
        elif offset == 4:
            before = self._modem_status()
            self.mcr = value & 0x1F
            self._modem_changed(before)
        elif offset == 7:
            self.scratch = value

    @property
    def connected(self) -> bool:
        """Whether a byte written to register 0 goes out on the line."""
        return not self.lcr & LCR_DLAB and not self.mcr & MCR_LOOP

    def send(self, data: bytes) -> None:
        """Bytes go out, and the transmitter is empty again."""
        self.sent.append(data)
        self.thre_pending = True

    def _transmit(self, value: int) -> None:
        if self.connected:
            self.send(bytes([value]))
        elif self.lcr & LCR_DLAB:
            self.divisor = self.divisor & 0xFF00 | value
        else:
            self.receive(bytes([value]))
            self.thre_pending = True
