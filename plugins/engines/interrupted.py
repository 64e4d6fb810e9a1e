"""The instruction that a #VC interrupts: what it may change, what it may show, and what is nobody's business.

Registers that the instruction does not use, the stack above it and what lies behind its memory operand get values that
occur nowhere else: where one of them turns up in shared memory, the handler showed what was private. A guest that is
put back anyway does not miss what was there.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.cpu import GPR_NAMES, FaultUnwind
from sevlab.core.units import MASK32, MASK64, PAGE_BYTES, PAGE_MASK
from sevlab.plugins import io
from sevlab.plugins.engines import native

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.crypto import MemoryKey
    from sevlab.plugins.engines.execution import Execution

ZERO_EXTENDED = ("cpuid", "rdmsr", "rdtsc", "rdtscp", "rdpmc", "rdpru")
"""They clear the upper halves of what they write. Source: spec 24594, each instruction."""

HYPERCALL = "vmmcall"
"""What it changes is the hypervisor's interface."""

RSP = GPR_NAMES.index("rsp")
SECRET_SLOTS = 4
"""On the stack, of 8 bytes."""
SECRET_BYTES = 8
FLAGS_KEPT = MASK64 & ~(1 << 16)
"""All but RF."""


class Span(NamedTuple):
    """Private bytes that the instruction does not change."""

    what: str
    spa: int
    data: bytes
    key: MemoryKey | None


class Interrupted(NamedTuple):
    """A guest before an instruction."""

    rip: int
    length: int
    mnemonic: str
    insn: bytes
    cpl: int
    registers: tuple[int, ...]
    rflags: int
    may_write: tuple[int, ...]
    """Of each general register the bits that the instruction may change."""
    upper_halves: tuple[int, ...]
    """Registers whose upper half the instruction clears, by number."""
    secrets: tuple[tuple[str, bytes], ...]
    spans: tuple[Span, ...]


def plant(run: Execution, *, strict: bool = False) -> Interrupted:
    """Look at the instruction at RIP, and put secrets where it does not look.

    `strict`: also into the upper halves of registers of which it reads the lower. Raises `FaultUnwind` when there is no
    instruction.
    """
    from iced_x86 import InstructionInfoFactory, OpAccess, Register, RegisterExt

    vcpu, regs = run.vcpu, run.vcpu.regs
    insn = native.decoded(run)
    data = run.fetch(insn.length)
    info = InstructionInfoFactory().info(insn.iced)
    writes, reads = [0] * 16, [0] * 16
    addresses: set[int] = set()
    written = {OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE}
    for used in info.used_registers():
        if RegisterExt.is_gpr(used.register):
            number = RegisterExt.full_register(used.register) - Register.RAX
            mask = (1 << RegisterExt.size(used.register) * 8) - 1
            if Register.AH <= used.register <= Register.BH:
                number, mask = used.register - Register.AH, 0xFF00
            writes[number] |= mask if used.access in written else 0
            reads[number] |= mask if used.access != OpAccess.WRITE else 0
    if insn.mnemonic == HYPERCALL:
        writes = [MASK64] * 16
    operands: list[tuple[int, int]] = []
    for memory in info.used_memory():
        linear = memory.displacement
        for register, scale in ((memory.base, 1), (memory.index, memory.scale)):
            if register not in (Register.NONE, Register.RIP):
                number = RegisterExt.full_register(register) - Register.RAX
                addresses.add(number)
                linear += getattr(regs, GPR_NAMES[number]) * scale
        length = _length(insn, regs.rcx)
        if memory.access not in written:
            operands.append((linear & MASK64, length))
    rng = Random(regs.rip)  # noqa: S311  # the same at the same place
    secrets: list[tuple[str, bytes]] = []
    for number, name in enumerate(GPR_NAMES):
        if number == RSP or number in addresses:
            continue
        value = getattr(regs, name)
        if not (reads[number] | writes[number]) and insn.mnemonic != HYPERCALL:
            secret = _secret(rng, SECRET_BYTES)
            setattr(regs, name, int.from_bytes(secret, "little"))
            secrets.append((name, secret))
        elif strict and reads[number] and not reads[number] >> 32:
            secret = _secret(rng, 4)
            setattr(regs, name, value & MASK32 | int.from_bytes(secret, "little") << 32)
            secrets.append((f"upper half of {name}", secret))
    spans = [*_plant_stack(run, rng, secrets), *_plant_operands(run, operands, rng, secrets)]
    return Interrupted(
        regs.rip,
        insn.length,
        insn.mnemonic,
        data,
        vcpu.system.cpl,
        tuple(getattr(regs, name) for name in GPR_NAMES),
        regs.rflags,
        tuple(writes),
        tuple(n for n in range(16) if strict and insn.mnemonic in ZERO_EXTENDED and writes[n] == MASK64),
        tuple(secrets),
        tuple(spans),
    )


def _secret(rng: Random, length: int) -> bytes:
    """Bytes of which none is zero."""
    return bytes(rng.choices(range(1, 256), k=length))


def _length(insn: io.Insn, count: int) -> int:
    """How many bytes of its operand an instruction reads."""
    size = insn.io.size if insn.io is not None else 8
    return size * (count if insn.iced.has_rep_prefix or insn.iced.has_repne_prefix else 1)


def _private(run: Execution, linear: int, length: int) -> tuple[int, MemoryKey] | None:
    """(SPA, key) of private memory at a linear address, in one page; None where there is none."""
    if linear >> 47 not in (0, 0x1_FFFF) or (linear & PAGE_MASK) + length > PAGE_BYTES:
        return None
    try:
        _, place = run.machine.access.guest_linear(run.vcpu, linear, 0)
    except FaultUnwind:
        return None
    return None if place.key is None else (place.spa, place.key)


def _plant_stack(run: Execution, rng: Random, secrets: list[tuple[str, bytes]]) -> list[Span]:
    """The stack from RSP to the end of its page, with secrets in its first slots."""
    rsp = run.vcpu.regs.rsp
    length = min(PAGE_BYTES - (rsp & PAGE_MASK), 1024)
    found = _private(run, rsp, length)
    if found is None:
        return []
    spa, key = found
    memory = run.machine.memory
    for slot in range(min(SECRET_SLOTS, length // SECRET_BYTES)):
        secret = _secret(rng, SECRET_BYTES)
        memory.write(spa + slot * SECRET_BYTES, secret, key, run.vcpu.tag)
        secrets.append((f"the stack at rsp+{slot * SECRET_BYTES:#x}", secret))
    return [Span("the interrupted stack", spa, memory.read(spa, length, key), key)]


def _plant_operands(
    run: Execution, operands: list[tuple[int, int]], rng: Random, secrets: list[tuple[str, bytes]]
) -> list[Span]:
    spans = []
    memory = run.machine.memory
    for linear, length in operands:
        found = _private(run, linear, min(length, PAGE_BYTES) + SECRET_BYTES)
        if found is None:
            continue
        spa, key = found
        secret = _secret(rng, SECRET_BYTES)
        memory.write(spa + length, secret, key, run.vcpu.tag)
        secrets.append(("what lies behind the memory operand", secret))
        spans.append(Span("the memory operand", spa, memory.read(spa, length + SECRET_BYTES, key), key))
    return spans


def changed_registers(before: Interrupted, vcpu: Vcpu) -> list[tuple[str, str]]:
    """(rule, what) for each register that the instruction does not change and that is another one now."""
    found = []
    regs = vcpu.regs
    now = (
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi,
        regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    )  # fmt: skip
    if now != before.registers:
        for number, (value, old) in enumerate(zip(now, before.registers, strict=True)):
            if (value ^ old) & ~before.may_write[number]:
                found.append(("register", f"{GPR_NAMES[number]} was {old:#x} and is {value:#x}"))
            elif number in before.upper_halves and value >> 32 and value != old:
                found.append(("upper-half", f"{GPR_NAMES[number]} is {value:#x}"))
    if (regs.rflags ^ before.rflags) & FLAGS_KEPT:
        found.append(("register", f"rflags was {before.rflags:#x} and is {regs.rflags:#x}"))
    return found
