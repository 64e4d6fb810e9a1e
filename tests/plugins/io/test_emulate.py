"""The emulator against Unicorn on random operands, and its own rules."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sevlab.core.cpu import GPR_NAMES, FaultUnwind, Registers, SystemRegisters
from sevlab.core.events import Fault
from sevlab.plugins.io import decode, execute
from sevlab.plugins.io.decode import Insn
from sevlab.plugins.io.emulate import ACTIONS, Executed, Unsupported, supported
from sevlab.plugins.io.execution import read_register, write_register

unicorn = pytest.importorskip("unicorn")
from unicorn import x86_const as ux  # noqa: E402

CODE, DATA, STACK = 0x20_0000, 0x10_0000, 0x30_0000
FLAGS = 0x8D5
EXAMPLES = int(os.environ.get("SEVLAB_EMULATE_EXAMPLES", "300"))
"""More for a long run by hand."""


class FlatBus:
    """Flat memory as a dictionary of bytes over one page of content; ports echo."""

    def __init__(self, content, base=DATA):
        self.memory = {base + n: byte for n, byte in enumerate(content)}
        self.accesses = []

    def read(self, linear, size):
        self.accesses.append((linear, size))
        return int.from_bytes(bytes(self.memory.get(linear + n, 0) for n in range(size)), "little")

    def write(self, linear, size, value):
        self.accesses.append((linear, size))
        for n, byte in enumerate(value.to_bytes(size, "little")):
            self.memory[linear + n] = byte

    def probe(self, linear, size):
        pass

    def port_in(self, port, size):
        return port & (1 << size * 8) - 1

    def port_out(self, port, size, value):
        pass


# Opcodes with a ModRM that names [rdi]; /n in the reg field where the opcode is a group.
REG_FORMS = [bytes([op]) for base in range(0x00, 0x40, 8) for op in range(base, base + 4)]
REG_FORMS += [bytes([op]) for op in (0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A, 0x8B, 0x63)]
REG_FORMS += [
    bytes([0x0F, op]) for op in (0xB0, 0xB1, 0xB6, 0xB7, 0xBE, 0xBF, 0xC0, 0xC1, 0xA3, 0xAB, 0xB3, 0xBB, 0xA5, 0xAD)
]
IMM8_FORMS = [
    (bytes([op]), n) for op in (0x80, 0x83, 0xC0, 0xC1) for n in range(8) if (op, n) not in ((0xC0, 6), (0xC1, 6))
]
IMM8_FORMS += [(b"\xc6", 0), (b"\xf6", 0), *((b"\x0f\xba", n) for n in range(4, 8))]
PLAIN_FORMS = [(bytes([op]), n) for op in (0xF6, 0xF7) for n in (2, 3)] + [
    (bytes([op]), n) for op in (0xFE, 0xFF) for n in (0, 1)
]
PLAIN_FORMS += [(bytes([op]), n) for op in (0xD0, 0xD1, 0xD2, 0xD3) for n in range(8) if n != 6] + [(b"\x0f\xc7", 1)]
STRINGS = [bytes([op]) for op in (0xA4, 0xA5, 0xAA, 0xAB, 0xAC, 0xAD, 0xAE, 0xAF, 0xA6, 0xA7)]

prefixes = st.sampled_from((b"", b"\x66", b"\x48", b"\x4c", b"\x66\x44", b"\x40"))
values = st.one_of(
    st.sampled_from(
        (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0x7FFF_FFFF, 0x8000_0000, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
    ),
    st.integers(0, (1 << 64) - 1),
)
instructions = st.one_of(
    st.builds(
        lambda p, op, reg: p + op + bytes([reg << 3 | 7]), prefixes, st.sampled_from(REG_FORMS), st.integers(0, 7)
    ),
    st.builds(
        lambda p, form, imm: p + form[0] + bytes([form[1] << 3 | 7, imm]),
        prefixes,
        st.sampled_from(IMM8_FORMS),
        st.integers(0, 255),
    ),
    st.builds(lambda p, form: p + form[0] + bytes([form[1] << 3 | 7]), prefixes, st.sampled_from(PLAIN_FORMS)),
    st.builds(
        lambda rep, p, op: rep + p + op, st.sampled_from((b"", b"\xf3", b"\xf2")), prefixes, st.sampled_from(STRINGS)
    ),
)


def on_unicorn(code, registers, content):
    machine = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    for base in (CODE, DATA - 0x1000, STACK):
        machine.mem_map(base, 0x3000 if base != CODE else 0x1000)
    machine.mem_write(CODE, code)
    machine.mem_write(DATA, content)
    for name in GPR_NAMES:
        machine.reg_write(getattr(ux, f"UC_X86_REG_{name.upper()}"), getattr(registers, name))
    machine.reg_write(ux.UC_X86_REG_RFLAGS, registers.rflags)
    count = 40 if code[0] in (0xF2, 0xF3) else 1
    machine.emu_start(CODE, CODE + len(code), count=count)
    found = {name: machine.reg_read(getattr(ux, f"UC_X86_REG_{name.upper()}")) for name in GPR_NAMES}
    return found, machine.reg_read(ux.UC_X86_REG_RFLAGS), bytes(machine.mem_read(DATA - 0x1000, 0x3000))


def undecided(insn):
    """RFLAGS bits that the manual leaves undefined for this instruction."""
    import iced_x86

    mask = insn.iced.rflags_undefined
    bits = {
        iced_x86.RflagsBits.OF: 1 << 11,
        iced_x86.RflagsBits.SF: 1 << 7,
        iced_x86.RflagsBits.ZF: 1 << 6,
        iced_x86.RflagsBits.AF: 1 << 4,
        iced_x86.RflagsBits.CF: 1 << 0,
        iced_x86.RflagsBits.PF: 1 << 2,
    }
    return sum(place for bit, place in bits.items() if mask & bit)


@given(instructions, st.lists(values, min_size=8, max_size=8), st.binary(min_size=32, max_size=32), st.integers(0, 255))
@settings(max_examples=EXAMPLES)
def test_registers_memory_and_defined_flags_agree_with_unicorn(code, chosen, content, flags):
    insn = decode(code, 64, CODE)
    if not isinstance(insn, Insn) or supported(insn):
        return
    names = ("rax", "rcx", "rdx", "rbx", "rbp", "r8", "r9", "r10")
    start = dict(zip(names, chosen, strict=True)) | {"rdi": DATA + 8, "rsi": DATA + 16, "rsp": STACK + 0x800}
    if insn.prefixes:
        start["rcx"] = start["rcx"] % 5
    bit_test = insn.mnemonic in ("bt", "bts", "btr", "btc") and insn.operands[1].kind == "reg"
    if bit_test and insn.operands[1].register.lstrip("ER") in ("SP", "SI", "DI"):
        return  # as an offset in bits an address reaches beyond this test's memory
    if bit_test:
        start |= {name: value % 64 for name, value in start.items() if name in names}
    content = content.ljust(64, b"\x5a")
    rflags = 2 | flags & FLAGS
    if "cl" in str(insn.iced):
        start["rcx"] = start["rcx"] & ~0xFF | start["rcx"] % 32
    registers = Registers(**start, rflags=rflags, rip=CODE)
    if insn.mnemonic == "cmpxchg16b":
        registers.rdi = DATA + 16  # it demands alignment
    if undefined_result(insn, registers):
        return
    found, found_flags, memory = on_unicorn(code, registers, content)
    bus = FlatBus(content)
    result = execute(insn, registers, SystemRegisters(), bus)
    assert isinstance(result, Executed)
    assert {name: getattr(registers, name) for name in GPR_NAMES} == found, insn.iced
    ours = bytes(bus.memory.get(DATA - 0x1000 + n, 0) for n in range(0x3000))
    assert ours == memory, insn.iced
    ignored = undefined_flags(insn)
    assert (registers.rflags ^ found_flags) & FLAGS & ~ignored == 0, (
        insn.iced,
        hex(registers.rflags),
        hex(found_flags),
    )


def undefined_result(insn, registers):
    """A double shift of 16 bits by more than 16 is undefined."""
    if insn.mnemonic not in ("shld", "shrd") or insn.operands[0].size != 2:
        return False
    count = insn.operands[2]
    return (count.immediate if count.kind == "imm" else registers.rcx) & 0x1F > 16


def undefined_flags(insn):
    """Flags that are not compared: undefined by the manual, or by this operand size and count."""
    ignored = undecided(insn)
    if insn.mnemonic in ("shl", "shr", "sar", "rol", "ror", "rcl", "rcr", "shld", "shrd", "sal"):
        ignored |= 1 << 11 | 1 << 4  # OF is defined for a count of 1 only
        width = insn.operands[0].size * 8
        if width < 32:
            ignored |= 1  # CF is undefined for a count above the width
    if insn.mnemonic in ("and", "or", "xor", "test"):
        ignored |= 1 << 4
    if insn.mnemonic in ("bt", "bts", "btr", "btc"):
        ignored |= FLAGS & ~1
    return ignored


def test_a_fault_leaves_registers_and_rip_alone():
    class Faulting(FlatBus):
        def write(self, linear, size, value):
            raise FaultUnwind(Fault(14, 2, linear))

    registers = Registers(rdi=DATA, rax=5, rflags=2, rip=CODE)
    with pytest.raises(FaultUnwind):
        execute(decode(b"\x01\x07", 64), registers, SystemRegisters(), Faulting(b"\x01"))
    assert (registers.rax, registers.rflags, registers.rip) == (5, 2, CODE)


def test_a_string_instruction_keeps_the_elements_before_a_fault():
    class Faulting(FlatBus):
        def write(self, linear, size, value):
            if linear == DATA + 2:
                raise FaultUnwind(Fault(14, 2, linear))
            super().write(linear, size, value)

    registers = Registers(rdi=DATA, rcx=5, rax=0x41, rip=CODE)
    bus = Faulting(b"")
    with pytest.raises(FaultUnwind):
        execute(decode(b"\xf3\xaa", 64), registers, SystemRegisters(), bus)
    assert (registers.rdi, registers.rcx, registers.rip) == (DATA + 2, 3, CODE)
    assert bus.memory == {DATA: 0x41, DATA + 1: 0x41}


def test_direction_flag_goes_down():
    registers = Registers(rdi=DATA + 4, rcx=2, rax=0x41, rflags=0x402)
    bus = FlatBus(b"")
    execute(decode(b"\xf3\xaa", 64), registers, SystemRegisters(), bus)
    assert sorted(bus.memory) == [DATA + 3, DATA + 4]
    assert registers.rdi == DATA + 2


@pytest.mark.parametrize(
    ("name", "value", "rest"),
    [("EAX", 0x1_0000_0005, 5), ("AX", 0x10005, 0x1111_1111_1111_0005), ("AL", 0x105, 0x1111_1111_1111_1105)],
)
def test_narrow_register_writes_keep_or_clear_the_rest(name, value, rest):
    registers = Registers(rax=0x1111_1111_1111_1111)
    write_register(registers, name, value)
    assert registers.rax == rest


def test_high_byte_registers():
    registers = Registers(rcx=0x1234)
    assert read_register(registers, "CH") == 0x12
    write_register(registers, "CH", 0xFF)
    assert registers.rcx == 0xFF34


@pytest.mark.parametrize(
    ("code", "what"),
    [(b"\x0f\xa2", "cpuid"), (b"\x0f\x6f\x07", "movq"), (b"\xff\x2f", "JMP_M"), (b"\xff\x1f", "CALL_M")],
)
def test_what_the_emulator_does_not_do_is_said_and_changes_nothing(code, what):
    registers = Registers(rip=CODE)
    result = execute(decode(code, 64), registers, SystemRegisters(), FlatBus(b""))
    assert isinstance(result, Unsupported)
    assert what in result.reason
    assert registers.rip == CODE


def test_sse_moves_go_both_ways():
    system = SystemRegisters()
    bus = FlatBus(bytes(range(16)))
    execute(decode(b"\x0f\x10\x0f", 64), Registers(rdi=DATA), system, bus)
    assert system.xmm[1] == int.from_bytes(bytes(range(16)), "little")
    execute(decode(b"\x0f\x11\x4f\x10", 64), Registers(rdi=DATA), system, bus)
    assert bus.read(DATA + 16, 16) == system.xmm[1]


def test_stack_and_direct_store_forms():
    bus = FlatBus(bytes(range(64)))
    registers = Registers(rdi=DATA, rsp=STACK)
    execute(decode(b"\xff\x37", 64), registers, SystemRegisters(), bus)
    assert (registers.rsp, bus.read(STACK - 8, 8)) == (STACK - 8, int.from_bytes(bytes(range(8)), "little"))
    registers.rdi = DATA + 0x100
    execute(decode(b"\x8f\x07", 64), registers, SystemRegisters(), bus)
    assert (registers.rsp, bus.read(DATA + 0x100, 8)) == (STACK, int.from_bytes(bytes(range(8)), "little"))
    registers = Registers(rdi=DATA, rax=DATA + 0x200)
    execute(decode(b"\x66\x0f\x38\xf8\x07", 64), registers, SystemRegisters(), bus)
    assert bytes(bus.memory[DATA + 0x200 + n] for n in range(64)) == bytes(range(64))


def test_every_action_has_a_mnemonic_that_the_decoder_knows():
    import iced_x86

    known = {name.lower() for name in vars(iced_x86.Mnemonic) if name.isupper()}
    assert set(ACTIONS) - known <= {"insq", "outsq"}
