"""Execute one instruction on registers and a bus: what a hypervisor's emulator, or a #VC handler, does for MMIO.

Reads come first, then the write, then registers and flags: an access that faults leaves the registers alone. A string
instruction commits element by element, so that it can be continued after a fault, as in hardware.

Source: spec 24594 (APM volume 3), each instruction's page; which forms exist, `coverage.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from sevlab.core.cpu import Registers, SystemRegisters
from sevlab.core.units import MASK32, MASK64
from sevlab.plugins.io import alu
from sevlab.plugins.io.alu import CF, DF, ZF, Computed
from sevlab.plugins.io.decode import Insn, MemoryOperand, effective_address


class Bus(Protocol):
    """Where an instruction's accesses go: linear addresses, sizes in bytes, little-endian numbers."""

    def read(self, linear: int, size: int) -> int: ...
    def write(self, linear: int, size: int, value: int) -> None: ...
    def probe(self, linear: int, size: int) -> None:
        """Fault now if a write here would: INS asks before it takes data from the port."""

    def port_in(self, port: int, size: int) -> int: ...
    def port_out(self, port: int, size: int, value: int) -> None: ...


class Unsupported(NamedTuple):
    """The emulator does not do this instruction; nothing was changed."""

    reason: str


class Executed(NamedTuple):
    """Done; `elements` counts the iterations of a string instruction (1 otherwise)."""

    elements: int


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

    __slots__ = ("bus", "insn", "registers", "system")

    def __init__(self, insn: Insn, registers: Registers, system: SystemRegisters, bus: Bus) -> None:
        self.insn = insn
        self.registers = registers
        self.system = system
        self.bus = bus

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


def _move(run: Execution) -> int:
    run.put(0, run.get(1))
    return 1


def _move_zero(run: Execution) -> int:
    run.put(0, run.get(1))
    return 1


def _move_sign(run: Execution) -> int:
    target, source = run.insn.operands
    run.put(0, alu.sign_extend(run.get(1), source.size * 8, target.size * 8))
    return 1


def _move_swapped(run: Execution) -> int:
    size = run.insn.operands[0].size
    run.put(0, int.from_bytes(run.get(1).to_bytes(size, "little"), "big"))
    return 1


def _bits(run: Execution) -> int:
    return run.insn.operands[0].size * 8


def _right(run: Execution, bits: int) -> int:
    return run.get(1) & (1 << bits) - 1


def _binary(compute: Callable[[int, int, int, int], Computed], *, writes: bool = True) -> Action:
    def action(run: Execution) -> int:
        bits = _bits(run)
        computed = compute(run.get(0), _right(run, bits), bits, run.registers.rflags & CF)
        if writes:
            run.put(0, computed.value)
        run.flags(computed)
        return 1

    return action


def _unary(compute: Callable[[int, int], Computed]) -> Action:
    def action(run: Execution) -> int:
        computed = compute(run.get(0), _bits(run))
        run.put(0, computed.value)
        run.flags(computed)
        return 1

    return action


def _not(run: Execution) -> int:
    run.put(0, ~run.get(0) & (1 << _bits(run)) - 1)
    return 1


def _exchange(run: Execution) -> int:
    memory = next((i for i, operand in enumerate(run.insn.operands) if operand.kind == "mem"), 0)
    other = 1 - memory
    first, second = run.get(memory), run.get(other)
    run.put(memory, second)
    run.put(other, first)
    return 1


def _exchange_add(run: Execution) -> int:
    bits = _bits(run)
    before = run.get(0)
    computed = alu.add(before, run.get(1), bits)
    run.put(0, computed.value)
    if run.insn.operands[0] != run.insn.operands[1]:
        run.put(1, before)
        if run.insn.operands[0].kind == "reg":
            run.put(0, computed.value)
    run.flags(computed)
    return 1


ACCUMULATORS = {8: "AL", 16: "AX", 32: "EAX", 64: "RAX"}


def _compare_exchange(run: Execution) -> int:
    bits = _bits(run)
    accumulator = ACCUMULATORS[bits]
    expected, found = run.register(accumulator), run.get(0)
    computed = alu.subtract(expected, found, bits)
    if expected == found:
        run.put(0, run.get(1))
    else:
        if run.insn.operands[0].kind == "mem":
            run.put(0, found)  # the write cycle happens either way. Source: 24594, CMPXCHG
        write_register(run.registers, accumulator, found)
    run.flags(computed)
    return 1


def _compare_exchange_pair(run: Execution) -> int:
    half = 32 if run.insn.mnemonic == "cmpxchg8b" else 64
    prefix = "E" if half == 32 else "R"
    linear = run.linear(run.insn.memory[0])
    low = run.bus.read(linear, half // 8)
    high = run.bus.read(linear + half // 8, half // 8)
    equal = (low, high) == (run.register(f"{prefix}AX"), run.register(f"{prefix}DX"))
    if equal:
        low, high = run.register(f"{prefix}BX"), run.register(f"{prefix}CX")
    run.bus.write(linear, half // 8, low)
    run.bus.write(linear + half // 8, half // 8, high)
    if not equal:
        write_register(run.registers, f"{prefix}AX", low)
        write_register(run.registers, f"{prefix}DX", high)
    run.flags(Computed(0, ZF if equal else 0, ZF))
    return 1


def _bit(change: Callable[[int, int], int] | None) -> Action:
    """BT, BTS, BTR, BTC: a register offset reaches beyond the operand, signed; an immediate does not."""

    def action(run: Execution) -> int:
        target, source = run.insn.operands
        bits = target.size * 8
        offset = run.get(1)
        if target.kind == "mem" and source.kind == "reg":
            signed = offset - (1 << bits) if offset >> bits - 1 & 1 else offset
            memory = run.insn.memory[0]
            moved = memory._replace(displacement=memory.displacement + (signed >> bits.bit_length() - 1) * target.size)
            linear = run.linear(moved)
            value = run.bus.read(linear, target.size)
        else:
            linear = -1
            value = run.get(0)
        mask = 1 << (offset & bits - 1)
        if change is not None:
            changed = change(value, mask)
            if linear >= 0:
                run.bus.write(linear, target.size, changed)
            else:
                run.put(0, changed)
        run.flags(Computed(0, CF if value & mask else 0, CF))
        return 1

    return action


def _shift(run: Execution) -> int:
    bits = _bits(run)
    count = run.get(1) if len(run.insn.operands) > 1 else 1
    computed = alu.shift(run.insn.mnemonic, run.get(0), count, bits, run.registers.rflags & CF)
    run.put(0, computed.value)
    run.flags(computed)
    return 1


def _double_shift(run: Execution) -> int:
    bits = _bits(run)
    computed = alu.double_shift(run.insn.mnemonic, run.get(0), run.get(1), run.get(2), bits)
    run.put(0, computed.value)
    run.flags(computed)
    return 1


def _adjust_rpl(run: Execution) -> int:
    target, source = run.get(0), run.get(1)
    raised = target & 3 < source & 3
    run.put(0, target & ~3 | source & 3 if raised else target)
    run.flags(Computed(0, ZF if raised else 0, ZF))
    return 1


# Strings ----------------------------------------------------------------------------------------------------------

COUNTERS = {16: "CX", 32: "ECX", 64: "RCX"}
SOURCES = {16: "SI", 32: "ESI", 64: "RSI"}
TARGETS = {16: "DI", 32: "EDI", 64: "RDI"}


def _string(element: Callable[[Execution, int], None], pointers: tuple[dict[int, str], ...], *, compares: bool = False) -> Action:
    """A string instruction: `element` moves one, then the pointers move, then REP counts."""

    def action(run: Execution) -> int:
        insn = run.insn
        address_size = insn.memory[0].address_size
        size = insn.memory[0].size
        counter = COUNTERS[address_size]
        repeated = bool(insn.prefixes)
        done = 0
        while not repeated or run.register(counter):
            element(run, size)
            step = -size if run.registers.rflags & DF else size
            for names in pointers:
                name = names[address_size]
                write_register(run.registers, name, run.register(name) + step)
            done += 1
            if not repeated:
                break
            write_register(run.registers, counter, run.register(counter) - 1)
            if compares and bool(run.registers.rflags & ZF) != ("repne" not in insn.prefixes):
                break
        return done

    return action


def _operand(run: Execution, segment_is_target: bool) -> MemoryOperand:  # noqa: FBT001
    """The ES:rDI operand (target) or the other one of a string instruction."""
    memory = run.insn.memory
    if len(memory) == 1:
        return memory[0]
    target = next(operand for operand in memory if operand.base.endswith("DI"))
    return target if segment_is_target else next(operand for operand in memory if operand is not target)


def _movs(run: Execution, size: int) -> None:
    run.bus.write(run.linear(_operand(run, True)), size, run.bus.read(run.linear(_operand(run, False)), size))


def _stos(run: Execution, size: int) -> None:
    run.bus.write(run.linear(run.insn.memory[0]), size, run.register(ACCUMULATORS[size * 8]))


def _lods(run: Execution, size: int) -> None:
    write_register(run.registers, ACCUMULATORS[size * 8], run.bus.read(run.linear(run.insn.memory[0]), size))


def _scas(run: Execution, size: int) -> None:
    found = run.bus.read(run.linear(run.insn.memory[0]), size)
    run.flags(alu.subtract(run.register(ACCUMULATORS[size * 8]), found, size * 8))


def _cmps(run: Execution, size: int) -> None:
    left = run.bus.read(run.linear(_operand(run, False)), size)
    run.flags(alu.subtract(left, run.bus.read(run.linear(_operand(run, True)), size), size * 8))


def _ins(run: Execution, size: int) -> None:
    linear = run.linear(run.insn.memory[0])
    run.bus.probe(linear, size)
    run.bus.write(linear, size, run.bus.port_in(run.register("DX"), size))


def _outs(run: Execution, size: int) -> None:
    run.bus.port_out(run.register("DX"), size, run.bus.read(run.linear(run.insn.memory[0]), size))


# Ports and stack --------------------------------------------------------------------------------------------------


def _in(run: Execution) -> int:
    port = run.get(1) & 0xFFFF
    run.put(0, run.bus.port_in(port, run.insn.operands[0].size))
    return 1


def _out(run: Execution) -> int:
    run.bus.port_out(run.get(0) & 0xFFFF, run.insn.operands[1].size, run.get(1))
    return 1


def _stack_pointer(run: Execution) -> str:
    return {16: "SP", 32: "ESP", 64: "RSP"}[run.insn.mode]


def _push(run: Execution) -> int:
    value = run.get(0)
    size = run.insn.operands[0].size
    stack = _stack_pointer(run)
    top = run.register(stack) - size & MASK64
    run.bus.write(top + run.segment_base("SS") & (MASK64 if run.insn.mode == 64 else MASK32), size, value)
    write_register(run.registers, stack, top)
    return 1


def _pop(run: Execution) -> int:
    size = run.insn.operands[0].size
    stack = _stack_pointer(run)
    top = run.register(stack)
    value = run.bus.read(top + run.segment_base("SS") & (MASK64 if run.insn.mode == 64 else MASK32), size)
    # The address of a memory operand is computed with rSP after the pop. Source: 24594, POP.
    write_register(run.registers, stack, top + size)
    target = run.insn.operands[0]
    if target.kind == "mem":
        place = next(operand for operand in run.insn.memory if "write" in operand.access)
        run.bus.write(run.linear(place), size, value)
    else:
        run.put(0, value)
    return 1


def _direct_store(run: Execution) -> int:
    """MOVDIR64B: 64 bytes from memory to the address in a register."""
    source = next(operand for operand in run.insn.memory if "read" in operand.access)
    target = next(operand for operand in run.insn.memory if "write" in operand.access)
    chunks = [run.bus.read(run.linear(source) + offset, 8) for offset in range(0, 64, 8)]
    for index, chunk in enumerate(chunks):
        run.bus.write(run.linear(target) + index * 8, 8, chunk)
    return 1


def _strings() -> dict[str, Action]:
    kinds: dict[str, tuple[Callable[[Execution, int], None], tuple[dict[int, str], ...], bool]] = {
        "movs": (_movs, (SOURCES, TARGETS), False),
        "stos": (_stos, (TARGETS,), False),
        "lods": (_lods, (SOURCES,), False),
        "scas": (_scas, (TARGETS,), True),
        "cmps": (_cmps, (SOURCES, TARGETS), True),
        "ins": (_ins, (TARGETS,), False),
        "outs": (_outs, (SOURCES,), False),
    }
    return {
        f"{stem}{suffix}": _string(element, pointers, compares=compares)
        for stem, (element, pointers, compares) in kinds.items()
        for suffix in "bwdq"
    }


ACTIONS: dict[str, Action] = {
    "mov": _move,
    "movnti": _move,
    "movzx": _move_zero,
    "movsx": _move_sign,
    "movsxd": _move_sign,
    "movbe": _move_swapped,
    "add": _binary(lambda a, b, bits, _: alu.add(a, b, bits)),
    "adc": _binary(alu.add),
    "sub": _binary(lambda a, b, bits, _: alu.subtract(a, b, bits)),
    "sbb": _binary(alu.subtract),
    "cmp": _binary(lambda a, b, bits, _: alu.subtract(a, b, bits), writes=False),
    "and": _binary(lambda a, b, bits, _: alu.logic(a & b, bits)),
    "or": _binary(lambda a, b, bits, _: alu.logic(a | b, bits)),
    "xor": _binary(lambda a, b, bits, _: alu.logic(a ^ b, bits)),
    "test": _binary(lambda a, b, bits, _: alu.logic(a & b, bits), writes=False),
    "inc": _unary(alu.increment),
    "dec": _unary(alu.decrement),
    "neg": _unary(lambda a, bits: alu.subtract(0, a, bits)),
    "not": _not,
    "xchg": _exchange,
    "xadd": _exchange_add,
    "cmpxchg": _compare_exchange,
    "cmpxchg8b": _compare_exchange_pair,
    "cmpxchg16b": _compare_exchange_pair,
    "bt": _bit(None),
    "bts": _bit(lambda value, mask: value | mask),
    "btr": _bit(lambda value, mask: value & ~mask),
    "btc": _bit(lambda value, mask: value ^ mask),
    **dict.fromkeys(("shl", "sal", "shr", "sar", "rol", "ror", "rcl", "rcr"), _shift),
    "shld": _double_shift,
    "shrd": _double_shift,
    "arpl": _adjust_rpl,
    **dict.fromkeys(("movups", "movaps", "movupd", "movapd", "movdqu", "movdqa", "movntps", "movntdq"), _move),
    "in": _in,
    "out": _out,
    "push": _push,
    "pop": _pop,
    "movdir64b": _direct_store,
    **_strings(),
}
"""What the emulator executes, by mnemonic."""

OPERAND_REGISTERS = frozenset(PLACES) | {f"XMM{number}" for number in range(16)}


def supported(insn: Insn) -> str:
    """Why the emulator cannot do `insn`; empty when it can."""
    if insn.mnemonic not in ACTIONS:
        return f"no emulation of {insn.mnemonic}"
    unknown = [operand.register for operand in insn.operands if operand.kind == "reg" and operand.register not in OPERAND_REGISTERS]
    if unknown:
        return f"{insn.mnemonic} with register {unknown[0]}"
    if insn.mnemonic in ("movsd", "cmpsd") and not insn.code.startswith(("MOVSD_M32", "CMPSD_M32")):
        return f"no emulation of {insn.code}"
    return ""


def execute(insn: Insn, registers: Registers, system: SystemRegisters, bus: Bus) -> Executed | Unsupported:
    """Execute `insn` and move RIP behind it.

    What the bus raises passes through: then RIP stays, and of a string instruction the elements before are done.
    """
    reason = supported(insn)
    if reason:
        return Unsupported(reason)
    elements = ACTIONS[insn.mnemonic](Execution(insn, registers, system, bus))
    registers.rip = registers.rip + insn.length & (MASK64 if insn.mode == 64 else MASK32)
    return Executed(elements)
