"""String instructions: one element at a time, each committed before the next.

Source: spec 24594 (APM volume 3), each instruction's page and 1.2.6 (repeat prefixes).
"""

from __future__ import annotations

from collections.abc import Callable

from sevlab.plugins.io import alu
from sevlab.plugins.io.alu import DF, ZF
from sevlab.plugins.io.decode import MemoryOperand
from sevlab.plugins.io.execution import ACCUMULATORS, Action, Execution, write_register

COUNTERS = {16: "CX", 32: "ECX", 64: "RCX"}
SOURCES = {16: "SI", 32: "ESI", 64: "RSI"}
TARGETS = {16: "DI", 32: "EDI", 64: "RDI"}


def _string(
    element: Callable[[Execution, int], None], pointers: tuple[dict[int, str], ...], *, compares: bool = False
) -> Action:
    """A string instruction: `element` moves one, then the pointers move, then REP counts."""

    def action(run: Execution) -> int:
        insn = run.insn
        address_size = insn.memory[0].address_size
        size = insn.memory[0].size
        counter = COUNTERS[address_size]
        repeated = bool(insn.prefixes)
        done = 0
        while not repeated or run.register(counter):
            if done == run.max_elements:
                run.interrupt()
                break
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


def string_actions() -> dict[str, Action]:
    """All string instructions by mnemonic."""
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
