"""Two 8259A interrupt controllers in cascade, with their edge/level registers.

Source: Intel 8259A datasheet; ports as in the PC architecture.
"""

from __future__ import annotations

from enum import Enum

from sevlab.core.state import Stateful, new
from sevlab.core.statemachine import StateMachine
from sevlab.plugins.io.devices.registers import Register

MASTER_PORT, SLAVE_PORT, ELCR_PORT = 0x20, 0xA0, 0x4D0
CASCADE_LINE = 2
SPURIOUS_LINE = 7

REGISTERS = (
    Register(0x20, "master command", 1, "rw", "ICW1, OCW2 (EOI), OCW3; reads IRR or ISR"),
    Register(0x21, "master data", 1, "rw", "ICW2-4, then the mask"),
    Register(0xA0, "slave command", 1, "rw", "as the master's"),
    Register(0xA1, "slave data", 1, "rw", "as the master's"),
    Register(0x4D0, "ELCR", 2, "rw", "one bit a line: 1 level triggered"),
)


class Setup(Enum):
    """What the next write to the data port is."""

    MASK = 0
    VECTOR = 1
    CASCADE = 2
    MODE = 3


class Word(Enum):
    """A byte that arrives: ICW1, or data after which the chip expects another word."""

    ICW1 = 1
    THEN_CASCADE = 2
    THEN_MODE = 3
    THEN_MASK = 4


INITIALISATION = StateMachine(
    name="io.pic-initialisation",
    initial=Setup.MASK,
    reject=None,
    table={
        Setup.MASK: {Word.ICW1: Setup.VECTOR, Word.THEN_MASK: Setup.MASK},
        Setup.VECTOR: {
            Word.ICW1: Setup.VECTOR,
            Word.THEN_CASCADE: Setup.CASCADE,
            Word.THEN_MODE: Setup.MODE,
            Word.THEN_MASK: Setup.MASK,
        },
        Setup.CASCADE: {Word.ICW1: Setup.VECTOR, Word.THEN_MODE: Setup.MODE, Word.THEN_MASK: Setup.MASK},
        Setup.MODE: {Word.ICW1: Setup.VECTOR, Word.THEN_MASK: Setup.MASK},
    },
)
"""ICW1 starts and says which words follow: no ICW3 in single mode, no ICW4 unless announced."""

ICW1, ICW1_LEVEL, ICW1_SINGLE, ICW1_ICW4 = 0x10, 0x08, 0x02, 0x01
ICW4_AUTO_EOI, ICW4_SPECIAL_NESTED = 0x02, 0x10
OCW3 = 0x08
EOI, EOI_SPECIFIC, ROTATE = 0x20, 0x40, 0x80


class Pic(Stateful):
    """One 8259A."""

    irr: int = 0
    isr: int = 0
    imr: int = 0
    lines: int = 0
    elcr: int = 0
    vector_base: int = 0
    lowest: int = 7
    auto_eoi: bool = False
    special_mask: bool = False
    special_nested: bool = False
    read_isr: bool = False
    poll: bool = False
    icw4_needed: bool = False
    single: bool = False
    setup: Setup = Setup.MASK

    def set_line(self, line: int, *, level: bool) -> None:
        """The input `line` (0 to 7) has this level now."""
        mask = 1 << line
        if level:
            if self.elcr & mask or not self.lines & mask:
                self.irr |= mask
            self.lines |= mask
        else:
            self.lines &= ~mask
            if self.elcr & mask:
                self.irr &= ~mask

    def _order(self) -> list[int]:
        return [(self.lowest + 1 + n) % 8 for n in range(8)]

    def request(self) -> int | None:
        """The line that asks for service: unmasked, and above everything in service.

        In special mask mode a masked line in service does not hold others back; in special fully nested mode the
        slave's line does not hold itself back.
        """
        if not self.irr & ~self.imr:
            return None  # nothing asks: what every entry into the guest finds
        holding = self.isr & ~self.imr if self.special_mask else self.isr
        if self.special_nested:
            holding &= ~(1 << CASCADE_LINE)
        for line in self._order():
            if holding >> line & 1:
                return None
            if (self.irr & ~self.imr) >> line & 1:
                return line
        return None

    def acknowledge(self) -> int:
        """INTA: the line that is taken into service; 7 when the request has gone (spurious)."""
        line = self.request()
        if line is None:
            return SPURIOUS_LINE
        if not self.auto_eoi:
            self.isr |= 1 << line
        if not self.elcr >> line & 1:
            self.irr &= ~(1 << line)
        return line

    def write_command(self, value: int) -> None:
        """The command port: ICW1, OCW2 or OCW3 by its bits 4 and 3."""
        if value & ICW1:
            self.irr = self.isr = self.imr = 0
            self.lowest = 7
            self.auto_eoi = self.read_isr = self.poll = self.special_mask = self.special_nested = False
            self.icw4_needed = bool(value & ICW1_ICW4)
            self.single = bool(value & ICW1_SINGLE)
            self._setup(Word.ICW1)
        elif value & OCW3:
            self.poll = bool(value & 4)
            if value & 2:
                self.read_isr = bool(value & 1)
            if value & 0x40:
                self.special_mask = bool(value & 0x20)
        else:
            self._ocw2(value)

    def _ocw2(self, value: int) -> None:
        if not value & EOI:
            if value & ROTATE and value & EOI_SPECIFIC:
                self.lowest = value & 7
            return
        if value & EOI_SPECIFIC:
            line: int | None = value & 7
        else:
            line = next((candidate for candidate in self._order() if self.isr >> candidate & 1), None)
        if line is None:
            return
        self.isr &= ~(1 << line)
        if value & ROTATE:
            self.lowest = line

    def write_data(self, value: int) -> None:
        """The data port: the next initialisation word, or the mask."""
        after_cascade = Word.THEN_MODE if self.icw4_needed else Word.THEN_MASK
        then = Word.THEN_MASK
        if self.setup is Setup.MASK:
            self.imr = value
        elif self.setup is Setup.VECTOR:
            self.vector_base = value & 0xF8
            then = after_cascade if self.single else Word.THEN_CASCADE
        elif self.setup is Setup.CASCADE:
            then = after_cascade
        else:
            self.auto_eoi = bool(value & ICW4_AUTO_EOI)
            self.special_nested = bool(value & ICW4_SPECIAL_NESTED)
        self._setup(then)

    def _setup(self, word: Word) -> None:
        following = INITIALISATION.next(self.setup, word)
        if following is not None:  # every word that is sent here is in the table
            self.setup = following

    def read_command(self) -> int:
        """IRR or ISR as the last OCW3 chose; after a poll command the line that is taken, with bit 7."""
        if self.poll:
            self.poll = False
            if self.request() is None:
                return 0
            return 0x80 | self.acknowledge()
        return self.isr if self.read_isr else self.irr


class PicPair(Stateful):
    """Master and slave; the slave's output is the master's line 2."""

    master: Pic = new(Pic)
    slave: Pic = new(Pic)

    def set_line(self, irq: int, *, level: bool) -> None:
        """Interrupt line `irq` (0 to 15) has this level now."""
        (self.slave if irq >= 8 else self.master).set_line(irq & 7, level=level)
        self._cascade()

    def _cascade(self) -> None:
        wanted = self.slave.request() is not None
        if wanted != bool(self.master.lines >> CASCADE_LINE & 1):
            self.master.set_line(CASCADE_LINE, level=wanted)
        if not wanted:
            self.master.irr &= ~(1 << CASCADE_LINE)

    def pending(self) -> bool:
        """Whether INTR is raised."""
        return self.master.request() is not None

    def acknowledge(self) -> int:
        """INTA cycle: the vector to deliver."""
        line = self.master.acknowledge()
        if line == CASCADE_LINE:
            vector = self.slave.vector_base + self.slave.acknowledge()
            self._cascade()
            return vector
        return self.master.vector_base + line

    def read(self, port: int) -> int:
        """Read a byte from one of the six ports."""
        if port in (ELCR_PORT, ELCR_PORT + 1):
            return (self.master, self.slave)[port - ELCR_PORT].elcr
        chip = self.slave if port & SLAVE_PORT == SLAVE_PORT else self.master
        value = chip.imr if port & 1 else chip.read_command()
        self._cascade()
        return value

    def write(self, port: int, value: int) -> None:
        """Write a byte to one of the six ports. ELCR bits 0, 1, 2 and 8, 13 are fixed to edge."""
        value &= 0xFF
        if port in (ELCR_PORT, ELCR_PORT + 1):
            chip, fixed = ((self.master, 0x07), (self.slave, 0x21))[port - ELCR_PORT]
            chip.elcr = value & ~fixed
            return
        chip = self.slave if port & SLAVE_PORT == SLAVE_PORT else self.master
        if port & 1:
            chip.write_data(value)
        else:
            chip.write_command(value)
        self._cascade()
