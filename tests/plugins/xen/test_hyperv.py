"""Hyper-V calls: widths, sets of processors, limits, and that a set can never be written past its end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.errors import InvariantViolation
from sevlab.core.hookspecs import hookimpl
from sevlab.core.testing import make_machine
from sevlab.plugins import io
from sevlab.plugins.xen import HYPERV_FLAG, HvCall, HvStatus, VpMask
from sevlab.plugins.xen.arguments import HvFlush, HvFlushEx, HvSendIpi, HvSendIpiEx

from tests.plugins.xen.world import PAGE, guest_of, machine_of, registers_of, vmmcall

VECTOR = 0x41


@pytest.fixture
def machine():
    machine = machine_of(guests=1, vcpus=4, viridian=True)
    for apic in io.devices(machine, machine.vcpus[0]).lapics.values():
        apic.registers[0xF0] = 0x1FF
    return machine


def hv(machine, code, *, fast=False, reps=0, first=PAGE, second=0):
    regs = registers_of(machine, rax=1 << 31, rcx=code | fast << 16 | reps << 32, rdx=first, r8=second)
    vmmcall(machine)
    return regs.rax & 0xFFFF, regs.rax >> 32


def interrupted(machine):
    return {vcpu for vcpu, apic in io.devices(machine, machine.vcpus[0]).lapics.items() if apic.irr >> VECTOR & 1}


def test_a_fast_ipi_is_in_registers(machine):
    assert hv(machine, HvCall.SEND_IPI, fast=True, first=VECTOR, second=0b1010) == (0, 0)
    assert interrupted(machine) == {1, 3}


def test_an_ipi_in_memory(machine):
    guest_of(machine).write(PAGE, HvSendIpi.build(vector=VECTOR, vcpu_mask=0b101))
    assert hv(machine, HvCall.SEND_IPI) == (0, 0)
    assert interrupted(machine) == {0, 2}


@pytest.mark.parametrize(
    ("banks", "mask", "expected"),
    [
        ((0b10,), 1, {1}),
        ((0b1, 1 << 63), 0b11, {0}),
        ((1 << 63,), 0b10, set()),
        ((1, 1), 1 << 2 | 1 << 3, set()),
        ((1,) * 64, (1 << 64) - 1, {0}),
        ((), 0, set()),
    ],
)
def test_a_sparse_set_has_only_the_banks_of_its_mask(machine, banks, mask, expected):
    data = HvSendIpiEx.build(vector=VECTOR, valid_bank_mask=mask)
    guest_of(machine).write(PAGE, data + b"".join(bank.to_bytes(8, "little") for bank in banks))
    assert hv(machine, HvCall.SEND_IPI_EX) == (0, 0)
    assert interrupted(machine) == expected


def test_a_set_of_all(machine):
    guest_of(machine).write(PAGE, HvSendIpiEx.build(vector=VECTOR, set_format=1))
    assert hv(machine, HvCall.SEND_IPI_EX) == (0, 0)
    assert interrupted(machine) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "fields",
    [
        {"vector": 0xF},
        {"vector": 0x100},
        {"target_vtl": 1},
        {"reserved_zero": b"\0\0\1"},
    ],
)
def test_parameters_of_an_ipi(machine, fields):
    guest = guest_of(machine)
    for layout, code in ((HvSendIpi, HvCall.SEND_IPI), (HvSendIpiEx, HvCall.SEND_IPI_EX)):
        guest.write(PAGE, layout.build(**({"vector": VECTOR} | fields)))
        assert hv(machine, code) == (HvStatus.INVALID_PARAMETER, 0)
    assert not interrupted(machine)


def test_vectors_at_their_limits(machine):
    assert hv(machine, HvCall.SEND_IPI, fast=True, first=0x10)[0] == 0
    assert hv(machine, HvCall.SEND_IPI, fast=True, first=0xFF)[0] == 0
    assert hv(machine, HvCall.SEND_IPI, fast=True, first=0xFF | 1 << 32)[0] == HvStatus.INVALID_PARAMETER


def test_other_formats_and_fast_forms_that_do_not_exist(machine):
    guest = guest_of(machine)
    guest.write(PAGE, HvSendIpiEx.build(vector=VECTOR, set_format=2))
    assert hv(machine, HvCall.SEND_IPI_EX)[0] == HvStatus.INVALID_PARAMETER
    guest.write(PAGE, HvFlushEx.build(set_format=2))
    assert hv(machine, HvCall.FLUSH_VIRTUAL_ADDRESS_LIST_EX)[0] == HvStatus.INVALID_PARAMETER
    guest.write(PAGE, HvFlushEx.build(set_format=2, flags=1))
    assert hv(machine, HvCall.FLUSH_VIRTUAL_ADDRESS_LIST_EX)[0] == 0
    for code in (HvCall.SEND_IPI_EX, HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE, HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE_EX):
        assert hv(machine, code, fast=True)[0] == HvStatus.INVALID_PARAMETER


def test_a_flush_completes_its_repetitions(machine):
    guest_of(machine).write(PAGE, HvFlush.build(vcpu_mask=3))
    assert hv(machine, HvCall.FLUSH_VIRTUAL_ADDRESS_LIST, reps=0xFFF) == (0, 0xFFF)


@pytest.mark.parametrize("gpa", [1 << 40, (1 << 64) - 8, (16 << 20) - 8])
def test_parameters_that_are_not_there(machine, gpa):
    for code in HvCall:
        if code not in (HvCall.NOTIFY_LONG_SPIN_WAIT, HvCall.EXT_CALL_QUERY_CAPABILITIES):
            assert hv(machine, code, first=gpa)[0] == HvStatus.INVALID_PARAMETER


def test_banks_that_are_not_there(machine):
    guest_of(machine).write((16 << 20) - HvSendIpiEx.SIZE, HvSendIpiEx.build(vector=VECTOR, valid_bank_mask=1))
    assert hv(machine, HvCall.SEND_IPI_EX, first=(16 << 20) - HvSendIpiEx.SIZE)[0] == HvStatus.INVALID_PARAMETER


def test_unknown_codes_and_hosts_without_hyperv(machine):
    assert hv(machine, 0x99)[0] == HvStatus.INVALID_HYPERCALL_CODE
    assert hv(machine, HvCall.EXT_CALL_QUERY_CAPABILITIES)[0] == HvStatus.INVALID_HYPERCALL_CODE
    assert hv(machine, HvCall.NOTIFY_LONG_SPIN_WAIT)[0] == 0
    plain = machine_of(guests=1)
    registers_of(plain, rax=1 << 31, rcx=HvCall.SEND_IPI)
    vmmcall(plain)
    assert plain.vcpus[0].regs.rax == (1 << 64) - 38


def test_32_bit_code_has_its_words_in_pairs():
    machine = machine_of(guests=1, viridian=True, start="protected")
    io.devices(machine, machine.vcpus[0]).lapics[0].registers[0xF0] = 0x1FF
    # The call word has its code in EAX, and bit 31 of EAX chooses Hyper-V: a reserved bit of the word.
    regs = registers_of(machine, rax=1 << 31 | 1 << 16 | HvCall.SEND_IPI, rdx=0, rbx=0, rcx=VECTOR, rdi=0, rsi=1)
    vmmcall(machine)
    assert (regs.rax, regs.rdx) == (0, 0)
    assert interrupted(machine) == {0}


def test_real_mode_gets_nothing():
    machine = machine_of(guests=1, viridian=True, start="reset")
    regs = registers_of(machine, rax=1 << 31 | 0x99)
    vmmcall(machine)
    assert regs.rax == 1 << 31 | 0x99


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, (1 << 64) - 1)), max_size=4))
def test_a_set_holds_what_was_put(banks):
    mask, expected = VpMask(), 0
    for bank, bits in banks:
        mask.put(bank, bits)
        expected = expected & ~(((1 << 64) - 1) << bank * 64) | bits << bank * 64
    assert [vp for vp in range(128) if vp in mask] == [vp for vp in range(128) if expected >> vp & 1]


@pytest.mark.parametrize("bank", [2, 63])
def test_a_bank_past_the_end_is_a_violation(bank):
    with pytest.raises(InvariantViolation, match="buffer.bounds"):
        VpMask().put(bank, 1)


def test_a_handler_without_the_bound_is_found():
    """What a seeded plugin does: replace one call by one that trusts the mask."""
    from sevlab.core.oracle import OracleSink
    from sevlab.plugins.xen import sparse_set

    class Trusting:
        """A handler that forgets the bound of the mask."""

        @hookimpl
        def sevlab_register(self, builder):
            builder.hypercalls.replace(HYPERV_FLAG | HvCall.SEND_IPI_EX, self.make)

        def make(self, original):
            def handler(context):
                mask = VpMask()
                for bank in range(64):
                    mask.put(bank, 0)
                return original(context)

            return handler

    machine = make_machine(
        "io", "xen", given={"trusting": Trusting()}, guests=1, options={"xen": {"start": "long", "viridian": True}}
    )
    machine.sink = OracleSink()
    registers_of(machine, rax=1 << 31, rcx=HvCall.SEND_IPI_EX, rdx=PAGE)
    vmmcall(machine)
    assert [finding.rule for finding in machine.sink.findings] == ["buffer.bounds"]
    assert sparse_set is not None
