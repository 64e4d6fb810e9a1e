"""Event injection: what EVENTINJ holds, what two events make, what comes back, and the documented failures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.cpu import CONTROL_SEV, CONTROL_SEV_ES
from sevlab.core.events import CpuExit, Injected, Schedule, SetRegisters, Stopped, VmExit
from sevlab.core.exceptions import CONTRIBUTORY
from sevlab.core.hookspecs import hookimpl
from sevlab.core.svm import EVENT_VALID, EventType, ExitCode, Vector, event
from sevlab.core.testing import assert_offsets, make_machine
from sevlab.plugins import io

DE, DB, UD, DF, TS, NP, SS, GP, PF, AC, MC, VC = (
    Vector[name] for name in ("DE", "DB", "UD", "DF", "TS", "NP", "SS", "GP", "PF", "AC", "MC", "VC")
)


@pytest.fixture
def machine():
    return make_machine("io", guests=1)


def encrypted(machine):
    machine.vcpus[0].vmcb.encryption_control |= CONTROL_SEV | CONTROL_SEV_ES
    return machine


def word(vector, kind=EventType.EXCEPTION, error=None):
    return event(vector, kind, error)


def test_the_event_word_is_the_documents():
    assert_offsets(io.EventWord, {"vector": (0, 4), "kind": (0, 4), "valid": (0, 4), "error_code": (4, 4)}, 8)
    read = io.EventWord.from_bytes(word(GP, error=0x1234).to_bytes(8, "little"))
    assert (read.vector, read.kind, read.error_valid, read.valid, read.error_code) == (13, 3, True, True, 0x1234)


@pytest.mark.parametrize(
    ("vector", "given_code", "expected"),
    [(UD, None, word(UD)), (DB, None, word(DB)), (GP, None, word(GP, error=0)), (TS, 0x28, word(TS, error=0x28))],
)
def test_exceptions_have_an_error_code_where_the_architecture_says(machine, vector, given_code, expected):
    assert io.inject_exception(machine, machine.vcpus[0], vector, given_code).word == expected


@pytest.mark.parametrize("held_in", ["event_inj", "exit_int_info"])
@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        (GP, NP, DF),
        (DE, SS, DF),
        (PF, GP, DF),
        (PF, PF, DF),
        (GP, PF, PF),
        (UD, GP, GP),
        (AC, PF, PF),
        (GP, UD, UD),
        (GP, AC, AC),
        (DF, UD, UD),
        (DF, GP, "shutdown"),
        (DF, PF, "shutdown"),
        (DF, DF, "shutdown"),
    ],
)
def test_a_second_exception_combines_with_the_one_under_way(machine, held_in, first, second, result):
    vcpu = machine.vcpus[0]
    setattr(vcpu.vmcb, held_in, word(first, error=0 if first in CONTRIBUTORY | {PF, DF, AC} else None))
    done = io.inject_exception(machine, vcpu, second)
    if result == "shutdown":
        assert (done.word, done.reason) == (0, "triple fault")
        assert vcpu.stopped
    else:
        assert done.word & 0xFF == result
        assert vcpu.vmcb.event_inj == done.word
        assert vcpu.vmcb.exit_int_info == 0
        assert done.word >> 32 == 0


def test_a_triple_fault_is_a_shutdown_exit(machine):
    machine.vcpus[0].vmcb.exit_int_info = word(DF, error=0)
    outcome = machine.apply(CpuExit(0, ExitCode.EXCEPTION_0 + GP, 0, 0, b"", 0))
    assert outcome.first(Stopped) is None  # #GP is not intercepted here
    machine.vcpus[0].vmcb.intercept(ExitCode.EXCEPTION_0 + GP)
    outcome = machine.apply(CpuExit(0, ExitCode.EXCEPTION_0 + GP, 0, 0, b"", 0))
    assert [record.exit_code for record in outcome.records if isinstance(record, VmExit)] == [0x4D, ExitCode.SHUTDOWN]
    assert outcome.first(Stopped).reason == "shutdown (triple fault)"


@pytest.mark.parametrize("kind", [EventType.INTERRUPT, EventType.NMI, EventType.SOFTWARE])
def test_an_interrupt_under_way_is_benign(machine, kind):
    machine.vcpus[0].vmcb.exit_int_info = word(2 if kind is EventType.NMI else 0x41, kind)
    assert io.inject_exception(machine, machine.vcpus[0], GP, 0).word == word(GP, error=0)


def test_a_page_fault_cannot_be_injected_where_cr2_is_encrypted(machine):
    encrypted(machine)
    done = io.inject_exception(machine, machine.vcpus[0], PF, 2)
    assert done.word == 0
    assert "CR2" in done.reason
    assert machine.vcpus[0].vmcb.event_inj == 0
    assert io.inject_exception(machine, machine.vcpus[0], GP, 0).word == word(GP, error=0)


def test_software_interrupts_with_and_without_saving_the_next_rip(machine):
    vcpu = machine.vcpus[0]
    vcpu.regs.rip = 0x1000
    assert io.inject_software(vcpu, 0x80, 2, nrips=True).word == word(0x80, EventType.SOFTWARE)
    assert (vcpu.regs.rip, vcpu.vmcb.next_rip) == (0x1000, 0x1002)
    assert io.inject_software(vcpu, 0x80, 2, nrips=False).word == word(0x80, EventType.SOFTWARE)
    assert vcpu.regs.rip == 0x1002


@pytest.mark.parametrize("vector", [Vector.BP, Vector.OF])
def test_int3_and_into_are_exceptions(machine, vector):
    assert io.inject_software(machine.vcpus[0], vector, 1, nrips=True).word == word(vector)


def test_without_saving_the_next_rip_an_encrypted_guest_gets_no_software_interrupt(machine):
    vcpu = encrypted(machine).vcpus[0]
    done = io.inject_software(vcpu, 0x80, 2, nrips=False)
    assert (done.word, vcpu.vmcb.event_inj, vcpu.regs.rip) == (0, 0, 0)
    assert "NRIP" in done.reason
    assert io.inject_software(vcpu, 0x80, 2, nrips=True).word


@pytest.mark.parametrize(
    ("info", "again"),
    [
        (0x41, 0),
        (word(0x41, EventType.INTERRUPT), word(0x41, EventType.INTERRUPT)),
        (word(2, EventType.NMI), word(2, EventType.NMI)),
        (word(GP, error=0x18), word(GP, error=0x18)),
        (word(UD) | 0xDEAD << 32, word(UD)),
        (word(0x80, EventType.SOFTWARE), 0),
        (word(Vector.BP), 0),
        (word(Vector.OF), 0),
        (word(VC, error=0x72), 0),
    ],
)
def test_what_comes_back_after_an_interrupted_delivery(machine, info, again):
    assert io.reinjection(info) == again
    machine.vcpus[0].vmcb.exit_int_info = info
    outcome = machine.apply(Schedule())
    injected = outcome.first(Injected)
    assert (injected.event if injected else 0) == again
    assert machine.vcpus[0].vmcb.exit_int_info == 0


@given(st.integers(0, (1 << 64) - 1))
def test_any_exitintinfo_is_reinjected_as_an_event_that_vmrun_takes_or_not_at_all(info):
    again = io.reinjection(info)
    assert again == 0 or (again & EVENT_VALID and again & 0xFFFF_FFFF == info & 0xFFFF_FFFF)


def test_an_event_that_waits_goes_before_an_interrupt(machine):
    apic = io.devices(machine, machine.vcpus[0]).lapics[0]
    apic.write(0xF0, 0x1FF, 0)
    apic.accept(0x41)
    machine.apply(SetRegisters(0, (("rflags", 0x202),)))
    machine.vcpus[0].vmcb.exit_int_info = word(0x33, EventType.INTERRUPT)
    assert machine.apply(Schedule()).first(Injected).event & 0xFF == 0x33
    assert machine.apply(Schedule()).first(Injected).event & 0xFF == 0x41
    assert machine.apply(Schedule()).first(Injected) is None


def test_the_interrupt_shadow_defers_to_a_window(machine):
    apic = io.devices(machine, machine.vcpus[0]).lapics[0]
    apic.write(0xF0, 0x1FF, 0)
    apic.accept(0x41)
    machine.apply(SetRegisters(0, (("rflags", 0x202), ("rip", 0x1000))))
    vmcb = machine.vcpus[0].vmcb
    vmcb.interrupt_state = 1
    assert machine.apply(Schedule()).first(Injected) is None
    assert vmcb.vintr & 1 << 8
    machine.apply(CpuExit(0, ExitCode.CPUID, 0, 0, b"\x0f\xa2", 0))  # the instruction in the shadow
    assert vmcb.vintr & 1 << 8 == 0
    assert apic.isr == 1 << 0x41


def test_an_encrypted_guest_shows_if_only_in_the_vmcb(machine):
    apic = io.devices(machine, machine.vcpus[0]).lapics[0]
    apic.write(0xF0, 0x1FF, 0)
    apic.accept(0x41)
    encrypted(machine)
    machine.apply(SetRegisters(0, (("rflags", 0x202),)))
    assert machine.apply(Schedule()).first(Injected) is None
    machine.vcpus[0].vmcb.interrupt_state = 2
    assert machine.apply(Schedule()).first(Injected).event == word(0x41, EventType.INTERRUPT)


def test_a_feature_may_filter_what_the_guest_gets():
    """The hook of restricted and alternate injection."""

    class Restricting:
        """Turns every event into #HV."""

        @staticmethod
        @hookimpl
        def sevlab_register(builder):
            builder.slot("inject_filter", lambda machine, vcpu, asked: word(Vector.HV))

    machine = make_machine("io", given={"x": Restricting()}, guests=1)
    io.inject_exception(machine, machine.vcpus[0], UD)
    assert machine.apply(Schedule()).first(Injected) == Injected(0, word(Vector.HV))
