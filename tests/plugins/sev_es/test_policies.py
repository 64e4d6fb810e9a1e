"""What differs between hypervisors, scratch areas outside the page, hypercalls, and races on a request."""

from __future__ import annotations

import pytest
from sevlab.core.config import GuestConfig
from sevlab.core.events import MemoryWrite, Party, Race, Resumed, Space, Stopped
from sevlab.core.hookspecs import hookimpl
from sevlab.core.hypercall import HypercallEnd
from sevlab.core.svm import ExitCode
from sevlab.core.testing import make_machine
from sevlab.plugins import io
from sevlab.plugins.sev import Policy, launch_guest
from sevlab.plugins.sev_es import (
    Ghcb,
    GhcbReply,
    HypervPage,
    NaeCode,
    Reason,
    Vmgexit,
    VmgexitIgnored,
    initial_vmsa,
    set_up_vcpus,
    vm_protocol,
)

from tests.plugins.sev_es.guests import GHCB_GPA, encrypted_machine, page

OUTS = 0x80_0214
LAPIC_TPR = 0xFEE0_0080
KVM_ENOSYS = (1 << 64) - 1000


@pytest.fixture(scope="module")
def machines():
    return {checks: encrypted_machine(checks=checks) for checks in ("kvm-2026", "kvm-6.12")}


@pytest.fixture
def newest(machines):
    yield machines["kvm-2026"]
    machines["kvm-2026"].reset()


@pytest.fixture
def older(machines):
    yield machines["kvm-6.12"]
    machines["kvm-6.12"].reset()


def ask(machine, data):
    return machine.apply(Vmgexit(0, GHCB_GPA, data)).first(GhcbReply)


def result(machine, data):
    reply = ask(machine, data)
    return (reply.info_1, reply.info_2)


# Releases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "expected"), [(8, (0, 0)), (9, (2, Reason.INVALID_INPUT)), (2033, (2, Reason.INVALID_INPUT))]
)
def test_the_newest_release_limits_mmio_to_eight_bytes_in_version_2(newest, length, expected):
    data = page(NaeCode.MMIO_READ, 0xD000_0000, length, sw_scratch=GHCB_GPA + 0x800)
    assert result(newest, data) == expected


@pytest.mark.parametrize(("length", "expected"), [(9, (0, 0)), (2032, (0, 0)), (2033, (2, Reason.INVALID_SCRATCH))])
def test_an_older_release_takes_any_length_that_fits(older, newest, length, expected):
    data = page(NaeCode.MMIO_READ, 0xD000_0000, length, sw_scratch=GHCB_GPA + 0x800)
    assert result(older, data) == expected
    version_1 = page(NaeCode.MMIO_READ, 0xD000_0000, length, sw_scratch=GHCB_GPA + 0x800, version=1)
    assert result(newest, version_1) == expected


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("checks", ["kvm-2026", "kvm-6.12"])
def test_scratch_outside_the_page_is_for_version_1_and_older_releases(machines, checks, version):
    machine = machines[checks]
    machine.reset()
    data = page(ExitCode.IOIO, OUTS, 4, sw_scratch=0x9000, version=version)
    legal = version == 1 or checks == "kvm-6.12"
    assert result(machine, data) == ((0, 0) if legal else (2, Reason.INVALID_SCRATCH))


@pytest.mark.parametrize(
    ("gpa", "count", "legal"),
    [(GHCB_GPA + 0x7FF, 1, False), (GHCB_GPA + 0x800, 1, True), (GHCB_GPA + 0xFEF, 1, True),
     (GHCB_GPA + 0xFEF, 2, False),
     (GHCB_GPA + 0xFF0, 1, False), (GHCB_GPA, 1, False), (0x9000, 65536, True), (0x9000, 65537, False),
     ((1 << 64) - 8, 8, False), ((1 << 64) - 8, 16, False), (1 << 50, 8, False), (0xF_FFFF, 1, True),
     (0xF_FFFF, 2, False)],
)  # fmt: skip
def test_the_edges_of_the_scratch_area_in_version_1(newest, gpa, count, legal):
    data = page(ExitCode.IOIO, OUTS, count, sw_scratch=gpa, version=1)
    assert result(newest, data) == ((0, 0) if legal else (2, Reason.INVALID_SCRATCH))


def test_an_unregistered_page_ends_the_run_of_an_older_release(older):
    vm_protocol(older, older.vcpus[0]).snp = True
    outcome = older.apply(Vmgexit(0, GHCB_GPA, page(ExitCode.CPUID, rax=0, rcx=0)))
    assert "not registered" in outcome.first(Stopped).reason


@pytest.mark.unverified
def test_hyperv_pages_are_understood_only_where_the_switch_says_so(newest):
    data = HypervPage.build(call_code=0x1234, output_gpa=0x7000)[:0xFFC] + (1).to_bytes(4, "little")
    assert result(newest, data) == (2, Reason.INVALID_USAGE)
    machine = encrypted_machine(usage="hyperv")
    outcome = machine.apply(Vmgexit(0, GHCB_GPA, data))
    assert "0x1234" in outcome.first(VmgexitIgnored).reason
    assert outcome.first(Resumed) is not None
    spa = machine.access.translate_gpa(machine.vcpus[0], GHCB_GPA)
    assert HypervPage.from_bytes(machine.memory.read(spa, 4096, None)).call_code == 2
    returns = machine.apply(Vmgexit(0, GHCB_GPA, data[:0xFFC] + (2).to_bytes(4, "little")))
    assert "VTL" in returns.first(VmgexitIgnored).reason
    assert result(machine, data[:0xFFC] + (3).to_bytes(4, "little")) == (2, Reason.INVALID_USAGE)
    assert result(machine, data[:0xFFC] + b"\xff" * 4) == (2, Reason.INVALID_USAGE)


def hyperv_call(machine, code, data=b"", *, fast=0, count=0):
    """The result word of a hypercall by the page."""
    raw = HypervPage.build(hypercall_data=data.ljust(4072, b"\0"), call_code=code, fast=fast, element_count=count)
    machine.apply(Vmgexit(0, GHCB_GPA, raw[:0xFFC] + (1).to_bytes(4, "little")))
    spa = machine.access.translate_gpa(machine.vcpus[0], GHCB_GPA)
    return int.from_bytes(machine.memory.read(spa + 0xFF0, 8, None), "little")


def test_hyperv_calls_go_to_whoever_owns_hypercalls():
    """Xen's Hyper-V personality serves an IPI and a flush; it reads the input from the GHCB page itself."""
    machine = make_machine(
        *("io", "sme", "sev", "sev_es", "xen"),
        guests=(GuestConfig(memory_bytes=1 << 20),),
        options={"sev_es": {"usage": "hyperv"}, "xen": {"viridian": True}},
    )
    launch_guest(machine, 0, policy=Policy.ES, vmsas=[initial_vmsa()])
    set_up_vcpus(machine, 0)
    machine.hypervisor.enter(machine, machine.vcpus[0])
    apic = io.devices(machine, machine.vcpus[0]).lapics[0]
    apic.write(0xF0, 0x1FF, 0)
    ipi = (0x40).to_bytes(8, "little") + (1).to_bytes(8, "little")
    assert hyperv_call(machine, 0x0B, ipi) == 0
    assert apic.irr >> 0x40 & 1
    assert hyperv_call(machine, 0x0B, (0x0F).to_bytes(8, "little") + ipi[8:]) == 5
    assert hyperv_call(machine, 0x03, bytes(24), count=3) == 3 << 32
    assert hyperv_call(machine, 0x0B, ipi, fast=1) == 3
    assert hyperv_call(machine, 0x1234) == 2


def test_an_owner_of_another_abi_knows_no_hyperv_call():
    class Other:
        @staticmethod
        @hookimpl
        def sevlab_register(builder):
            def owner(_machine, _vcpu, frame):
                frame.registers.rax = KVM_ENOSYS
                frame.written.add("rax")
                return HypercallEnd.COMPLETED

            builder.slot("hypercall", owner)

    assert hyperv_call(encrypted_machine(usage="hyperv", given={"other": Other()}), 0x0B) == 2


# Races ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("sw_exit_code", 0x7C), ("sw_scratch", 0x9000), ("sw_exit_info_1", 0xD000_0000), ("sw_exit_info_2", 2000),
     ("valid_bitmap", 0), ("ghcb_usage", 7)],
)  # fmt: skip
@pytest.mark.parametrize("fetch", [2, 3, 4])
def test_what_changes_after_the_one_fetch_changes_nothing(newest, name, value, fetch):
    info = Ghcb.FIELDS[name]
    spa = newest.access.translate_gpa(newest.vcpus[0], GHCB_GPA) + info.offset
    data = page(NaeCode.MMIO_WRITE, LAPIC_TPR, 4, sw_scratch=GHCB_GPA + 0x800, shared_buffer=b"\x30".ljust(2032, b"\0"))
    newest.apply(Race(fetch, spa, value.to_bytes(info.length_bytes, "little")))
    reply = ask(newest, data)
    assert (reply.exit_code, reply.info_1, reply.info_2) == (NaeCode.MMIO_WRITE, 0, 0)
    assert io.devices(newest, newest.vcpus[0]).lapics[0].register(0x80) == 0x30


def test_what_changes_before_the_fetch_is_what_counts(newest):
    spa = newest.access.translate_gpa(newest.vcpus[0], GHCB_GPA)
    newest.apply(Race(1, spa + 0x390, (0x9999).to_bytes(8, "little")))
    assert result(newest, page(ExitCode.WBINVD)) == (2, Reason.INVALID_EVENT)


def test_a_request_in_a_page_that_turned_private_is_ciphertext(newest):
    newest.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, GHCB_GPA, True, page(ExitCode.WBINVD)))
    assert result(newest, b"")[0] == 2


# Hypercalls and NMI -----------------------------------------------------------------------------------------------


class Abi:
    """A hypercall ABI: RAX 1 adds RBX and RCX, 2 takes three goes."""

    def __init__(self):
        self.seen = []

    @hookimpl
    def sevlab_register(self, builder):
        builder.slot("hypercall", self.call)

    def call(self, machine, vcpu, frame):
        self.seen.append((frame.given, frame.cpl))
        regs = frame.registers
        if frame.missing("rbx", "rcx"):
            return HypercallEnd.MISSING_INPUT
        if regs.rax == 2 and len(self.seen) < 3:
            return HypercallEnd.PREEMPTED
        regs.rax, regs.rdx, regs.rsi = regs.rbx + regs.rcx, 7, 8
        frame.written |= {"rax", "rdx", "rsi"}
        return HypercallEnd.COMPLETED


def test_a_hypercall_gets_the_given_registers_and_returns_what_its_abi_writes():
    abi = Abi()
    machine = encrypted_machine(plugins=("sme", "sev", "sev_es"), given={"abi": abi})
    reply = ask(machine, page(ExitCode.VMMCALL, rax=1, rbx=2, rcx=3, cpl=3))
    assert (reply.info_1, reply.rax, reply.rdx) == (0, 5, 7)
    marked = int.from_bytes(reply.valid, "little")
    assert marked >> 102 & 1  # RSI, which this ABI returns
    assert not marked >> 99 & 1  # RBX, which it does not
    assert abi.seen == [(frozenset({"rax", "rbx", "rcx"}), 3)]
    assert result(machine, page(ExitCode.VMMCALL, rax=1, rbx=2, cpl=0)) == (2, Reason.MISSING_INPUT)
    abi.seen.clear()
    assert ask(machine, page(ExitCode.VMMCALL, rax=2, rbx=2, rcx=3, cpl=0)).rax == 5
    assert len(abi.seen) == 3


def test_without_an_abi_a_hypercall_is_not_known():
    machine = encrypted_machine(plugins=("sme", "sev", "sev_es"))
    assert ask(machine, page(ExitCode.VMMCALL, rax=1, cpl=0)).rax == KVM_ENOSYS


def test_nmi_complete_opens_nmis_again(newest):
    apic = io.devices(newest, newest.vcpus[0]).lapics[0]
    apic.nmi_blocked = True
    assert result(newest, page(NaeCode.NMI_COMPLETE)) == (0, 0)
    assert not apic.nmi_blocked


def test_ins_returns_what_the_port_gave_and_a_record_of_it(newest):
    ask(newest, page(ExitCode.IOIO, 0x70_0210, rax=0x0B))
    reply = ask(newest, page(ExitCode.IOIO, 0x71_021D, 3, sw_scratch=GHCB_GPA + 0x800))
    assert len(reply.data) == 3
    assert len(set(reply.data)) == 1
