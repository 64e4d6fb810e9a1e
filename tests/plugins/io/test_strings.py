"""String instructions: counters, conditions, pointers in every address size, and the limit of a pass."""

from __future__ import annotations

import pytest
from sevlab.core.cpu import Registers, SystemRegisters
from sevlab.plugins.io import Executed, decode, execute

from tests.plugins.io.test_any_instruction import SparseBus

ZF, DF = 1 << 6, 1 << 10
SOURCE, TARGET = 0x1000, 0x2000


def run(code, mode=64, content=None, max_elements=1 << 32, **values):
    registers = Registers(**({"rsi": SOURCE, "rdi": TARGET, "rip": 0x100} | values))
    bus = SparseBus()
    for address, data in (content or {}).items():
        bus.memory.update({address + n: byte for n, byte in enumerate(data)})
    result = execute(decode(code, mode), registers, SystemRegisters(), bus, max_elements=max_elements)
    assert isinstance(result, Executed)
    return registers, bus, result


def test_movs_copies_element_by_element_so_an_overlap_repeats():
    registers, bus, result = run(b"\xf3\xa4", rsi=SOURCE, rdi=SOURCE + 1, rcx=4, content={SOURCE: b"x"})
    assert bytes(bus.memory[SOURCE + n] for n in range(5)) == b"xxxxx"
    assert (registers.rcx, registers.rsi, registers.rip, result) == (0, SOURCE + 4, 0x102, Executed(4))


@pytest.mark.parametrize(
    ("code", "left", "flag"),
    [(b"\xf2\xae", 2, ZF), (b"\xf3\xae", 4, 0), (b"\xae", 5, 0)],
)
def test_scas_stops_by_its_condition(code, left, flag):
    registers, _, _ = run(code, rax=ord("c"), rcx=5, content={TARGET: b"abcde"})
    assert registers.rcx == left
    assert registers.rflags & ZF == flag


@pytest.mark.parametrize(("code", "compared"), [(b"\xf3\xa6", 3), (b"\xf2\xa6", 1)])
def test_cmps_stops_at_a_difference_or_at_an_equality(code, compared):
    registers, _, result = run(code, rcx=9, content={SOURCE: b"abXd", TARGET: b"abYd"})
    assert result.elements == compared
    assert registers.rcx == 9 - compared


def test_a_comparison_of_zero_elements_leaves_the_flags():
    registers, bus, _ = run(b"\xf2\xae", rcx=0, rflags=2 | ZF)
    assert registers.rflags & ZF
    assert bus.accesses == []


def test_lods_and_stos_use_the_accumulator_of_their_size():
    registers, _, _ = run(b"\xad", rax=(1 << 64) - 1, content={SOURCE: b"\1\2\3\4"})
    assert registers.rax == 0x0403_0201
    registers, _, _ = run(b"\xac", rax=0x1111, content={SOURCE: b"\5"})
    assert registers.rax == 0x1105
    _, bus, _ = run(b"\x48\xab", rax=0x8877_6655_4433_2211)
    assert bus.memory[TARGET + 7] == 0x88


@pytest.mark.parametrize(
    ("code", "mode", "rcx", "rdi"),
    [(b"\xf3\xaa", 64, 0, 0x1_0000_2003), (b"\x67\xf3\xaa", 64, 0, 0x2003), (b"\x67\xf3\xaa", 32, 0xFFFF_0000, 0x2003)],
)
def test_the_address_size_is_that_of_counter_and_pointer(code, mode, rcx, rdi):
    start = {64: 0x1_0000_2000, 32: 0x2000}[mode]
    counter = 3 if mode == 64 else 0xFFFF_0003
    registers, _, _ = run(code, mode, rcx=counter, rdi=start)
    assert (registers.rcx, registers.rdi) == (rcx, rdi)


def test_a_16_bit_pointer_wraps():
    registers, bus, _ = run(b"\x67\xf3\xaa", 32, rcx=2, rdi=0xFFFF, rax=7)
    assert sorted(bus.memory) == [0, 0xFFFF]
    assert registers.rdi == 1


def test_backwards():
    registers, bus, _ = run(b"\xf3\xab", rcx=2, rdi=TARGET, rax=1, rflags=2 | DF)
    assert [start for start, _ in bus.accesses] == [TARGET, TARGET - 4]
    assert registers.rdi == TARGET - 8


@pytest.mark.parametrize(("limit", "done", "rip"), [(3, 3, 0x100), (4, 4, 0x102), (5, 4, 0x102), (0, 0, 0x100)])
def test_a_pass_ends_at_its_limit_with_rip_on_the_instruction(limit, done, rip):
    registers, bus, result = run(b"\xf3\xaa", rcx=4, max_elements=limit)
    assert (len(bus.accesses), registers.rcx, registers.rip) == (done, 4 - done, rip)
    assert result == Executed(done, done == 4)
