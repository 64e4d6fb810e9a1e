"""Any instruction on any registers: nothing raises, only the operands are touched, Unicorn writes the same back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sevlab.core.cpu import GPR_NAMES, FaultUnwind, Registers, SystemRegisters
from sevlab.core.events import Fault
from sevlab.core.svm import Vector
from sevlab.plugins.io import decode, effective_address, execute
from sevlab.plugins.io.decode import Insn
from sevlab.plugins.io.emulate import Executed, Unsupported, supported
from sevlab.plugins.io.execution import read_register

from tests.plugins.io.test_emulate import FLAGS, undefined_flags, undefined_result
from tests.vectors import vector_set

unicorn = pytest.importorskip("unicorn")
from unicorn import x86_const as ux  # noqa: E402

CODE = 0x20_0000
LIMIT = 4
"""Elements of a repeated instruction."""
BASES = {"fs": 0x7000, "gs": 0x9000}

values = st.one_of(
    st.integers(0x10_0000, 0x1F_0000),
    st.sampled_from((0, 1, 0x7F, 0x80, 0xFF, 0x8000, 0xFFFF_FFFF, 1 << 31, 1 << 47, 1 << 63, (1 << 64) - 1)),
    st.integers(0, (1 << 64) - 1),
)
register_files = st.lists(values, min_size=16, max_size=16)


def known_instructions():
    """(bytes, mode) of every instruction of the decode vectors: all forms, prefixes and addressing modes."""
    lines = (vector_set("insn") / "decode.jsonl").read_text().splitlines()
    return [(bytes.fromhex(case["hex"]), case["mode"]) for case in map(json.loads, lines)]


KNOWN = known_instructions()


class SparseBus:
    """Zeros everywhere; keeps every access."""

    def __init__(self):
        self.memory, self.accesses = {}, []

    def read(self, linear, size):
        self.accesses.append((linear, size))
        return int.from_bytes(bytes(self.memory.get(linear + n, 0) for n in range(size)), "little")

    def write(self, linear, size, value):
        assert 0 <= value < 1 << size * 8
        self.accesses.append((linear, size))
        self.memory.update({linear + n: byte for n, byte in enumerate(value.to_bytes(size, "little"))})

    def probe(self, linear, size):
        self.accesses.append((linear, size))

    def port_in(self, port, size):
        assert 0 <= port <= 0xFFFF
        return 0

    def port_out(self, port, size, value):
        assert 0 <= port <= 0xFFFF
        assert 0 <= value < 1 << size * 8


def machine_state(chosen, mode):
    mask = (1 << 64) - 1 if mode == 64 else 0xFFFF_FFFF
    registers = Registers(**{name: value & mask for name, value in zip(GPR_NAMES, chosen, strict=True)}, rip=CODE)
    segments = {name: (0, 0x93, 0xFFFF_FFFF, base) for name, base in BASES.items()}
    return registers, SystemRegisters(**segments, cs=(8, 0x9B, 0xFFFF_FFFF, 0))


def operands(insn, registers, system):
    """Every byte that the instruction's operands name, before it runs."""

    def base(segment):
        return 0 if segment in ("ES", "CS", "SS", "DS") and insn.mode == 64 else getattr(system, segment.lower())[3]

    allowed = set()
    wrap = (1 << 64) - 1 if insn.mode == 64 else 0xFFFF_FFFF
    reach = range(1 - LIMIT, LIMIT) if is_string(insn) else (0,)
    for operand in insn.memory:
        for element in reach:
            moved = operand._replace(displacement=operand.displacement + element * operand.size)
            _, linear = effective_address(moved, lambda name: read_register(registers, name), base, insn.mode)
            allowed.update(linear + n & wrap for n in range(operand.size))
    return allowed


def is_string(insn):
    return insn.mnemonic.startswith(("movs", "stos", "lods", "scas", "cmps", "ins", "outs")) and "XMM" not in insn.code


def run(code, mode, chosen):
    insn = decode(code, mode, CODE)
    if not isinstance(insn, Insn):
        assert insn.reason in ("no_more_bytes", "invalid_instruction")
        return
    registers, system = machine_state(chosen, mode)
    before = registers._capture(registers)
    far_bit = insn.mnemonic in ("bt", "bts", "btr", "btc") and insn.operands[1].kind == "reg"
    allowed = None if far_bit or "SP" in str(insn.memory) else operands(insn, registers, system)
    bus = SparseBus()
    try:
        result = execute(insn, registers, system, bus, max_elements=LIMIT)
    except FaultUnwind as unwind:
        result = unwind.fault
    if isinstance(result, Fault):
        assert result == Fault(Vector.GP, 0, 0)
        assert registers._capture(registers) == before
        return
    if isinstance(result, Unsupported):
        assert result.reason
        assert registers._capture(registers) == before
        assert bus.accesses == []
    if allowed is not None:
        wrap = (1 << 64) - 1 if mode == 64 else 0xFFFF_FFFF
        for linear, size in bus.accesses:
            assert {linear + n & wrap for n in range(size)} <= allowed, (insn.iced, hex(linear), size)


@given(st.binary(max_size=16), st.sampled_from((16, 32, 64)), register_files)
def test_any_bytes_are_answered(code, mode, chosen):
    run(code, mode, chosen)


@given(st.sampled_from(KNOWN), st.binary(max_size=6), register_files)
def test_any_known_instruction_touches_only_its_operands(known, tail, chosen):
    run(known[0] + tail, known[1], chosen)


@pytest.mark.long
@given(st.sampled_from(KNOWN), st.binary(max_size=6), register_files)
@settings(max_examples=20_000)
def test_many_known_instructions_touch_only_their_operands(known, tail, chosen):
    run(known[0] + tail, known[1], chosen)


# Unicorn ----------------------------------------------------------------------------------------------------------

MODES = {32: 4, 64: 8}
REGISTERS = {64: GPR_NAMES, 32: GPR_NAMES[:8]}


class Processor:
    """Unicorn with zeros wherever an instruction looks, and every written byte."""

    def __init__(self, mode):
        self.mode = mode
        self.uc = unicorn.Uc(unicorn.UC_ARCH_X86, MODES[mode])
        self.uc.mem_map(CODE, 0x1000)
        self.pages, self.written = set(), {}
        self.uc.hook_add(unicorn.UC_HOOK_MEM_UNMAPPED, self._map)
        self.uc.hook_add(unicorn.UC_HOOK_MEM_WRITE, self._note)

    def _map(self, uc, _access, address, size, _value, _data):
        for page in {address & -0x1000, address + size - 1 & -0x1000} - self.pages:
            uc.mem_map(page, 0x1000)
            self.pages.add(page)
        return True

    def _note(self, _uc, _access, address, size, _value, _data):
        self.written.update(dict.fromkeys(range(address, address + size)))

    def register(self, name):
        return getattr(ux, f"UC_X86_REG_{name.upper() if self.mode == 64 else 'E' + name[1:].upper()}")

    def step(self, code, registers):
        for page in self.pages:
            self.uc.mem_unmap(page, 0x1000)
        self.pages.clear()
        self.written.clear()
        self.uc.mem_write(CODE, code.ljust(32, b"\x90"))
        for name in REGISTERS[self.mode]:
            self.uc.reg_write(self.register(name), getattr(registers, name))
        self.uc.reg_write(ux.UC_X86_REG_EFLAGS, registers.rflags)
        self.uc.emu_start(CODE, CODE + len(code), count=1)
        found = {name: self.uc.reg_read(self.register(name)) for name in REGISTERS[self.mode]}
        memory = {address: self.uc.mem_read(address, 1)[0] for address in self.written}
        return found, self.uc.reg_read(ux.UC_X86_REG_EFLAGS), memory


@pytest.fixture(scope="module")
def processors():
    return {mode: Processor(mode) for mode in MODES}


def comparable():
    """Known instructions that both do: no ports, no repetition, no far bits, no segment with another base."""
    for code, mode in KNOWN:
        insn = decode(code, mode, CODE)
        if mode == 16 or not isinstance(insn, Insn) or supported(insn) or insn.io or insn.prefixes:
            continue
        if insn.segment_override or "xmm" in str(insn.iced) or insn.mnemonic == "movdir64b":
            continue
        if insn.mnemonic in ("bt", "bts", "btr", "btc") and insn.operands[1].kind == "reg":
            continue
        yield code, mode


COMPARABLE = list(comparable())
near = st.lists(st.integers(0x10_0000, 0x1F_0000), min_size=16, max_size=16)


def agree(processors, known, chosen, flags):
    code, mode = known
    insn = decode(code, mode, CODE)
    registers, system = machine_state(chosen, mode)
    system = SystemRegisters(cs=(8, 0x9B, 0xFFFF_FFFF, 0))
    registers.rflags = 2 | flags & FLAGS
    if undefined_result(insn, registers) or max(operands(insn, registers, system), default=0) >> 47:
        return  # Unicorn keeps 52 bits of an address
    try:
        found, found_flags, memory = processors[mode].step(code, registers)
    except unicorn.UcError:
        return  # an address or an instruction that Unicorn does not do
    bus = SparseBus()
    try:
        result = execute(insn, registers, system, bus)
    except FaultUnwind:
        return
    assert isinstance(result, Executed)
    assert {name: getattr(registers, name) for name in REGISTERS[mode]} == found, insn.iced
    assert {place: bus.memory.get(place) for place in memory} == memory, insn.iced
    assert set(bus.memory) == set(memory), insn.iced
    ignored = undefined_flags(insn)
    assert (registers.rflags ^ found_flags) & FLAGS & ~ignored == 0, (
        insn.iced,
        hex(registers.rflags),
        hex(found_flags),
    )


def test_most_of_the_vectors_can_be_compared():
    assert len(COMPARABLE) > 700
    assert {mode for _, mode in COMPARABLE} == {32, 64}


@given(st.sampled_from(COMPARABLE), near, st.integers(0, 255))
@settings(max_examples=200)
def test_write_back_agrees_with_unicorn(processors, known, chosen, flags):
    agree(processors, known, chosen, flags)


@pytest.mark.long
@given(st.sampled_from(COMPARABLE), near, st.integers(0, 255))
@settings(max_examples=5_000)
def test_write_back_agrees_with_unicorn_often(processors, known, chosen, flags):
    agree(processors, known, chosen, flags)
