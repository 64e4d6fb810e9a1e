"""A whole boot-like conversation of both sides, and the proof that nothing leaks: canaries and owner tags.

Guest and hypervisor are composed with the devices of `io` through the frozen tables alone.
"""

from __future__ import annotations

import random

import pytest
from sevlab.core.config import GuestConfig
from sevlab.core.cpu import GPR_NAMES
from sevlab.core.events import AdvanceClock, CpuExit, Injected, Refused, Schedule, SetRegisters, Stopped
from sevlab.core.memory import guest_tag
from sevlab.core.svm import EventType, ExitCode, event
from sevlab.core.testing import make_machine
from sevlab.plugins import io
from sevlab.plugins.sev import Policy, launch_guest
from sevlab.plugins.sev_es import (
    GhcbReply,
    GhcbRequest,
    GuestApHold,
    GuestFailed,
    GuestFault,
    GuestSetup,
    MsrReply,
    NaeCode,
    Terminated,
    VcDelivered,
    Vmgexit,
    initial_vmsa,
    set_up_vcpus,
)
from sevlab.plugins.sev_es.insn import decode, ioio_info

from tests.plugins.sev_es.guests import GHCB_GPA, page

LAPIC = 0xFEE0_0000
TEXT_GPA, TABLE_GPA = 0x8000, 0x9000
LINE = b"the console prints this line, and nothing else\n"
LONG_MODE = {"cs": (8, 0x29B, 0xFFFF_FFFF, 0), "efer": 0x1501}


class Conversation:
    """A guest whose unused registers are canaries; every step is followed by the search for them."""

    def __init__(self):
        self.machine = make_machine(
            "io", "sme", "sev", "sev_es",
            guests=(GuestConfig(memory_bytes=1 << 20, vcpus=2),),
            options={"sev_es": {"guest": "linux", "order": True}},
        )  # fmt: skip
        self.rng = random.Random(5)
        secret = self.rng.randbytes(4096 - 64)
        self.canaries = {secret[start : start + 16] for start in range(0, len(secret), 16)}
        self.shown = set()
        launch_guest(
            self.machine, 0, policy=Policy.ES, vmsas=[initial_vmsa()] * 2,
            loads={TEXT_GPA: LINE.ljust(64, b"\0") + secret, TABLE_GPA: b"\x00\x00\x00\x10".ljust(16, b"\0")},
        )  # fmt: skip
        set_up_vcpus(self.machine, 0)
        for vcpu in self.machine.vcpus.values():
            self.machine.hypervisor.enter(self.machine, vcpu)
            vcpu.system.cs, vcpu.system.efer = LONG_MODE["cs"], LONG_MODE["efer"]
        self.machine._records.clear()

    def apply(self, step):
        outcome = self.machine.apply(step)
        for record in outcome.records:
            assert not isinstance(record, (GuestFailed, GuestFault, Refused)), record
            assert type(record).__name__ != "OrderWarning", record
            if isinstance(record, GhcbRequest):
                self.shown |= {value.to_bytes(8, "little") for _, value in record.fields}
        self.nothing_leaked()
        return outcome

    def execute(self, code, insn, *, info_1=0, info_2=0, vcpu=0, **regs):
        """The guest executes `insn` with these registers, and canaries in all others."""
        values = {name: self.rng.getrandbits(64) for name in GPR_NAMES} | regs
        self.canaries |= {value.to_bytes(8, "little") for name, value in values.items() if name not in regs}
        if code == ExitCode.IOIO:
            info_1 = ioio_info(decode(insn, 64), values["rdx"] & 0xFFFF)
        self.apply(SetRegisters(vcpu, (*values.items(), ("rip", 0x1000))))
        outcome = self.apply(CpuExit(vcpu, code, info_1, info_2, insn, 0))
        assert outcome.first(VcDelivered) is not None
        assert self.machine.vcpus[vcpu].regs.rip == 0x1000 + len(insn)
        kept = {name: getattr(self.machine.vcpus[vcpu].regs, name) for name in values if name not in regs}
        return outcome, kept, values

    def nothing_leaked(self):
        """No canary, and no byte that is the guest's own, in any memory or VMCB that the hypervisor can read."""
        secret = self.canaries - self.shown
        for shared in self.machine.memory.pages.values():
            if shared.key is not None:
                continue
            assert guest_tag(0) not in (shared.tags or (shared.tag,))
            data = bytes(shared.data)
            assert not any(canary in data for canary in secret)
        for vcpu in self.machine.vcpus.values():
            control = vcpu.vmcb.to_bytes()
            assert not any(canary in control for canary in secret)


def mmio_read(talk, offset):
    outcome, _, _ = talk.execute(0x400, b"\x8b\x07", info_1=0xD, info_2=LAPIC + offset, rdi=LAPIC + offset, rax=0)
    assert outcome.first(GhcbReply).exit_code == NaeCode.MMIO_READ
    return talk.machine.vcpus[0].regs.rax


def mmio_write(talk, offset, value):
    outcome, _, _ = talk.execute(0x400, b"\x89\x07", info_1=0xF, info_2=LAPIC + offset, rdi=LAPIC + offset, rax=value)
    codes = [record.exit_code for record in outcome.records if isinstance(record, GhcbReply) and record.vcpu == 0]
    assert codes == [NaeCode.MMIO_WRITE]
    return outcome


def negotiate(talk):
    outcome, _, _ = talk.execute(ExitCode.CPUID, b"\x0f\xa2", rax=1, rcx=0, rbx=0, rdx=0)
    assert sum(isinstance(record, MsrReply) for record in outcome.records) == 4
    assert talk.apply(GuestSetup(0, GHCB_GPA)).first(MsrReply).value >> 48 == 2
    assert talk.apply(Vmgexit(0, 0x080, b"")).first(MsrReply).value == 0x081


def cpuid_table(talk):
    for leaf in (0, 1, 0xD, 0x8000_001F):
        outcome, _, _ = talk.execute(ExitCode.CPUID, b"\x0f\xa2", rax=leaf, rcx=0, rbx=0, rdx=0)
        assert outcome.first(GhcbReply).info_1 == 0
        regs = talk.machine.vcpus[0].regs
        assert (regs.rax, regs.rbx, regs.rcx, regs.rdx) == talk.machine.cpuid(talk.machine.vcpus[0], leaf, 0)


def console(talk):
    for byte in LINE[:4]:
        _, kept, values = talk.execute(ExitCode.IOIO, b"\xee", rax=byte | 0xABCD_0000_1234_0000, rdx=0x3F8)
        assert all(values[name] == value for name, value in kept.items())
    outcome, _, _ = talk.execute(ExitCode.IOIO, b"\xf3\x6e", rsi=TEXT_GPA + 4, rcx=len(LINE) - 4, rdx=0x3F8)
    request = outcome.first(GhcbRequest)
    assert (request.data, request.info_2) == (LINE[4:], len(LINE) - 4)
    status, _, _ = talk.execute(ExitCode.IOIO, b"\xec", rdx=0x3FD, rax=0x5500)
    assert status.first(GhcbReply).rax & 0x20
    assert io.devices(talk.machine, talk.machine.vcpus[0]).uart.output == LINE


def device_and_msrs(talk):
    version = mmio_read(talk, 0x30)
    assert version & 0xFF == 0x14
    talk.execute(ExitCode.MSR, b"\x0f\x32", rcx=0x1B, rax=0, rdx=0)
    assert talk.machine.vcpus[0].regs.rax & ~0xFFF == LAPIC


def application_processor(talk):
    machine = talk.machine
    talk.apply(Vmgexit(0, GHCB_GPA, b""))  # a VMGEXIT without a request is refused, nothing more
    mmio_write(talk, 0x310, 1 << 24)
    mmio_write(talk, 0x300, 0x4500)
    mmio_write(talk, 0x300, 0x4608)
    assert not machine.vcpus[1].halted
    talk.apply(GuestSetup(1, GHCB_GPA + 0x1000))
    talk.apply(GuestApHold(1, TABLE_GPA))
    assert machine.vcpus[1].halted
    mmio_write(talk, 0x300, 0x4500)
    outcome = mmio_write(talk, 0x300, 0x4608)
    hold = next(record for record in outcome.records if isinstance(record, GhcbReply) and record.vcpu == 1)
    assert (hold.exit_code, hold.info_2) == (NaeCode.AP_RESET_HOLD, 1)
    assert (machine.vcpus[1].system.cs[0], machine.vcpus[1].regs.rip) == (0x1000, 0)


def timer_interrupt(talk):
    mmio_write(talk, 0x0F0, 0x1FF)
    mmio_write(talk, 0x3E0, 0xB)
    mmio_write(talk, 0x320, 0x30)
    mmio_write(talk, 0x380, 1000)
    talk.apply(SetRegisters(0, (("rflags", 0x202),)))
    talk.apply(AdvanceClock(1 << 32))
    outcome = talk.apply(CpuExit(0, ExitCode.INTR, 0, 0, b"", 0))
    assert outcome.first(Injected) == Injected(0, event(0x30, EventType.INTERRUPT))
    talk.apply(SetRegisters(0, (("rflags", 2),)))
    mmio_write(talk, 0x0B0, 0)


@pytest.mark.slow
def test_a_guest_boots_talks_and_ends_without_showing_anything_it_did_not_mark():
    talk = Conversation()
    negotiate(talk)
    cpuid_table(talk)
    console(talk)
    device_and_msrs(talk)
    application_processor(talk)
    timer_interrupt(talk)
    ended = talk.apply(Vmgexit(0, 0x100, b""))
    assert ended.first(Terminated)[1:] == (0, 0, 0x100)
    assert ended.first(Stopped) is not None
    assert len(talk.canaries - talk.shown) > 300


def test_a_guest_that_marks_too_much_is_caught():
    talk = Conversation()
    negotiate(talk)
    secret = 0x1122_3344_5566_7788
    talk.canaries.add(secret.to_bytes(8, "little"))
    with pytest.raises(AssertionError):
        talk.apply(Vmgexit(0, GHCB_GPA, page(ExitCode.WBINVD, rbx=secret)))


def test_a_private_page_copied_to_shared_memory_is_caught_by_its_owners_tag():
    talk = Conversation()
    machine = talk.machine
    spa = machine.access.translate_gpa(machine.vcpus[0], TEXT_GPA)
    key = machine.access.key_of(machine.vcpus[0].asid, c_bit=True)
    machine.access.guest_physical_write(machine.vcpus[0], 0x3000, b"mine", c_bit=True)
    assert machine.memory.tags(spa - TEXT_GPA + 0x3000, 1)[0] == guest_tag(0)
    data = machine.memory.read(spa - TEXT_GPA + 0x3000, 4, key)
    machine.memory.write_tagged(spa - TEXT_GPA + 0x4000, data, None, bytes((guest_tag(0),)) * 4)
    with pytest.raises(AssertionError):
        talk.nothing_leaked()
    assert machine.apply(Schedule()).records
