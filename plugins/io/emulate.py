"""Execute one instruction on registers and a bus: what a hypervisor's emulator, or a #VC handler, does for MMIO.

Reads come first, then the write, then registers and flags: an access that faults leaves the registers alone. A string
instruction commits element by element, so that it can be continued after a fault, as in hardware.

Source: spec 24594 (APM volume 3), each instruction's page; which forms exist, `coverage.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sevlab.core.cpu import Registers, SystemRegisters
from sevlab.core.units import MASK32, MASK64
from sevlab.plugins.io import alu
from sevlab.plugins.io.alu import CF, ZF, Computed
from sevlab.plugins.io.decode import Insn
from sevlab.plugins.io.execution import ACCUMULATORS, PLACES, Action, Bus, Execution, write_register
from sevlab.plugins.io.strings import string_actions


class Unsupported(NamedTuple):
    """The emulator does not do this instruction; nothing was changed."""

    reason: str


class Executed(NamedTuple):
    """Done; `elements` counts the iterations of a string instruction (1 otherwise).

    `finished` is False when a repeated instruction stopped at the caller's limit: RIP still points at it.
    """

    elements: int
    finished: bool = True


def _move(run: Execution) -> int:
    run.put(0, run.get(1))
    return 1


def _move_aligned(run: Execution) -> int:
    """MOVAPS and its like: a memory operand off a 16-byte boundary is #GP(0)."""
    if run.insn.memory:
        run.require_alignment(run.insn.memory[0], 16)
    return _move(run)


def _move_scalar(run: Execution) -> int:
    """MOVSS and MOVSD: a load clears the rest of the register, a move between registers keeps it."""
    target, source = run.insn.operands
    size = 4 if run.insn.mnemonic == "movss" else 8
    mask = (1 << size * 8) - 1
    if target.kind == "reg" and source.kind == "reg":
        run.put(0, run.get(0) & ~mask | run.get(1) & mask)
    else:
        run.put(0, run.get(1) & mask)
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
    if half == 64:
        run.require_alignment(run.insn.memory[0], 16)
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


def _stack_linear(run: Execution, offset: int) -> int:
    return offset + run.segment_base("SS") & (MASK64 if run.insn.mode == 64 else MASK32)


def _push_value(run: Execution, size: int, value: int) -> None:
    stack = _stack_pointer(run)
    top = run.register(stack) - size & (1 << run.insn.mode) - 1
    run.bus.write(_stack_linear(run, top), size, value & (1 << size * 8) - 1)
    write_register(run.registers, stack, top)


def _push(run: Execution) -> int:
    size = next(operand.size for operand in run.insn.memory if "write" in operand.access)
    _push_value(run, size, run.get(0))
    return 1


def _pop(run: Execution) -> int:
    size = run.insn.operands[0].size
    stack = _stack_pointer(run)
    top = run.register(stack)
    value = run.bus.read(_stack_linear(run, top), size)
    if run.insn.operands[0].kind == "mem":
        place = next(operand for operand in run.insn.memory if "write" in operand.access)
        if place.base == stack:  # the address is computed with rSP after the pop. Source: 24594, POP
            place = place._replace(displacement=place.displacement + size)
        run.bus.write(run.linear(place), size, value)
        write_register(run.registers, stack, top + size)
    else:
        write_register(run.registers, stack, top + size)
        run.put(0, value)
    return 1


def _jump(run: Execution) -> int:
    run.next_rip = run.get(0)
    return 1


def _call(run: Execution) -> int:
    target = run.get(0)
    _push_value(run, run.insn.operands[0].size, run.next_rip)
    run.next_rip = target
    return 1


def _direct_store(run: Execution) -> int:
    """MOVDIR64B: 64 bytes from memory to the address in a register, which must be a multiple of 64."""
    source = next(operand for operand in run.insn.memory if "read" in operand.access)
    target = next(operand for operand in run.insn.memory if "write" in operand.access)
    run.require_alignment(target, 64)
    chunks = [run.bus.read(run.linear(source) + offset, 8) for offset in range(0, 64, 8)]
    for index, chunk in enumerate(chunks):
        run.bus.write(run.linear(target) + index * 8, 8, chunk)
    return 1


ACTIONS: dict[str, Action] = {
    "mov": _move,
    "movnti": _move,
    "movzx": _move,
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
    **dict.fromkeys(("movups", "movupd", "movdqu"), _move),
    **dict.fromkeys(("movaps", "movapd", "movdqa", "movntps", "movntpd", "movntdq"), _move_aligned),
    "movss": _move_scalar,
    "in": _in,
    "out": _out,
    "push": _push,
    "pop": _pop,
    "jmp": _jump,
    "call": _call,
    "movdir64b": _direct_store,
    **string_actions(),
}
"""What the emulator executes, by mnemonic."""

NEAR_INDIRECT = ("JMP_RM", "CALL_RM")
OPERAND_REGISTERS = frozenset(PLACES) | {f"XMM{number}" for number in range(16)}


def supported(insn: Insn) -> str:
    """Why the emulator cannot do `insn`; empty when it can."""
    if insn.mnemonic not in ACTIONS:
        return f"no emulation of {insn.mnemonic}"
    unknown = [
        operand.register
        for operand in insn.operands
        if operand.kind == "reg" and operand.register not in OPERAND_REGISTERS
    ]
    if unknown:
        return f"{insn.mnemonic} with register {unknown[0]}"
    if insn.mnemonic == "cmpsd" and not insn.code.startswith("CMPSD_M32"):
        return f"no emulation of {insn.code}"
    if insn.mnemonic in ("jmp", "call") and not insn.code.startswith(NEAR_INDIRECT):
        return f"no emulation of {insn.code}"
    return ""


def _action(insn: Insn) -> Action:
    """MOVSD is two instructions of one name."""
    if insn.mnemonic == "movsd" and not insn.code.startswith("MOVSD_M32"):
        return _move_scalar
    return ACTIONS[insn.mnemonic]


def execute(
    insn: Insn, registers: Registers, system: SystemRegisters, bus: Bus, *, max_elements: int = MASK64
) -> Executed | Unsupported:
    """Execute `insn` and move RIP behind it; of a repeated string instruction at most `max_elements` elements.

    What the bus raises passes through: then RIP stays, and of a string instruction the elements before are done.
    A misaligned operand raises `FaultUnwind` with #GP(0) where the instruction demands alignment.
    """
    reason = supported(insn)
    if reason:
        return Unsupported(reason)
    run = Execution(insn, registers, system, bus, max_elements)
    elements = _action(insn)(run)
    registers.rip = run.next_rip & (MASK64 if insn.mode == 64 else MASK32)
    return Executed(elements, not run.interrupted)
