"""IOIO exits: every size and direction, strings with their counters and pointers, faults, and what each mode allows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.builder import Port
from sevlab.core.config import GuestConfig
from sevlab.core.cpu import CONTROL_SEV, CONTROL_SEV_ES
from sevlab.core.events import (
    CpuExit,
    Injected,
    MapFlag,
    MemoryRead,
    MemoryWrite,
    NptEdit,
    Party,
    SetRegisters,
    Space,
    Stopped,
)
from sevlab.core.hookspecs import hookimpl
from sevlab.core.svm import EventType, ExitCode, Vector, event
from sevlab.core.testing import assert_offsets, make_machine
from sevlab.plugins import io

PORT = 0x1230
DF, CF = 1 << 10, 1
MEMORY = 1 << 20


class Recorder:
    """A device at one port that keeps what it is given and counts up when read."""

    def __init__(self, width=4, strings=False, base=PORT) -> None:
        self.width, self.strings, self.base = width, strings, base
        self.seen = []

    @hookimpl
    def sevlab_register(self, builder):
        port = Port(self.read, self.write, self.width, self.take if self.strings else None)
        for number in range(self.base, self.base + self.width):
            builder.ports.add(number, port)

    def read(self, _machine, _vcpu, port, width):
        self.seen.append(("in", port, width))
        return 0xFFFF_FFFF_8765_4321 + (len(self.seen) << 40)

    def write(self, _machine, _vcpu, port, width, value):
        self.seen.append(("out", port, width, value))

    def take(self, _machine, _vcpu, port, width, data):
        self.seen.append(("string", port, width, data))


def machine_with(device, vcpus=1):
    return make_machine("io", given={"x": device}, guests=(GuestConfig(memory_bytes=MEMORY, vcpus=vcpus),))


def registers(machine, **values):
    machine.apply(SetRegisters(0, tuple(values.items())))
    return machine.vcpus[0].regs


def leave(machine, word, next_rip=0x1002):
    return machine.apply(CpuExit(0, ExitCode.IOIO, word, next_rip, b"", 0))


def string(width=1, *, is_in=False, rep=True, address_size=64, segment=3, port=PORT):
    return io.ioio_word(port, width, is_in=is_in, string=True, rep=rep, address_size=address_size, segment=segment)


def read(machine, gpa, length):
    return machine.apply(MemoryRead(Party.GUEST, 0, Space.GPA, gpa, False, length)).records[0].data


def store(machine, gpa, data):
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, gpa, False, data))


def test_the_word_is_the_documents():
    assert_offsets(io.IoioInfo, {"direction": (0, 8), "port": (0, 8)}, 8)
    assert io.ioio_word(0x3F8, 1, is_in=False, address_size=64) == 0x3F8_0210
    assert io.ioio_word(0x60, 2, is_in=True, address_size=16) == 0x60_00A1
    assert string(4, segment=5, address_size=32) == PORT << 16 | 0x154C


@given(
    st.integers(0, 0xFFFF),
    st.sampled_from((1, 2, 4)),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from((16, 32, 64)),
    st.integers(0, 5),
)
def test_encode_and_decode_agree(port, size, is_in, is_string, rep, address_size, segment):
    word = io.ioio_word(port, size, is_in=is_in, string=is_string, rep=rep, address_size=address_size, segment=segment)
    info = io.IoioInfo.from_bytes(word.to_bytes(8, "little"))
    assert (info.port, info.size, info.direction, info.string, info.rep) == (port, size, is_in, is_string, rep)
    assert (info.address_16, info.address_32, info.address_64) == (
        address_size == 16,
        address_size == 32,
        address_size == 64,
    )
    assert info.segment == segment


@pytest.mark.parametrize(("width", "rax"), [(1, 0x1111_1111_1111_1121), (2, 0x1111_1111_1111_4321), (4, 0x8765_4321)])
def test_in_replaces_what_its_size_says(width, rax):
    device = Recorder()
    machine = machine_with(device)
    regs = registers(machine, rax=0x1111_1111_1111_1111, rip=0x1000)
    leave(machine, io.ioio_word(PORT, width, is_in=True), 0x1001)
    assert (regs.rax, regs.rip) == (rax, 0x1001)
    assert device.seen == [("in", PORT, width)]


@pytest.mark.parametrize(("width", "value"), [(1, 0xDD), (2, 0xCCDD), (4, 0xAABB_CCDD)])
def test_out_gives_the_device_zero_extended_data(width, value):
    device = Recorder()
    machine = machine_with(device)
    registers(machine, rax=0x9999_9999_AABB_CCDD)
    outcome = leave(machine, io.ioio_word(PORT, width, is_in=False))
    assert device.seen == [("out", PORT, width, value)]
    assert outcome.first(io.PortAccessed) == io.PortAccessed(PORT, width, False, value, 1)


def test_an_access_wider_than_the_device_goes_byte_by_byte():
    device = Recorder(width=1)
    machine = machine_with(device)
    regs = registers(machine, rax=0x4433_2211)
    leave(machine, io.ioio_word(PORT, 4, is_in=False))
    assert device.seen == [("out", PORT, 1, 0x11)]  # the three ports behind are nobody's
    leave(machine, io.ioio_word(PORT, 2, is_in=True))
    assert regs.rax & 0xFFFF == 0xFF21


def test_an_access_beyond_the_last_port_wraps():
    device = Recorder(width=1, base=0xFFFF)
    machine = machine_with(device)
    regs = registers(machine, rax=0)
    leave(machine, io.ioio_word(0xFFFF, 4, is_in=True))
    assert regs.rax == 0xFFFF_FF21


def test_nothing_at_a_port_reads_ones_and_drops_writes():
    machine = make_machine("io", guests=1)
    regs = registers(machine, rax=0)
    leave(machine, io.ioio_word(0x9999, 2, is_in=True))
    assert regs.rax == 0xFFFF
    assert leave(machine, io.ioio_word(0x9999, 4, is_in=False)).first(Injected) is None


@pytest.mark.parametrize("width", [3, 5, 6, 7])
def test_a_size_that_no_processor_reports_is_refused(width):
    machine = make_machine("io", guests=1)
    outcome = leave(machine, PORT << 16 | width << 4 | 1 << 9)
    assert outcome.first(io.Unserved) is not None
    assert outcome.first(Stopped) is not None


@pytest.mark.parametrize("address_size", [16, 32, 64])
def test_rep_outs_takes_memory_upwards(address_size):
    device = Recorder()
    machine = machine_with(device)
    store(machine, 0x8000, b"\1\2\3\4\5\6")
    high = 0xAAAA_0000 if address_size == 16 else 0
    regs = registers(machine, rsi=high | 0x8000, rcx=high | 3, rip=0x1000)
    leave(machine, string(2, address_size=address_size))
    assert device.seen == [("out", PORT, 2, value) for value in (0x201, 0x403, 0x605)]
    assert (regs.rsi, regs.rcx, regs.rip) == (high | 0x8006, high, 0x1002)


def test_rep_ins_puts_data_downwards_with_df():
    machine = machine_with(Recorder())
    regs = registers(machine, rdi=0x8008, rcx=3, rflags=DF | 2)
    leave(machine, string(4, is_in=True))
    assert read(machine, 0x7FFC, 20) == bytes(4) + b"\x21\x43\x65\x87" * 3 + bytes(4)
    assert (regs.rdi, regs.rcx) == (0x8008 - 12, 0)


def test_without_rep_one_element_moves_and_the_counter_stays():
    device = Recorder(strings=True)
    machine = machine_with(device)
    store(machine, 0x8000, b"ab")
    regs = registers(machine, rsi=0x8000, rcx=7)
    leave(machine, string(rep=False))
    assert device.seen == [("out", PORT, 1, ord("a"))]
    assert (regs.rsi, regs.rcx) == (0x8001, 7)


def test_rep_with_a_zero_counter_does_nothing_but_go_on():
    device = Recorder()
    machine = machine_with(device)
    regs = registers(machine, rsi=0x8000, rcx=0, rip=0x1000)
    leave(machine, string())
    assert device.seen == []
    assert (regs.rsi, regs.rip) == (0x8000, 0x1002)


def test_a_device_that_takes_strings_gets_them_at_once():
    device = Recorder(strings=True)
    machine = machine_with(device)
    store(machine, 0x8000, b"abcd")
    registers(machine, rsi=0x8000, rcx=4)
    outcome = leave(machine, string())
    assert device.seen == [("string", PORT, 1, b"abcd")]
    assert outcome.first(io.PortAccessed) == io.PortAccessed(PORT, 1, False, ord("a"), 4)


def test_a_long_string_goes_in_passes_and_rip_stays_until_the_last():
    device = Recorder(strings=True)
    machine = machine_with(device)
    regs = registers(machine, rsi=0x8000, rcx=5000, rip=0x1000)
    leave(machine, string())
    assert (regs.rsi, regs.rcx, regs.rip) == (0x9000, 904, 0x1000)
    leave(machine, string())
    assert (regs.rcx, regs.rip) == (0, 0x1002)
    assert [len(entry[3]) for entry in device.seen] == [4096, 904]


@pytest.mark.parametrize(("segment", "base"), [(0, 0x10000), (3, 0x20000), (4, 0x30000)])
def test_the_segment_of_outs_counts(segment, base):
    device = Recorder()
    machine = machine_with(device)
    system = machine.vcpus[0].system
    system.es, system.ds, system.fs = ((0, 0x93, 0xFFFF, n << 16) for n in (1, 2, 3))
    store(machine, base + 0x40, bytes([segment + 1]))
    registers(machine, rsi=0x40, rcx=1)
    leave(machine, string(segment=segment, address_size=16))
    assert device.seen == [("out", PORT, 1, segment + 1)]


def test_a_16_bit_pointer_wraps_in_its_segment():
    device = Recorder()
    machine = machine_with(device)
    store(machine, 0xFFFF, b"\x11")
    store(machine, 0, b"\x22")
    regs = registers(machine, rsi=0xFFFF, rcx=2)
    leave(machine, string(address_size=16))
    assert [entry[3] for entry in device.seen] == [0x11, 0x22]
    assert regs.rsi == 1


def paged(machine, *missing):
    """One page table maps the first 2 MiB one to one, without the pages `missing`."""
    store(machine, 0x10000, (0x11000 | 7).to_bytes(8, "little"))
    store(machine, 0x11000, (0x12000 | 7).to_bytes(8, "little"))
    store(machine, 0x12000, (0x13000 | 7).to_bytes(8, "little"))
    entries = (0 if page in missing else page << 12 | 7 for page in range(512))
    store(machine, 0x13000, b"".join(entry.to_bytes(8, "little") for entry in entries))
    machine.vcpus[0].system.cs = (8, 0x29B, 0xFFFF_FFFF, 0)
    registers(machine, cr0=0x8000_0011, cr3=0x10000, cr4=0x20, efer=0x1500)


def test_a_page_fault_in_the_middle_keeps_the_elements_before_it():
    device = Recorder(strings=True)
    machine = machine_with(device)
    paged(machine, 9)
    store(machine, 0x8FFE, b"ab")
    regs = registers(machine, rsi=0x8FFE, rcx=4, rip=0x1000)
    outcome = leave(machine, string())
    assert [entry[3] for entry in device.seen] == [ord("a"), ord("b")]
    assert (regs.rsi, regs.rcx, regs.rip) == (0x9000, 2, 0x1000)
    assert outcome.first(Injected).event == event(Vector.PF, EventType.EXCEPTION, 0)
    assert machine.vcpus[0].system.cr2 == 0x9000


def test_ins_asks_for_its_destination_before_it_takes_data():
    device = Recorder()
    machine = machine_with(device)
    paged(machine, 9)
    registers(machine, rdi=0x9000, rcx=1, cpl=3)
    outcome = leave(machine, string(is_in=True))
    assert device.seen == []
    assert outcome.first(Injected).event >> 32 == 6  # a user's write to a page that is not there


def test_memory_that_the_nested_tables_lack_is_mapped_again():
    device = Recorder(strings=True)
    machine = machine_with(device)
    store(machine, 0x8000, b"abcd")
    machine.apply(NptEdit(0, 0x8000, 0, 0x1000, MapFlag.UNMAP))
    registers(machine, rsi=0x8000, rcx=4)
    leave(machine, string())
    assert device.seen == [("string", PORT, 1, b"abcd")]


def test_a_page_table_that_the_nested_tables_lack_is_mapped_and_the_guest_tries_again():
    device = Recorder(strings=True)
    machine = machine_with(device)
    paged(machine)
    machine.apply(NptEdit(0, 0x13000, 0, 0x1000, MapFlag.UNMAP))
    regs = registers(machine, rsi=0x8000, rcx=4, rip=0x1000)
    for _ in range(2):
        outcome = leave(machine, string())
    assert outcome.first(Injected) is None
    assert regs.rip == 0x1002


def test_page_tables_outside_memory_cannot_be_served():
    machine = machine_with(Recorder())
    paged(machine)
    store(machine, 0x12000, (MEMORY * 4 | 7).to_bytes(8, "little"))
    registers(machine, rsi=0x8000, rcx=4)
    assert "page tables" in leave(machine, string()).first(io.Unserved).reason


def test_the_modes_differ_for_strings_and_not_for_plain_accesses():
    for control, simple, strings in (
        (0, True, True),
        (CONTROL_SEV, True, False),
        (CONTROL_SEV | CONTROL_SEV_ES, False, False),
    ):
        machine = machine_with(Recorder())
        machine.vcpus[0].vmcb.encryption_control |= control
        registers(machine, rsi=0x8000, rcx=2)
        assert (leave(machine, io.ioio_word(PORT, 1, is_in=False)).first(io.Unserved) is None) == simple
        machine = machine_with(Recorder())
        machine.vcpus[0].vmcb.encryption_control |= control
        registers(machine, rsi=0x8000, rcx=2)
        assert (leave(machine, string()).first(io.Unserved) is None) == strings


def test_without_the_next_rip_in_exitinfo2_the_length_counts():
    machine = machine_with(Recorder())
    regs = registers(machine, rip=0x1000)
    machine.apply(CpuExit(0, ExitCode.IOIO, io.ioio_word(PORT, 1, is_in=False), 0, b"\xee", 0))
    assert regs.rip == 0x1001


def test_a_string_to_the_exit_port_stops_where_it_is():
    machine = make_machine("io", guests=1)
    regs = registers(machine, rsi=0x8000, rcx=2, rip=0x1000)
    assert leave(machine, string(4, port=0xF4)).first(Stopped) is not None
    assert regs.rip == 0x1000


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1), st.booleans())
def test_any_word_and_registers_are_answered(shared, word, pointer, counter, small):
    shared.reset()
    counter = counter & 0xFFF if small else counter
    registers(shared, rsi=pointer, rdi=pointer, rcx=counter)
    assert leave(shared, word).records


@pytest.fixture(scope="module")
def shared():
    return machine_with(Recorder())
