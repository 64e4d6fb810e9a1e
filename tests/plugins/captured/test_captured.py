"""Exits of a log: what is computed, what is taken, and that a step which makes no sense changes nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.config import GuestConfig, MachineConfig
from sevlab.core.events import CpuidResult, GuestExit, Injected, Refused, Resumed, Supplied, Value
from sevlab.core.machine import Machine
from sevlab.core.svm import ExitCode
from sevlab.plugins.captured import Decoded, InterruptCommand, InterruptEnded
from sevlab.plugins.io import MmioAccessed, PortAccessed, ioio_word

BLANK = GuestExit(0, 0x1000, 0, 0, 0, b"", 0, 0, 0, (), (), (), False, (), False, False)
LAPIC = 0xFEE0_0000


def make():
    return Machine(MachineConfig(plugins=("captured",), guests=(GuestConfig(vcpus=2, memory_bytes=1 << 16),)))


@pytest.fixture
def machine():
    return make()


def port(number, size, *, is_in, **fields):
    return BLANK._replace(
        exit_code=ExitCode.IOIO, exit_info_1=ioio_word(number, size, is_in=is_in), exit_info_2=0x1001, **fields
    )


def mmio(gpa, insn, **fields):
    return BLANK._replace(
        exit_code=ExitCode.NPF, exit_info_1=0x10000000E, exit_info_2=gpa, insn=insn, mode=64, **fields
    )


def kinds(outcome):
    return [type(record) for record in outcome.records]


def test_out_writes_what_the_log_saw_and_goes_on_at_exitinfo2(machine):
    outcome = machine.apply(port(0x80, 2, is_in=False, stored=(0x1234,)))
    assert outcome.first(PortAccessed) == PortAccessed(0x80, 2, False, 0x1234, 1)
    assert outcome.first(Resumed) == Resumed(0, 0x1001)
    assert Supplied not in kinds(outcome)


def test_in_of_a_foreign_port_is_taken_from_the_log(machine):
    assert machine.apply(port(0x1234, 1, is_in=True, answers=(7,))).first(Supplied) == Supplied("value")


def test_in_of_the_serial_port_is_computed(machine):
    outcome = machine.apply(port(0x3FD, 1, is_in=True, answers=(0,)))
    assert outcome.first(PortAccessed).value == 0x60
    assert outcome.first(Supplied) is None


def test_cpuid_is_learnt_once_and_computed_from_then_on(machine):
    step = BLANK._replace(
        exit_code=ExitCode.CPUID, insn=b"\x0f\xa2", mode=64, registers=(("rax", 7), ("rcx", 0)), answers=(1, 2, 3, 4)
    )
    first, again = machine.apply(step), machine.apply(step._replace(answers=(9, 9, 9, 9)))
    assert first.first(Supplied) == Supplied("cpuid")
    assert again.first(CpuidResult) == CpuidResult(1, 2, 3, 4)
    assert again.first(Supplied) is None
    assert again.first(Resumed) == Resumed(0, 0x1002)


def test_rdmsr_gives_what_wrmsr_wrote(machine):
    write = BLANK._replace(
        exit_code=ExitCode.MSR, exit_info_1=1, insn=b"\x0f\x30", registers=(("rcx", 0xC0000081),), stored=(1 << 40,)
    )
    machine.apply(write)
    read = machine.apply(write._replace(exit_info_1=0, insn=b"\x0f\x32", stored=(), answers=(5,)))
    assert read.first(Value) == Value(1 << 40)


def test_an_msr_that_the_processor_refused_is_refused_again(machine):
    step = BLANK._replace(exit_code=ExitCode.MSR, insn=b"\x0f\x32", registers=(("rcx", 0x9999),), refused=True)
    machine.apply(step)
    again = machine.apply(step._replace(refused=False))
    assert again.first(Injected).event & 0x7FF == 0x30D
    assert again.first(Resumed) == Resumed(0, 0x1000)


@pytest.mark.parametrize(
    ("insn", "width", "value"),
    [
        (b"\xc6\x43\x10\x5a", 1, 0x5A),
        (b"\x66\xc7\x43\x20\xa5\x5a", 2, 0x5AA5),
        (b"\xc7\x43\x30\xef\xbe\xad\xde", 4, 0xDEADBEEF),
    ],
)
def test_an_immediate_store_is_computed_from_the_bytes(machine, insn, width, value):
    outcome = machine.apply(mmio(0xD0000010, insn, stored=(0,)))
    assert outcome.first(MmioAccessed) == MmioAccessed(0xD0000010, width, True, value)
    assert outcome.first(Resumed) == Resumed(0, 0x1000 + len(insn))
    assert Supplied("stored") not in outcome.records


def test_a_register_store_takes_its_value_from_the_log(machine):
    outcome = machine.apply(mmio(0xD0000040, b"\x48\x89\x43\x40", stored=(77,)))
    assert outcome.first(MmioAccessed) == MmioAccessed(0xD0000040, 8, True, 77)
    assert Supplied("stored") in outcome.records


def test_a_rip_relative_operand_is_placed_and_rip_stays_the_logs(machine):
    outcome = machine.apply(mmio(0xD0000100, b"\x8b\x05\x10\x00\x00\x00", answers=(3,)))
    assert outcome.first(MmioAccessed).gpa == 0xD0000100
    assert outcome.first(Resumed) == Resumed(0, 0x1006)


def test_the_highest_arrived_interrupt_is_injected_then_ended(machine):
    machine.apply(mmio(LAPIC + 0xF0, b"\xc7\x00\xff\x01\x00\x00", stored=(0x1FF,)))
    outcome = machine.apply(
        BLANK._replace(exit_code=ExitCode.INTR, arrivals=((0, 0x40, 0), (0, 0x51, 0)), interruptible=True)
    )
    assert outcome.first(Injected).event & 0xFF == 0x51
    ended = machine.apply(mmio(LAPIC + 0xB0, b"\xc7\x00\x00\x00\x00\x00", stored=(0,)))
    assert ended.first(InterruptEnded) == InterruptEnded(0x51)
    later = machine.apply(BLANK._replace(exit_code=ExitCode.VINTR, interruptible=True))
    assert later.first(Injected).event & 0xFF == 0x40


def test_the_interrupt_command_is_decoded(machine):
    outcome = machine.apply(mmio(LAPIC + 0x300, b"\x89\x03", stored=(0x000C_4051,)))
    assert outcome.first(InterruptCommand) == InterruptCommand(0, 0x51, 0, False, True, False, 3)


def test_bytes_that_are_no_instruction_decode_to_length_0(machine):
    assert machine.apply(BLANK._replace(exit_code=ExitCode.WBINVD, insn=b"\x06")).first(Decoded).length == 0


@pytest.mark.parametrize(
    "fields", [{"vcpu": 9}, {"mode": 17}, {"registers": (("xyz", 1),)}, {"registers": (("rax", "1"),)}]
)
def test_a_step_that_makes_no_sense_is_refused(machine, fields):
    assert kinds(machine.apply(BLANK._replace(exit_code=ExitCode.CPUID, **fields))) == [Refused]


WORD = st.integers(0, (1 << 64) - 1)


@given(
    st.builds(
        GuestExit,
        st.integers(0, 1),
        WORD,
        st.sampled_from([0x7B, 0x7C, 0x72, 0x400, 0x78, 0x60, 0x64, 0x65, 0x10, 0x23, 0x81, 0x7F, 0x403, 0x46]),
        WORD,
        WORD,
        st.binary(max_size=15),
        st.sampled_from([0, 16, 32, 64]),
        st.integers(0, 0xFFFF_FFFF),
        WORD,
        st.just((("rcx", 0x830),)),
        st.lists(WORD, max_size=2).map(tuple),
        st.lists(WORD, max_size=4).map(tuple),
        st.booleans(),
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 255), st.integers(0, 1)), max_size=3).map(tuple),
        st.booleans(),
        st.booleans(),
    )
)
def test_no_step_raises(step):
    MACHINE.reset()
    assert MACHINE.apply(step).records


MACHINE = make()
