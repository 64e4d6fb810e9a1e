"""One instruction under way: its bus, its registers by the decoder's names, its operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sevlab.core.cpu import FaultUnwind, Registers, SystemRegisters
from sevlab.core.events import Fault
from sevlab.core.svm import Vector
from sevlab.core.units import MASK64
from sevlab.plugins.io.alu import Computed
from sevlab.plugins.io.decode import Insn, MemoryOperand, effective_address


class Bus(Protocol):
    """Where an instruction's accesses go: linear addresses, sizes in bytes, little-endian numbers."""

    def read(self, linear: int, size: int) -> int: ...
    def write(self, linear: int, size: int, value: int) -> None: ...
    def probe(self, linear: int, size: int) -> None:
        """Fault now if a write here would: INS asks before it takes data from the port."""

    def port_in(self, port: int, size: int) -> int: ...
    def port_out(self, port: int, size: int, value: int) -> None: ...


def _register_places() -> dict[str, tuple[str, int, int]]:
    """Register name -> (attribute, shift, width in bits)."""
    places: dict[str, tuple[str, int, int]] = {}
    for letter in "abcd":
        places[f"R{letter.upper()}X"] = (f"r{letter}x", 0, 64)
        places[f"E{letter.upper()}X"] = (f"r{letter}x", 0, 32)
        places[f"{letter.upper()}X"] = (f"r{letter}x", 0, 16)
        places[f"{letter.upper()}L"] = (f"r{letter}x", 0, 8)
        places[f"{letter.upper()}H"] = (f"r{letter}x", 8, 8)
    for name in ("sp", "bp", "si", "di"):
        places[f"R{name.upper()}"] = (f"r{name}", 0, 64)
        places[f"E{name.upper()}"] = (f"r{name}", 0, 32)
        places[name.upper()] = (f"r{name}", 0, 16)
        places[f"{name.upper()}L"] = (f"r{name}", 0, 8)
    for number in range(8, 16):
        for suffix, width in (("", 64), ("D", 32), ("W", 16), ("L", 8)):
            places[f"R{number}{suffix}"] = (f"r{number}", 0, width)
    return places


PLACES = _register_places()


def read_register(registers: Registers, name: str) -> int:
    """A general register by its name in the decoder's spelling (RAX, EAX, AX, AL, AH, R8L, ...)."""
    attribute, shift, width = PLACES[name]
    return getattr(registers, attribute) >> shift & (1 << width) - 1  # type: ignore[no-any-return]


def write_register(registers: Registers, name: str, value: int) -> None:
    """Write it: 32-bit writes clear the upper half, 8- and 16-bit writes keep the rest."""
    attribute, shift, width = PLACES[name]
    mask = (1 << width) - 1
    if width >= 32:
        setattr(registers, attribute, value & mask)
    else:
        old = getattr(registers, attribute)
        setattr(registers, attribute, old & ~(mask << shift) | (value & mask) << shift)


class Execution:
    """One instruction under way."""

    __slots__ = ("bus", "insn", "interrupted", "max_elements", "next_rip", "registers", "system")

    def __init__(
        self, insn: Insn, registers: Registers, system: SystemRegisters, bus: Bus, max_elements: int = MASK64
    ) -> None:
        self.insn = insn
        self.registers = registers
        self.system = system
        self.bus = bus
        self.max_elements = max_elements
        self.next_rip = registers.rip + insn.length
        self.interrupted = False

    def interrupt(self) -> None:
        """Stop a repeated instruction between two elements, as an interrupt does: it will be executed again."""
        self.interrupted = True
        self.next_rip = self.registers.rip

    def require_alignment(self, operand: MemoryOperand, alignment_bytes: int) -> None:
        """Raise #GP(0) unless the operand's linear address is a multiple of `alignment_bytes`."""
        if self.linear(operand) & alignment_bytes - 1:
            raise FaultUnwind(Fault(Vector.GP, 0, 0))

    def segment_base(self, segment: str) -> int:
        """Base of a segment; ES, CS, SS, DS count as 0 in 64-bit mode."""
        if self.insn.mode == 64 and segment in ("ES", "CS", "SS", "DS"):
            return 0
        return getattr(self.system, segment.lower())[3]  # type: ignore[no-any-return]

    def linear(self, operand: MemoryOperand) -> int:
        """Linear address of a memory operand."""
        return effective_address(operand, self.register, self.segment_base, self.insn.mode)[1]

    def register(self, name: str) -> int:
        """A general register's value."""
        return read_register(self.registers, name)

    def get(self, index: int) -> int:
        """The value of an operand; a memory operand is read."""
        operand = self.insn.operands[index]
        if operand.kind == "reg":
            if operand.register not in PLACES:
                number = int(operand.register.removeprefix("XMM"))
                return self.system.xmm[number]
            return self.register(operand.register)
        if operand.kind == "imm":
            return operand.immediate
        return self.bus.read(self.linear(self.insn.memory[0]), operand.size)

    def put(self, index: int, value: int) -> None:
        """Store to an operand; a memory operand is written."""
        operand = self.insn.operands[index]
        if operand.kind == "reg":
            if operand.register not in PLACES:
                number = int(operand.register.removeprefix("XMM"))
                xmm = self.system.xmm
                self.system.xmm = (*xmm[:number], value, *xmm[number + 1 :])
            else:
                write_register(self.registers, operand.register, value)
        else:
            self.bus.write(self.linear(self.insn.memory[0]), operand.size, value & (1 << operand.size * 8) - 1)

    def flags(self, computed: Computed) -> None:
        """Take over the flags that a result decides."""
        self.registers.rflags = self.registers.rflags & ~computed.decides | computed.flags & computed.decides


Action = Callable[[Execution], int]
"""Executes one mnemonic; returns the number of elements."""

ACCUMULATORS = {8: "AL", 16: "AX", 32: "EAX", 64: "RAX"}
