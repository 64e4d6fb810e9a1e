"""16550A serial port: FIFO, loopback, interrupts. COM1 at 3F8h with IRQ 4.

Source: National Semiconductor PC16550D datasheet; probe sequence as in Linux drivers/tty/serial/8250/8250_port.c.
"""

from __future__ import annotations

from sevlab.core.state import Stateful
from sevlab.plugins.io.devices.registers import Register

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
    Register(6, "MSR", 1, "r", "4 CTS, 5 DSR, 6 RI, 7 DCD"),
    Register(7, "SCR", 1, "rw", "scratch"),
)

IER_DATA, IER_THRE, IER_LINE, IER_MODEM = 1, 2, 4, 8
LSR_DATA, LSR_OVERRUN, LSR_IDLE = 0x01, 0x02, 0x60
LCR_DLAB = 0x80
MCR_OUT2, MCR_LOOP = 0x08, 0x10
FCR_ENABLE, FCR_CLEAR_RECEIVE = 0x01, 0x02
IIR_NONE, IIR_THRE, IIR_DATA, IIR_LINE = 0x01, 0x02, 0x04, 0x06
IIR_FIFO = 0xC0
MSR_CONNECTED = 0xB0


class Uart(Stateful):
    """One serial port; `output` is everything the guest has sent."""

    ier: int = 0
    fcr: int = 0
    lcr: int = 3
    mcr: int = 0
    scratch: int = 0
    divisor: int = 1
    received: bytes = b""
    overrun: bool = False
    thre_pending: bool = False
    output: bytes = b""

    def receive(self, data: bytes) -> None:
        """Bytes arrive on the line; what does not fit in the FIFO (one byte without) is lost and noted."""
        room = (FIFO_BYTES if self.fcr & FCR_ENABLE else 1) - len(self.received)
        self.received += data[: max(room, 0)]
        self.overrun = self.overrun or len(data) > room

    @property
    def interrupt(self) -> bool:
        """The level of the interrupt line: gated by MCR.OUT2."""
        return self._pending() != IIR_NONE and bool(self.mcr & MCR_OUT2)

    def _pending(self) -> int:
        if self.ier & IER_LINE and self.overrun:
            return IIR_LINE
        if self.ier & IER_DATA and self.received:
            return IIR_DATA
        if self.ier & IER_THRE and self.thre_pending:
            return IIR_THRE
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
            return self._modem_status()
        return (self.lcr, self.mcr, 0, 0, self.scratch)[offset - 3]

    def _modem_status(self) -> int:
        if not self.mcr & MCR_LOOP:
            return MSR_CONNECTED
        mcr = self.mcr
        return (mcr & 2) << 3 | (mcr & 1) << 5 | (mcr & 4) << 4 | (mcr & 8) << 4

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
            self.mcr = value & 0x1F
        elif offset == 7:
            self.scratch = value

    def _transmit(self, value: int) -> None:
        if self.lcr & LCR_DLAB:
            self.divisor = self.divisor & 0xFF00 | value
        elif self.mcr & MCR_LOOP:
            self.receive(bytes([value]))
        else:
            self.output += bytes([value])
            self.thre_pending = True
