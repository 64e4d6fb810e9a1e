"""VMGEXIT at the hypervisor: order of checks, replies, and that a refused request changes nothing of the guest."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.events import Refused, Resumed, Stopped, VmExit
from sevlab.core.svm import ExitCode
from sevlab.core.testing import assert_resets, make_machine
from sevlab.plugins.sev_es import (
    Ghcb,
    GhcbReply,
    MsrInfo,
    MsrReply,
    NaeCode,
    Reason,
    Vmgexit,
    VmgexitIgnored,
    vcpu_protocol,
    vm_protocol,
)

from tests.plugins.sev_es.guests import GHCB_GPA, encrypted_machine, page


@pytest.fixture(scope="module")
def shared_machine():
    return encrypted_machine()


@pytest.fixture
def machine(shared_machine):
    yield shared_machine
    shared_machine.reset()


def ask(machine, code, info_1=0, info_2=0, **fields):
    return machine.apply(Vmgexit(0, GHCB_GPA, page(code, info_1, info_2, **fields))).first(GhcbReply)


def reason(reply):
    assert reply.info_1 == 2
    return Reason(reply.info_2)


def test_cpuid_round_trip(machine):
    outcome = machine.apply(Vmgexit(0, GHCB_GPA, page(ExitCode.CPUID, rax=0x8000_001F, rcx=0, xcr0=1)))
    kinds = [type(record) for record in outcome.records]
    assert kinds == [VmExit, GhcbReply, Resumed]
    reply = outcome.first(GhcbReply)
    assert (reply.rax, reply.rbx, reply.rcx, reply.rdx) == machine.cpuid(machine.vcpus[0], 0x8000_001F, 0)
    image = Ghcb.from_bytes(machine.memory.read(machine.access.translate_gpa(machine.vcpus[0], GHCB_GPA), 4096, None))
    assert (image.rax, image.rbx, image.rcx, image.rdx) == reply[4:8]
    assert (image.sw_exit_info_1, image.sw_exit_info_2) == (0, 0)
    assert not image.is_valid("sw_exit_code")
    assert not image.is_valid("xcr0")


ORDER = [
    ("usage before everything", page(0x9999, usage=5)[:0x3F0] + bytes(16) + page(0x9999, usage=5)[0x400:], 2),
    ("exit code and infos before the event", Ghcb.build(sw_exit_code=0x9999, protocol_version=2), 4),
    ("required fields", page(ExitCode.CPUID), 4),
    ("unknown event", page(0x9999), 6),
    ("scratch", page(NaeCode.MMIO_READ, 0, 4, sw_scratch=0), 3),
]


@pytest.mark.parametrize(("data", "expected"), [row[1:] for row in ORDER], ids=[row[0] for row in ORDER])
def test_checks_come_in_the_documents_order(machine, data, expected):
    assert reason(machine.apply(Vmgexit(0, GHCB_GPA, data)).first(GhcbReply)) == expected


@pytest.mark.parametrize(("checks", "expected"), [("kvm-2026", 6), ("kvm-6.12", 4)])
def test_an_snp_event_of_another_guest_is_refused_as_the_release_does(checks, expected):
    from sevlab.core.hookspecs import hookimpl
    from sevlab.plugins.sev_es import DONE, NaeEvent

    class Snp:
        """An SNP-only event."""

        @staticmethod
        @hookimpl
        def sevlab_register(builder):
            builder.nae_events.add(0x8000_7777, NaeEvent("x", lambda *_: DONE, snp_only=True))

    machine = encrypted_machine(given={"x": Snp()}, checks=checks)
    assert reason(ask(machine, 0x8000_7777)) == expected
    vm_protocol(machine, machine.vcpus[0]).snp = True
    vcpu_protocol(machine, machine.vcpus[0]).registered_gpa = GHCB_GPA
    machine.slots.vmrun_enter = None
    assert ask(machine, 0x8000_7777).info_1 == 0


def test_gpa_zero_and_an_unmapped_page_are_logged_and_resumed(machine):
    for gpa, words in ((0, "not set"), (1 << 40, "cannot be mapped")):
        outcome = machine.apply(Vmgexit(0, gpa, b""))
        assert words in outcome.first(VmgexitIgnored).reason
        assert outcome.first(Resumed) is not None


def test_an_snp_guest_must_register_its_page(machine):
    vm_protocol(machine, machine.vcpus[0]).snp = True
    machine.slots.vmrun_enter, kept = None, machine.slots.vmrun_enter
    try:
        assert reason(ask(machine, ExitCode.CPUID, rax=0, rcx=0)) == Reason.NOT_REGISTERED
        registered = machine.apply(Vmgexit(0, GHCB_GPA | MsrInfo.REGISTER_GPA_REQUEST, b"")).first(MsrReply)
        assert registered.value == GHCB_GPA | MsrInfo.REGISTER_GPA_RESPONSE
        assert ask(machine, ExitCode.CPUID, rax=0, rcx=0).info_1 == 0
    finally:
        machine.slots.vmrun_enter = kept


def test_kvms_habit_returns_all_four_registers():
    machine = encrypted_machine(reply="all")
    reply = ask(machine, ExitCode.WBINVD, rax=7, rcx=8)
    assert (reply.rax, reply.rbx, reply.rcx, reply.rdx) == (7, 0, 8, 0)
    image = int.from_bytes(reply.valid, "little")
    assert image >> 63 & 1
    assert image >> 97 & 7 == 7


def test_a_version_1_hypervisor_knows_no_version_2_event():
    machine = encrypted_machine(protocol_max=1)
    assert reason(ask(machine, NaeCode.HV_FEATURES)) == Reason.INVALID_EVENT
    unchanged = machine.apply(Vmgexit(0, MsrInfo.HV_FEATURES_REQUEST, b"")).first(MsrReply)
    assert unchanged.value == MsrInfo.HV_FEATURES_REQUEST


def test_outside_an_encrypted_guest_vmgexit_is_vmmcall():
    machine = make_machine("io", "sme", "sev", "sev_es", guests=1)
    machine.vcpus[0].vmcb.intercept(ExitCode.VMMCALL)
    assert machine.apply(Vmgexit(0, 2, b"")).first(VmExit).exit_code == ExitCode.VMMCALL


def test_a_step_without_a_vcpu_or_with_too_long_a_page_is_refused(machine):
    assert machine.apply(Vmgexit(9, 2, b"")).first(Refused) is not None
    assert machine.apply(Vmgexit(0, GHCB_GPA, bytes(4097))).first(Refused) is not None
    assert machine.apply(Vmgexit(0, GHCB_GPA, bytes(4096))).first(GhcbReply) is not None


def test_vmgexits_reset(machine):
    cpuid = Vmgexit(0, GHCB_GPA, page(ExitCode.CPUID, rax=0, rcx=0))
    assert_resets(machine, Vmgexit(0, 2, b""), cpuid, Vmgexit(0, 0x6000, page(ExitCode.IOIO, 0x3F8_0210, rax=0x41)))


@given(seed=st.integers(), code=st.sampled_from((0x72, 0x7B, 0x7C, 0x8000_0001, 0x8000_0002, 0x8000_0005, 0x81)))
def test_any_page_gets_an_outcome_and_leaves_the_vcpu_as_it_was(shared_machine, seed, code):
    machine = shared_machine
    machine.reset()
    rng = random.Random(seed)
    image = bytearray(rng.randbytes(4096))
    if rng.random() < 0.8:
        image[0x390:0x398] = code.to_bytes(8, "little")
        image[0x3F0:0x400] = b"\xff" * 16
        image[0xFFC:] = bytes(4)
    vcpu = machine.vcpus[0]
    before = vcpu.regs._capture(vcpu.regs), vcpu.system._capture(vcpu.system)
    outcome = machine.apply(Vmgexit(0, GHCB_GPA, bytes(image)))
    assert outcome.first(GhcbReply) or outcome.first(Stopped) or vcpu.halted
    assert (vcpu.regs._capture(vcpu.regs), vcpu.system._capture(vcpu.system)) == before
    machine.reset()


@given(value=st.integers(0, (1 << 64) - 1) | st.integers(0, 0xFFF))
def test_any_msr_value_gets_an_outcome(shared_machine, value):
    machine = shared_machine
    machine.reset()
    outcome = machine.apply(Vmgexit(0, value, b""))
    assert outcome.first(MsrReply) or outcome.first(VmgexitIgnored) or outcome.first(Stopped) or value & 0xFFF == 0
    machine.reset()
