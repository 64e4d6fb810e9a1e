"""The reference guest: each event's request, its checks, hostile answers, nesting, and start-up."""

from __future__ import annotations

import pytest
from sevlab.core.cpu import Registers, SystemRegisters
from sevlab.core.events import CpuExit, Done, MemoryWrite, Party, Race, Refused, SetRegisters, Space, Stopped, VmExit
from sevlab.core.hookspecs import hookimpl
from sevlab.core.svm import ExitCode
from sevlab.core.testing import assert_resets
from sevlab.plugins import io
from sevlab.plugins.sev_es import (
    ForgeMsr,
    ForgeReply,
    GhcbReply,
    GhcbRequest,
    GuestApHold,
    GuestFailed,
    GuestFault,
    GuestReply,
    GuestSetup,
    MsrReply,
    NaeCode,
    NmiInside,
    Outcome,
    PageExit,
    Terminated,
    VcContext,
    VcResult,
    Vmgexit,
    handle,
)

from tests.plugins.sev_es.guests import GHCB_GPA, encrypted_machine, page

LONG = {"cs": (8, 0x29B, 0xFFFF_FFFF, 0), "efer": 0x1501}


def context(code, insn, profile="linux", cpl=0, system=None, **regs):
    made = SystemRegisters(cpl=cpl, **LONG, **(system or {}))
    return VcContext(code=code, insn=insn, regs=Registers(**regs), system=made, profile=profile)


def first(made):
    return next(handle(made))


def end(made, *answers):
    handler = handle(made)
    try:
        next(handler)
        for answer in answers:
            handler.send(answer)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("the handler asks more")


REQUESTS = [
    (0x6E, b"\x0f\x31", {}, PageExit(0x6E)),
    (0x87, b"\x0f\x01\xf9", {}, PageExit(0x87)),
    (0x6F, b"\x0f\x33", {"rcx": 3}, PageExit(0x6F, fields={"rcx": 3})),
    (0x72, b"\x0f\xa2", {"rax": 1, "rcx": 2}, PageExit(0x72, fields={"rax": 1, "rcx": 2, "xcr0": 1})),
    (0x7C, b"\x0f\x32", {"rcx": 5, "rax": 9}, PageExit(0x7C, 0, fields={"rcx": 5})),
    (0x7C, b"\x0f\x30", {"rcx": 5, "rax": 9}, PageExit(0x7C, 1, fields={"rcx": 5, "rax": 9, "rdx": 0})),
    (0x89, b"\x0f\x09", {}, PageExit(0x89)),
    (0x81, b"\x0f\x01\xd9", {"rax": 4}, PageExit(0x81, fields={"rax": 4, "cpl": 0})),
    (0x37, b"\x0f\x23\xf8", {"rax": 0xFFFF_FFFF}, PageExit(0x37, fields={"rax": 0xFFFF_27FF})),
    (0x7B, b"\xe4\x60", {}, PageExit(0x7B, 0x60_0211, fields={"rax": 0})),
    (0x7B, b"\x66\xed", {"rdx": 0xCF8}, PageExit(0x7B, 0xCF8_0221, fields={"rax": 0})),
    (0x7B, b"\xef", {"rdx": 0xCF8, "rax": 0x1_2345_6789}, PageExit(0x7B, 0xCF8_0240, fields={"rax": 0x2345_6789})),
    (0x7B, b"\xee", {"rdx": 0x3F8, "rax": 0x1234}, PageExit(0x7B, 0x3F8_0210, fields={"rax": 0x34})),
]


@pytest.mark.parametrize(("code", "insn", "regs", "request_"), REQUESTS)
def test_each_event_asks_for_what_it_needs_and_no_more(code, insn, regs, request_):
    assert first(context(code, insn, **regs)) == request_


def test_xcr0_is_sent_once_xsave_is_on():
    made = context(0x72, b"\x0f\xa2", system={"cr4": 1 << 18, "xcr0": 7})
    assert first(made).fields["xcr0"] == 7


@pytest.mark.parametrize(
    ("code", "insn"),
    [(0x72, b"\x0f\x31"), (0x7C, b"\x0f\xa2"), (0x7B, b"\x90"), (0x89, b"\x0f\x08"), (0x72, b"\x0f\xff")],
)
def test_a_code_that_the_instruction_cannot_raise_is_refused(code, insn):
    assert end(context(code, insn)).outcome is Outcome.UNSUPPORTED


def test_user_space_needs_its_io_permission():
    made = context(0x7B, b"\xee", cpl=3, rdx=0x3F8)
    assert end(made).fault.vector == 13
    made = context(0x7B, b"\xee", cpl=3, rdx=0x3F8)
    made.io_allowed = lambda port, size: (port, size) == (0x3F8, 1)
    assert isinstance(first(made), PageExit)
    assert end(context(0x400, b"\x8b\x07", cpl=3)).outcome is Outcome.UNSUPPORTED


def test_dr7_is_the_handlers_own_and_an_upper_half_is_gp():
    made = context(0x27, b"\x0f\x21\xf9")
    made.dr7 = 0x455
    assert end(made).outcome is Outcome.DONE
    assert made.regs.rcx == 0x455
    assert end(context(0x37, b"\x0f\x23\xf8", rax=1 << 32)).fault.vector == 13


@pytest.mark.parametrize(
    ("info_1", "info_2", "expected"),
    [
        (0, 0, None),
        (1, 0x8000_030D, (13, 0)),
        (1, 0x18_8000_0B0D, (13, 0x18)),
        (1, 0x8000_0306, (6, 0)),
        (1, 0x0000_030D, Outcome.VMM_ERROR),
        (1, 0x8000_000D, Outcome.VMM_ERROR),
        (1, 0x8000_020D, Outcome.VMM_ERROR),
        (1, 0x8000_040D, Outcome.VMM_ERROR),
        *((1, 0x8000_0300 | vector, Outcome.VMM_ERROR) for vector in range(32) if vector not in (6, 13)),
        (2, 6, Outcome.VMM_ERROR),
        (2, 0, Outcome.VMM_ERROR),
        (7, 0, Outcome.VMM_ERROR),
        (1 << 32, 0, None),
    ],
)
def test_only_sane_exceptions_are_taken_from_the_hypervisor(info_1, info_2, expected):
    result = end(context(0x89, b"\x0f\x09"), GuestReply(info_1, info_2))
    if expected is None:
        assert result == VcResult(Outcome.DONE, 2)
    elif isinstance(expected, tuple):
        assert (result.outcome, result.fault[:2]) == (Outcome.EXCEPTION, expected)
    else:
        assert result.outcome is expected
    edk2 = end(context(0x89, b"\x0f\x09", "edk2"), GuestReply(info_1, info_2))
    assert (edk2.outcome is Outcome.DONE) == (expected is None)
    assert expected is None or edk2.fault.vector in (6, 13)


@pytest.mark.parametrize(
    ("code", "insn", "needed"),
    [(0x72, b"\x0f\xa2", "rax rbx rcx rdx"), (0x6E, b"\x0f\x31", "rax rdx"), (0x87, b"\x0f\x01\xf9", "rax rdx rcx"),
     (0x6F, b"\x0f\x33", "rax rdx"), (0x7C, b"\x0f\x32", "rax rdx"), (0x81, b"\x0f\x01\xd9", "rax"),
     (0x7B, b"\xe4\x60", "rax")],
)  # fmt: skip
def test_every_register_that_is_taken_must_come_back_valid(code, insn, needed):
    names = needed.split()
    full = dict.fromkeys(names, 4294967301)
    assert end(context(code, insn), GuestReply(0, 0, full)).outcome is Outcome.DONE
    for name in names:
        less = {key: value for key, value in full.items() if key != name}
        assert end(context(code, insn), GuestReply(0, 0, less)).outcome is Outcome.VMM_ERROR


@pytest.mark.parametrize(
    ("insn", "before", "after"),
    [(b"\xe4\x60", 0x1111_1111_1111_1111, 0x1111_1111_1111_1188), (b"\x66\xe5\x60", 0x11_1111_1111, 0x11_1111_7788),
     (b"\xe5\x60", 0x1111_1111_1111, 0x5566_7788)],
)  # fmt: skip
def test_in_changes_as_much_of_rax_as_its_width(insn, before, after):
    made = context(0x7B, insn, rax=before)
    end(made, GuestReply(0, 0, {"rax": 0x1122_3344_5566_7788}))
    assert made.regs.rax == after


def test_a_long_outs_goes_in_pieces_of_the_shared_buffer():
    memory = bytes(index & 0xFF for index in range(5000))
    made = context(0x7B, b"\xf3\x6e", rdx=0x3F8, rsi=0, rcx=5000)
    made.read = lambda linear, count: memory[linear : linear + count]
    sizes = []
    while True:
        handler = handle(made)
        request = next(handler)
        sizes.append(request.info_2)
        assert request.data == memory[made.regs.rsi :][: request.info_2]
        assert request.scratch
        with pytest.raises(StopIteration) as stop:
            handler.send(GuestReply(0, 0))
        if stop.value.value.outcome is Outcome.DONE:
            break
        assert stop.value.value.outcome is Outcome.RETRY
    assert sizes == [2032, 2032, 936]
    assert (made.regs.rsi, made.regs.rcx) == (5000, 0)


def test_ins_stores_what_came_back_backwards_where_df_says_so():
    stored = {}
    made = context(0x7B, b"\xf3\x66\x6d", rdx=0x1F0, rdi=0x100, rcx=3, rflags=0x400)
    made.write = lambda linear, data: stored.update({linear: data})
    assert end(made, GuestReply(0, 0, {}, b"aabbcc")).outcome is Outcome.DONE
    assert stored == {0x100: b"aa", 0xFE: b"bb", 0xFC: b"cc"}
    assert (made.regs.rdi, made.regs.rcx) == (0xFA, 0)


MMIO = [
    (b"\x89\x07", PageExit(NaeCode.MMIO_WRITE, 0xFEE0_0000, 4, data=b"\x44\x33\x22\x11", scratch=True), None),
    (b"\x88\x27", PageExit(NaeCode.MMIO_WRITE, 0xFEE0_0000, 1, data=b"\x33", scratch=True), None),
    (b"\xc7\x07\x01\x02\x03\x04", PageExit(NaeCode.MMIO_WRITE, 0xFEE0_0000, 4, data=b"\1\2\3\4", scratch=True), None),
    (b"\x8b\x07", PageExit(NaeCode.MMIO_READ, 0xFEE0_0000, 4, scratch=True, buffer_bytes=4), 0x8483_8281),
    (b"\x8a\x07", PageExit(NaeCode.MMIO_READ, 0xFEE0_0000, 1, scratch=True, buffer_bytes=1), 0x1122_3381),
    (b"\x0f\xb7\x07", PageExit(NaeCode.MMIO_READ, 0xFEE0_0000, 2, scratch=True, buffer_bytes=2), 0x8281),
    (b"\x48\x0f\xbe\x07", PageExit(NaeCode.MMIO_READ, 0xFEE0_0000, 1, scratch=True, buffer_bytes=1), (1 << 64) - 0x7F),
    (b"\x48\x8b\x07", PageExit(NaeCode.MMIO_READ, 0xFEE0_0000, 8, scratch=True, buffer_bytes=8), 0x8887_8685_8483_8281),
]


@pytest.mark.parametrize(("insn", "request_", "rax"), MMIO, ids=[row[0].hex() for row in MMIO])
def test_mmio_is_decoded_as_linux_does(insn, request_, rax):
    made = context(0x400, insn, rdi=0x1000, rax=0x1122_3344)
    made.translate = lambda linear, write: (linear - 0x1000 + 0xFEE0_0000, False)
    assert first(made) == request_
    result = end(made, GuestReply(0, 0, {}, bytes(range(0x81, 0x81 + request_.buffer_bytes))))
    assert result == VcResult(Outcome.DONE, len(insn))
    assert rax is None or made.regs.rax == rax


@pytest.mark.parametrize("insn", [b"\x01\x07", b"\x87\x07", b"\xaa", b"\xa1" + bytes(8)])
def test_mmio_that_linux_does_not_decode_is_refused(insn):
    made = context(0x400, insn, rdi=0x1000)
    made.translate = lambda linear, write: (0xFEE0_0000, False)
    assert end(made).outcome is Outcome.UNSUPPORTED


def test_mmio_in_private_memory_is_refused_and_edk2_takes_moffs():
    made = context(0x400, b"\x8b\x07", rdi=0x1000)
    made.translate = lambda linear, write: (0x1000, True)
    assert end(made).outcome is Outcome.UNSUPPORTED
    made = context(0x400, b"\xa1\x00\x00\xe0\xfe\x00\x00\x00\x00", "edk2")
    made.translate = lambda linear, write: (linear, False)
    assert first(made).info_1 == 0xFEE0_0000


def test_movs_reads_one_side_and_writes_the_other():
    made = context(0x400, b"\xf3\xa4", rsi=0xD000_0000, rdi=0x2000, rcx=2)
    made.translate = lambda linear, write: (linear, linear < 0x1000_0000)
    stored = {}
    made.write = lambda linear, data: stored.update({linear: data})
    assert end(made, GuestReply(0, 0, {}, b"x")).outcome is Outcome.RETRY
    assert stored == {0x2000: b"x"}
    assert (made.regs.rsi, made.regs.rdi, made.regs.rcx) == (0xD000_0001, 0x2001, 1)


def test_what_needs_no_exit_makes_none_and_edk2_differs():
    assert end(context(0x8A, b"\x0f\x01\xc8")).outcome is Outcome.DONE
    assert first(context(0x8A, b"\x0f\x01\xc8", "edk2")).fields == {"rax": 0, "rcx": 0, "rdx": 0}
    assert end(context(0x76, b"\x0f\x08")).outcome is Outcome.UNSUPPORTED
    assert first(context(0x76, b"\x0f\x08", "edk2")) == PageExit(0x76)
    assert end(context(0x41, b"\x90")).outcome is Outcome.FORWARD
    assert end(context(0x404, b"\x90")).outcome is Outcome.UNSUPPORTED
    assert first(context(0x66, b"\x90", "edk2")) == PageExit(NaeCode.UNSUPPORTED, 0x66)


# On a vCPU --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_machine():
    machine = encrypted_machine(vcpus=2, guest="linux")
    for vcpu in machine.vcpus.values():
        vcpu.system.cs, vcpu.system.efer = LONG["cs"], LONG["efer"]
    machine.apply(GuestSetup(0, GHCB_GPA))
    machine.apply(GuestSetup(1, GHCB_GPA + 0x1000))
    machine.mark()
    return machine


@pytest.fixture
def machine(shared_machine):
    yield shared_machine
    shared_machine.reset()


def cpuid(machine, leaf=0x8000_001F):
    machine.apply(SetRegisters(0, (("rax", leaf), ("rcx", 0), ("rip", 0x1000))))
    return machine.apply(CpuExit(0, ExitCode.CPUID, 0, 0, b"\x0f\xa2", 0))


def image_of(machine, gpa=GHCB_GPA):
    return machine.memory.read(machine.access.translate_gpa(machine.vcpus[0], gpa), 4096, None)


def test_a_vc_is_served_through_the_page(machine):
    outcome = cpuid(machine)
    assert outcome.first(GhcbRequest).exit_code == ExitCode.CPUID
    regs = machine.vcpus[0].regs
    assert (regs.rax, regs.rbx, regs.rcx, regs.rdx) == machine.cpuid(machine.vcpus[0], 0x8000_001F, 0)
    assert regs.rip == 0x1002
    assert image_of(machine)[0x3F0:0x400] == bytes(16)


def test_before_the_set_up_cpuid_goes_over_the_msr_and_anything_else_ends_the_guest():
    machine = encrypted_machine(guest="linux")
    outcome = cpuid(machine)
    assert [record.request for record in outcome.records if isinstance(record, MsrReply)] == [
        0x8000_001F << 32 | register << 30 | 4 for register in range(4)
    ]
    assert machine.vcpus[0].regs.rip == 0x1002
    outcome = machine.apply(CpuExit(0, ExitCode.IOIO, 0x3F8_0210, 0, b"\xee", 0))
    assert outcome.first(Terminated)[1:3] == (0, 0)


@pytest.mark.parametrize(
    ("answer", "legal"),
    [(0x0002_0001_3300_0001, True), (0x0001_0001_3300_0001, True), (0x0003_0003_3300_0001, False),
     (0x0009_0002_0000_0001, True), (0x0000_0000_3300_0001, False),
     (0x0001_0002_3300_0005, False), (2, False), (0, False)],
)  # fmt: skip
def test_negotiation_refuses_versions_that_do_not_meet(answer, legal):
    machine = encrypted_machine(guest="linux")
    machine.apply(ForgeMsr(0, answer))
    outcome = machine.apply(GuestSetup(0, GHCB_GPA))
    assert (outcome.first(Done) is not None) == legal
    if not legal:
        assert outcome.first(Terminated)[1:3] == (0, 1)


HOSTILE = [
    ("no valid bits", 0x3F0, bytes(16), GuestFailed),
    ("no RBX", 0x3F0 + 12, b"\x06", GuestFailed),
    ("an illegal vector", 0x398, b"\1" + bytes(7) + b"\x0e\x03\0\x80" + bytes(4), GuestFailed),
    ("a hardware interrupt", 0x398, b"\1" + bytes(7) + b"\x20\0\0\x80" + bytes(4), GuestFailed),
    ("an unknown result", 0x398, b"\x09", GuestFailed),
    ("#GP", 0x398, b"\1" + bytes(7) + b"\x0d\x03\0\x80" + bytes(4), GuestFault),
]


@pytest.mark.parametrize(("offset", "data", "kind"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_a_hostile_reply_changes_no_register(machine, offset, data, kind):
    before = cpuid(machine), machine.vcpus[0].regs.rbx
    machine.apply(ForgeReply(0, offset, data))
    machine.apply(SetRegisters(0, (("rbx", 0x77),)))
    outcome = cpuid(machine)
    assert outcome.first(kind) is not None
    regs = machine.vcpus[0].regs
    assert (regs.rax, regs.rbx, regs.rip) == (0x8000_001F, 0x77, 0x1000)
    assert before[1] != 0x77
    assert cpuid(machine).first(GuestFailed) is None


def test_the_exit_code_changed_between_fetches_changes_nothing():
    machine = encrypted_machine(guest="linux")
    machine.vcpus[0].system.cs, machine.vcpus[0].system.efer = LONG["cs"], LONG["efer"]
    machine.apply(GuestSetup(0, GHCB_GPA))
    spa = machine.access.translate_gpa(machine.vcpus[0], GHCB_GPA)
    for fetch in range(2, 6):
        machine.apply(Race(fetch, spa + 0x390, (0x7C).to_bytes(8, "little")))
        reply = cpuid(machine).first(GhcbReply)
        assert (reply.exit_code, reply.info_1) == (0x72, 0)


def test_a_ghcb_page_that_turned_private_shows_no_request(machine):
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, GHCB_GPA, True, b"s" * 4096))
    reply = machine.apply(Vmgexit(0, GHCB_GPA, b"")).first(GhcbReply)
    assert reply.info_1 == 2


# Nesting ----------------------------------------------------------------------------------------------------------


def test_an_nmi_inside_keeps_the_interrupted_request_by_the_backup(machine):
    machine.apply(NmiInside(0, ExitCode.RDTSC, 0, b"\x0f\x31"))
    outcome = cpuid(machine)
    codes = [record.exit_code for record in outcome.records if isinstance(record, GhcbReply)]
    assert codes == [ExitCode.RDTSC, NaeCode.NMI_COMPLETE, ExitCode.CPUID]
    regs = machine.vcpus[0].regs
    assert (regs.rax, regs.rbx, regs.rcx, regs.rdx) == machine.cpuid(machine.vcpus[0], 0x8000_001F, 0)


def test_a_third_level_finds_both_pages_in_use(machine):
    machine.apply(NmiInside(0, ExitCode.RDTSC, 0, b"\x0f\x31"))
    machine.apply(NmiInside(0, ExitCode.RDTSC, 0, b"\x0f\x31"))
    assert "both in use" in cpuid(machine).first(GuestFailed).reason
    assert cpuid(machine).first(GuestFailed) is None


# Start-up ---------------------------------------------------------------------------------------------------------

ICR_LOW, ICR_HIGH = 0xFEE0_0300, 0xFEE0_0310


def ipi(machine, command, apic_id=1):
    io.mmio_write(machine, machine.vcpus[0], ICR_HIGH, 4, apic_id << 24)
    io.mmio_write(machine, machine.vcpus[0], ICR_LOW, 4, command)
    records = tuple(machine._records)
    machine._records.clear()
    return records


INIT, STARTUP = 0x0000_4500, 0x0000_4608


@pytest.mark.parametrize("with_page", [True, False])
def test_an_ap_goes_from_reset_hold_to_its_jump_table(with_page):
    machine = encrypted_machine(vcpus=2, guest="linux")
    boot, other = machine.vcpus[0], machine.vcpus[1]
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, 0x9000, True, b"\x34\x12\x00\x20"))
    machine.apply(GuestSetup(0, GHCB_GPA))
    table = Vmgexit(0, GHCB_GPA, page(NaeCode.AP_JUMP_TABLE, 0, 0x9000))
    assert machine.apply(table).first(GhcbReply).info_1 == 0
    assert machine.components["sev_es"].vms[0].jump_table_gpa == 0x9000
    ipi(machine, INIT)
    assert other.halted
    ipi(machine, STARTUP)  # the first one runs the AP from its launch state
    assert not other.halted
    if with_page:
        machine.apply(GuestSetup(1, GHCB_GPA + 0x1000))
    outcome = machine.apply(GuestApHold(1, 0x9000))
    assert other.halted
    assert outcome.first(GhcbReply) is None
    assert machine.apply(Vmgexit(1, 2, b"")).first(Refused) is not None
    ipi(machine, INIT)
    records = ipi(machine, STARTUP)
    assert not other.halted
    answer = next(record for record in records if isinstance(record, GhcbReply if with_page else MsrReply))
    assert answer.info_2 == 1 if with_page else answer.value == 0x1007
    assert (other.system.cs, other.regs.rip) == ((0x2000, 0x9B, 0xFFFF, 0x2_0000), 0x1234)
    assert boot.system.cs[0] == 0xF000


def test_a_startup_ipi_to_an_ap_that_runs_is_lost():
    machine = encrypted_machine(vcpus=2)
    other = machine.vcpus[1]
    for _ in range(2):
        ipi(machine, INIT)
        ipi(machine, STARTUP)
    assert other.halted  # INIT stopped it, and it was not in reset hold
    assert other.regs.rip == 0xFFF0


# Replacing --------------------------------------------------------------------------------------------------------


def test_a_stranger_replaces_one_handler_of_each_side():
    def lie(machine, vcpu, ghcb, scratch):
        return original(machine, vcpu, ghcb, scratch)._replace(rax=0x42)

    original = None

    class Stranger:
        """CPUID at both sides."""

        @staticmethod
        @hookimpl
        def sevlab_register(builder):
            def make(event):
                nonlocal original
                original = event.handler
                return event._replace(handler=lie)

            builder.nae_events.replace(ExitCode.CPUID, make)
            builder.vc_handlers.replace(ExitCode.WBINVD, lambda _: refuse)

    def refuse(_context, _insn):
        return VcResult(Outcome.UNSUPPORTED, reason="not today")
        yield

    machine = encrypted_machine(guest="linux", given={"stranger": Stranger()})
    machine.vcpus[0].system.cs, machine.vcpus[0].system.efer = LONG["cs"], LONG["efer"]
    machine.apply(GuestSetup(0, GHCB_GPA))
    cpuid(machine)
    assert machine.vcpus[0].regs.rax == 0x42
    assert "not today" in machine.apply(CpuExit(0, 0x89, 0, 0, b"\x0f\x09", 0)).first(GuestFailed).reason


def test_guest_steps_for_no_guest_are_refused(machine):
    for step in (GuestSetup(9, GHCB_GPA), GuestSetup(0, 0x5001), GuestApHold(9, 0), NmiInside(9, 0, 0, b"")):
        assert machine.apply(step).first(Refused) is not None
    for step in (ForgeReply(9, 0, b""), ForgeReply(0, 4096, b"x"), ForgeMsr(9, 0)):
        assert machine.apply(step).first(Refused) is not None


def test_a_guest_without_an_answer_stops(machine):
    outcome = machine.apply(Vmgexit(0, 0x100, b""))
    assert outcome.first(Stopped) is not None
    assert outcome.first(VmExit).exit_code == ExitCode.VMGEXIT


def test_conversations_reset(machine):
    assert_resets(
        machine,
        SetRegisters(0, (("rax", 0x8000_001F), ("rcx", 0), ("rip", 0x1000))),
        NmiInside(0, ExitCode.RDTSC, 0, b"\x0f\x31"),
        CpuExit(0, ExitCode.CPUID, 0, 0, b"\x0f\xa2", 0),
        ForgeReply(0, 0x398, b"\x09"),
        CpuExit(0, ExitCode.CPUID, 0, 0, b"\x0f\xa2", 0),
        GuestApHold(1, 0),
    )


def test_a_hypercall_passes_the_registers_of_its_abi_and_takes_those_that_come_back():
    made = context(0x81, b"\x0f\x01\xd9", rax=7, rdi=1, rsi=2, rdx=3)
    made.hypercall_registers = ("rdi", "rsi")
    request = PageExit(0x81, fields={"rax": 7, "cpl": 0, "rdi": 1, "rsi": 2}, returns=("rdi", "rsi"))
    assert first(made) == request
    result = end(made, GuestReply(0, 0, {"rax": 9, "rsi": 8, "rdx": 6}))
    assert (result.outcome, result.length) == (Outcome.DONE, 3)
    assert (made.regs.rax, made.regs.rdi, made.regs.rsi, made.regs.rdx) == (9, 1, 8, 3)
