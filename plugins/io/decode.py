"""From instruction bytes to what an emulator needs: operands, memory accesses, ports.

The decoder is iced-x86; what is ours is the mapping of its operands to accesses, and the effective address.
Truncated and invalid bytes are values (`Undecodable`), not exceptions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

from sevlab.core.units import MASK64
from sevlab.plugins.io.layout import SEGMENT_NUMBERS, ioio_word

MAX_LENGTH = 15


class Undecodable(NamedTuple):
    """Why there is no instruction: "no_more_bytes" (the bytes end too early) or "invalid_instruction"."""

    reason: str


def too_long(data: bytes, mode: int) -> bool:
    """Whether `data`, which does not decode, goes on past 15 bytes: #GP(0) then, #UD otherwise.

    What is longer repeats a prefix. Without one of the repeated ones its first 15 bytes are the beginning of an
    instruction, if it is one at all. Source: spec 24594 (APM volume 3), 1.2; 24593, 8.2.14 (#GP conditions).
    """
    head = data[:MAX_LENGTH]
    prefixes = bytes(takewhile(PREFIXES.__contains__, head))
    for index, byte in enumerate(prefixes):
        rest = prefixes[index + 1 :]
        if len(head) == MAX_LENGTH and (byte in rest or (byte in SEGMENTS and not SEGMENTS.isdisjoint(rest))):
            return decode(head[:index] + head[index + 1 :], mode) == Undecodable("no_more_bytes")
    return False


class Operand(NamedTuple):
    """One operand. `kind` is reg, mem or imm; `access` read, write, read_write, cond_read, ...; `size` in bytes."""

    kind: str
    access: str
    size: int
    register: str = ""
    immediate: int = 0
    immediate_kind: str = ""


class MemoryOperand(NamedTuple):
    """One memory access of an instruction.

    Address = segment base + (base + index * scale + displacement, wrapped to `address_size` bits). The displacement
    of a RIP-relative operand is the absolute target, and its base is empty.
    """

    segment: str
    base: str
    rip_relative: bool
    index_register: str
    scale: int
    displacement: int
    address_size: int
    size: int
    access: str


class PortAccess(NamedTuple):
    """The I/O part of IN, OUT, INS, OUTS. `port` is None when it is in DX; `segment` only of string forms."""

    is_in: bool
    string: bool
    size: int
    port: int | None
    rep: bool
    address_size: int
    segment: str

    def exit_info_1(self, dx: int, *, with_segment: bool = True) -> int:
        """EXITINFO1; `with_segment` False leaves bits 12:10 zero, as processors without decode assists do."""
        port = dx & 0xFFFF if self.port is None else self.port
        segment = SEGMENT_NUMBERS[self.segment] if self.segment and with_segment else 0
        return ioio_word(
            port,
            self.size,
            is_in=self.is_in,
            string=self.string,
            rep=self.rep,
            address_size=self.address_size,
            segment=segment,
        )


class Insn(NamedTuple):
    """A decoded instruction; `mode` is 16, 32 or 64. `iced` is the decoder's own object, for the emulator."""

    length: int
    mode: int
    mnemonic: str
    code: str
    prefixes: tuple[str, ...]
    segment_override: str
    operands: tuple[Operand, ...]
    memory: tuple[MemoryOperand, ...]
    io: PortAccess | None
    lock: bool
    iced: Any


class _Names(NamedTuple):
    """The decoder's numbers as words."""

    module: Any
    register: dict[int, str]
    mnemonic: dict[int, str]
    code: dict[int, str]
    access: dict[int, str]
    op_kind: dict[int, str]
    info: Any


def _words(enumeration: Any) -> dict[int, str]:
    return {value: name for name, value in vars(enumeration).items() if name.isupper() and isinstance(value, int)}


@cache
def _names() -> _Names:
    import iced_x86

    mnemonics = {value: name.lower() for value, name in _words(iced_x86.Mnemonic).items()}
    accesses = {value: name.lower() for value, name in _words(iced_x86.OpAccess).items()}
    kinds = {value: name.lower() for value, name in _words(iced_x86.OpKind).items()}
    return _Names(
        iced_x86,
        _words(iced_x86.Register),
        mnemonics,
        _words(iced_x86.Code),
        accesses,
        kinds,
        iced_x86.InstructionInfoFactory(),
    )


def decode(data: bytes, mode: int, rip: int = 0) -> Insn | Undecodable:
    """The instruction at the start of `data` (at most 15 bytes count) in a `mode`-bit code segment at `rip`."""
    insn = _decode_at(data, mode, 0)
    if rip and isinstance(insn, Insn) and insn.iced.is_ip_rel_memory_operand:
        return _decode_at(data, mode, rip)
    return insn


@lru_cache(maxsize=4096)
def _decode_at(data: bytes, mode: int, rip: int) -> Insn | Undecodable:
    names = _names()
    iced = names.module
    decoder = iced.Decoder(mode, data[:MAX_LENGTH], ip=rip)
    instruction = decoder.decode()
    if decoder.last_error != iced.DecoderError.NONE:
        short = decoder.last_error == iced.DecoderError.NO_MORE_BYTES and len(data) < MAX_LENGTH
        return Undecodable("no_more_bytes" if short else "invalid_instruction")
    info = names.info.info(instruction)
    prefixes = []
    mnemonic = names.mnemonic[instruction.mnemonic]
    if instruction.has_rep_prefix:
        prefixes.append("rep")
    if instruction.has_repne_prefix:
        prefixes.append("repne")
    override = names.register[instruction.segment_prefix] if instruction.segment_prefix else ""
    return Insn(
        instruction.len,
        mode,
        mnemonic,
        names.code[instruction.code],
        tuple(prefixes),
        override,
        tuple(_operand(names, instruction, info, index) for index in range(instruction.op_count)),
        tuple(_memory(names, instruction, used) for used in info.used_memory()),
        _port(names, instruction, info, mnemonic, data, mode),
        instruction.has_lock_prefix,
        instruction,
    )


REGISTER_KIND = "register"
IMMEDIATE = "immediate"


def _operand(names: _Names, instruction: Any, info: Any, index: int) -> Operand:
    kind = names.op_kind[instruction.op_kind(index)]
    access = names.access[info.op_access(index)]
    iced = names.module
    if kind == REGISTER_KIND:
        register = instruction.op_register(index)
        return Operand("reg", access, iced.RegisterExt.size(register), names.register[register])
    if kind.startswith(IMMEDIATE):
        return Operand("imm", access, 0, "", instruction.immediate(index) & MASK64, kind)
    return Operand("mem", access, iced.MemorySizeExt.size(instruction.memory_size))


CODE_SIZES = {1: 16, 2: 32, 3: 64}


def _memory(names: _Names, instruction: Any, used: Any) -> MemoryOperand:
    relative = instruction.is_ip_rel_memory_operand
    base = "" if relative or not used.base else names.register[used.base]
    address_size = CODE_SIZES[used.address_size]
    displacement = instruction.ip_rel_memory_address if relative else used.displacement & MASK64
    return MemoryOperand(
        names.register[used.segment] if used.segment else "",
        base,
        relative,
        names.register[used.index] if used.index else "",
        used.scale if used.index else 1,
        displacement,
        address_size,
        # A repeated string operation has no one size for the decoder; what counts here is the size of an element.
        names.module.MemorySizeExt.size(used.memory_size or instruction.memory_size),
        names.access[used.access],
    )


def _port(names: _Names, instruction: Any, info: Any, mnemonic: str, data: bytes, mode: int) -> PortAccess | None:
    string = mnemonic in ("insb", "insw", "insd", "outsb", "outsw", "outsd")
    if not string and mnemonic not in ("in", "out"):
        return None
    is_in = mnemonic.startswith("in")
    iced = names.module
    if string:
        used = info.used_memory()[0]
        size = iced.MemorySizeExt.size(instruction.memory_size)
        rep = instruction.has_rep_prefix or instruction.has_repne_prefix
        return PortAccess(is_in, True, size, None, rep, CODE_SIZES[used.address_size], names.register[used.segment])
    value = 0 if is_in else 1  # which operand is the accumulator; the other is the port
    immediate = None
    if names.op_kind[instruction.op_kind(1 - value)] != REGISTER_KIND:
        immediate = instruction.immediate(1 - value) & 0xFF
    size = iced.RegisterExt.size(instruction.op_register(value))
    return PortAccess(is_in, False, size, immediate, False, _address_size(data, mode), "")


SEGMENTS = frozenset(b"\x26\x2e\x36\x3e\x64\x65")
PREFIXES = SEGMENTS | frozenset(b"\x66\x67\xf0\xf2\xf3")
ADDRESS_PREFIX = 0x67


def _address_size(data: bytes, mode: int) -> int:
    """Address size of an instruction without memory operand: the mode's, changed by a 67h prefix."""
    for byte in data:
        if byte == ADDRESS_PREFIX:
            return 32 if mode != 32 else 16
        if byte not in PREFIXES:
            break
    return mode


def effective_address(
    operand: MemoryOperand, read_register: Callable[[str], int], segment_base: Callable[[str], int], mode: int
) -> tuple[int, int]:
    """(offset, linear address) of a memory operand; `segment_base` gives 0 where 64-bit mode ignores a base."""
    offset = operand.displacement
    if operand.base:
        offset += read_register(operand.base)
    if operand.index_register:
        offset += read_register(operand.index_register) * operand.scale
    offset &= (1 << operand.address_size) - 1
    linear = offset + (segment_base(operand.segment) if operand.segment else 0)
    return offset, linear & (MASK64 if mode == 64 else 0xFFFF_FFFF)
