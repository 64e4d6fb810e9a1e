"""Every intercept in every mode whose plugin is in the tree, and what each handler answers."""

from __future__ import annotations

import pytest
from sevlab.core.builder import Msr
from sevlab.core.config import GuestConfig
from sevlab.core.cpu import CONTROL_SEV, CONTROL_SEV_ES
from sevlab.core.events import AdvanceClock, CpuExit, Injected, Resumed, Schedule, SetRegisters, Stopped, VmExit
from sevlab.core.hookspecs import hookimpl
from sevlab.core.hypercall import CodeMode, HypercallEnd, code_mode
from sevlab.core.svm import EventType, ExitCode, Vector, event, exit_name
from sevlab.core.testing import assert_resets, make_machine
from sevlab.plugins import io, sev, sev_es
from sevlab.plugins.io.feasibility import EVENTS, Feasibility, Way
from sevlab.plugins.io.modes import Mode

X = ExitCode.EXCEPTION_0
MOV = 1 << 63


def machine_of(mode=Mode.PLAIN, vcpus=1):
    machine = make_machine("io", "sme", guests=(GuestConfig(memory_bytes=1 << 20, vcpus=vcpus),))
    for vcpu in machine.vcpus.values():
        if mode is not Mode.PLAIN:
            vcpu.vmcb.encryption_control |= CONTROL_SEV | (CONTROL_SEV_ES if mode is Mode.SEV_ES else 0)
    return machine


@pytest.fixture
def machine():
    return machine_of()


def registers(machine, **values):
    machine.apply(SetRegisters(0, tuple(values.items())))
    return machine.vcpus[0].regs


def leave(machine, code, info1=0, info2=0, insn=b"\x90", next_rip=0):
    machine.vcpus[0].vmcb.intercept(*(c for c in (code,) if c < 0xC0))
    return machine.apply(CpuExit(0, code, info1, info2, insn, next_rip))


def sev_machine():
    """A guest launched by the Secure Processor's commands."""
    machine = make_machine("io", "sev", guests=(GuestConfig(memory_bytes=1 << 20),))
    machine.vcpus[0].vmcb.intercept(X + Vector.UD, X + Vector.PF)
    sev.launch_guest(machine, 0)
    return machine


def sev_es_machine():
    """A guest with encrypted registers, launched with a VMSA; its #VC handler is not run."""
    machine = make_machine("io", "sev", "sev_es", guests=(GuestConfig(memory_bytes=1 << 20),))
    sev.launch_guest(machine, 0, policy=sev.Policy.ES, vmsas=[sev_es.initial_vmsa()])
    sev_es.set_up_vcpus(machine, 0)
    return machine


COMPOSED_OF = {Mode.PLAIN: machine_of, Mode.SEV: sev_machine, Mode.SEV_ES: sev_es_machine}
"""How to make a guest of each mode; a mode whose plugin does not make guests yet is reported as missing."""


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("code", EVENTS, ids=exit_name)
def test_each_event_is_served_in_its_way(code, mode):
    if mode not in COMPOSED_OF:
        pytest.skip(f"plugin missing: no guests of mode {mode.value}")
    way = io.way(code, mode)
    machine = COMPOSED_OF[mode]()
    registers(machine, rip=0x1000, rcx=0, rax=1)
    info1 = MOV if code < 0x20 or code == ExitCode.CR0_SEL_WRITE else 0
    if code == ExitCode.IOIO:
        info1 = io.ioio_word(0x80, 1, is_in=False)
    if way is Way.NATIVE and mode is Mode.SEV:  # the launch has cleared the intercept, and nobody sets it again
        outcome = machine.apply(CpuExit(0, code, info1, 0, b"\x90", 0))
    else:
        outcome = leave(machine, code, info1, 0x1001 if code == ExitCode.IOIO else 0)
    assert (outcome.first(VmExit) is not None) == (way is not Way.GUEST and way is not Way.NATIVE)
    assert (outcome.first(io.Unserved) is not None) == (way is Way.REFUSED)
    assert (outcome.first(sev_es.VcDelivered) is not None) == (mode is Mode.SEV_ES and outcome.first(VmExit) is None)
    if way is Way.HYPERVISOR and code not in (ExitCode.SHUTDOWN, ExitCode.HLT):
        assert outcome.first(Resumed) is not None


def test_the_table_names_every_event_that_is_handled():
    handled = set(io.EVENTS)
    named = {exit_name(code) for code in handled}
    for word in ("CPUID", "IOIO", "MSR", "TASK_SWITCH", "CR0_SEL_WRITE", "INVLPGA", "XSETBV", "EXCEPTION_6"):
        assert word in named
    assert all(isinstance(row, Feasibility) for row in io.EVENTS.values())


def test_a_task_switch_is_refused_in_every_mode():
    for mode in (Mode.PLAIN, Mode.SEV, Mode.SEV_ES):
        outcome = leave(machine_of(mode), ExitCode.TASK_SWITCH)
        assert "TSS" in outcome.first(io.Unserved).reason
        assert outcome.first(Stopped) is not None


def test_cpuid_answers_in_four_registers_and_clears_upper_halves(machine):
    regs = registers(machine, rax=0xFFFF_FFFF_8000_001F, rcx=0, rbx=(1 << 64) - 1, rip=0x1000)
    leave(machine, ExitCode.CPUID, insn=b"\x0f\xa2")
    part = machine.config.part
    assert (regs.rax & 1, regs.rbx, regs.rcx, regs.rdx) == (1, part.c_bit | part.lost_bits << 6, 0, 0)
    assert regs.rip == 0x1002


@pytest.mark.parametrize(("code", "aux"), [(ExitCode.RDTSC, None), (ExitCode.RDTSCP, 7)])
def test_rdtsc_gives_the_clock_with_the_vms_offset(machine, code, aux):
    machine.apply(AdvanceClock(0x1_2345_6789))
    machine.vcpus[0].vmcb.tsc_offset = 1
    machine.vcpus[0].system.tsc_aux = 7
    regs = registers(machine, rcx=99)
    leave(machine, code)
    assert (regs.rax, regs.rdx) == (0x2345_678A, 1)
    assert regs.rcx == (99 if aux is None else aux)


def test_an_unknown_msr_is_a_general_protection_fault_and_rip_stays(machine):
    regs = registers(machine, rcx=0x1234, rip=0x1000, rax=5)
    outcome = leave(machine, ExitCode.MSR)
    assert outcome.first(Injected) == Injected(0, event(Vector.GP, EventType.EXCEPTION, 0))
    assert (regs.rip, regs.rax) == (0x1000, 5)


def test_msr_handlers_get_64_bits_and_may_fault():
    seen = []

    def write(machine, vcpu, number, value):
        seen.append((vcpu.vcpu_id, number, value))

    class Plugin:
        """An MSR."""

        from sevlab.core.hookspecs import hookimpl

        @staticmethod
        @hookimpl
        def sevlab_register(builder):
            builder.guest_msrs.add(0xC001_1234, Msr(lambda *_: 0x1_0000_0002, write))

    machine = make_machine("io", given={"x": Plugin()}, guests=1)
    regs = registers(machine, rcx=0xC001_1234, rax=0xFFFF_FFFF_0000_0003, rdx=4)
    leave(machine, ExitCode.MSR, 1)
    assert seen == [(0, 0xC001_1234, 0x4_0000_0003)]
    leave(machine, ExitCode.MSR, 0)
    assert (regs.rax, regs.rdx) == (2, 1)


@pytest.mark.parametrize(
    ("rcx", "value", "cpl", "legal"),
    [
        (0, 1, 0, True),
        (0, 7, 0, True),
        (0, 3, 0, True),
        (0, 5, 0, False),
        (0, 2, 0, False),
        (0, 8 | 1, 0, False),
        (1, 1, 0, False),
        (0, 1, 3, False),
    ],
)
def test_xsetbv_takes_only_legal_states(machine, rcx, value, cpl, legal):
    registers(machine, rcx=rcx, rax=value, rdx=0, cpl=cpl)
    outcome = leave(machine, ExitCode.XSETBV)
    assert (outcome.first(Injected) is None) == legal
    assert machine.vcpus[0].system.xcr0 == (value if legal else 1)


@pytest.mark.parametrize(
    ("code", "name"), [(0x10, "cr0"), (0x13, "cr3"), (0x14, "cr4"), (0x18, "cr8"), (ExitCode.CR0_SEL_WRITE, "cr0")]
)
def test_mov_to_a_control_register_uses_the_named_register(machine, code, name):
    registers(machine, rbx=0x6000_0011 if name == "cr0" else 5)
    leave(machine, code, MOV | 3)
    assert getattr(machine.vcpus[0].system, name) == (0x6000_0011 if name == "cr0" else 5)


@pytest.mark.parametrize(
    ("value", "fault"), [(0x8000_0010, True), (0x2000_0011, True), (1 << 32, True), (0x8000_0011, False)]
)
def test_illegal_cr0_values_fault(machine, value, fault):
    before = machine.vcpus[0].system.cr0
    registers(machine, rbx=value)
    outcome = leave(machine, 0x10, MOV | 3)
    assert (outcome.first(Injected) is not None) == fault
    assert machine.vcpus[0].system.cr0 == (before if fault else value)


def test_mov_from_a_control_register(machine):
    registers(machine, cr3=0x5000)
    leave(machine, 0x03, MOV | 7)
    assert machine.vcpus[0].regs.rdi == 0x5000
    assert leave(machine, 0x01, MOV).first(Injected) == Injected(0, event(Vector.UD, EventType.EXCEPTION))


def test_without_decode_assist_a_control_register_exit_cannot_be_served(machine):
    assert "decode assist" in leave(machine, 0x10, 0).first(io.Unserved).reason


def test_debug_registers_keep_their_values(machine):
    regs = registers(machine, rsi=0x1234_5678_9ABC)
    leave(machine, 0x32, 6)
    leave(machine, 0x22, 7)
    assert regs.rdi == 0x1234_5678_9ABC
    registers(machine, rsi=1 << 32)
    assert leave(machine, 0x37, 6).first(Injected).event & 0xFF == Vector.GP
    registers(machine, rsi=0x55)
    leave(machine, 0x35, 6)
    assert machine.vcpus[0].system.dr7 == 0x455


def test_vmmcall_without_a_hypercall_is_ud(machine):
    assert leave(machine, ExitCode.VMMCALL).first(Injected) == Injected(0, event(Vector.UD, EventType.EXCEPTION))


class Owner:
    """A plugin that owns the hypervisor's ABI: for tests."""

    def __init__(self, end, direct=None) -> None:
        self.end, self.direct, self.seen = end, direct, []

    @hookimpl
    def sevlab_register(self, builder):
        builder.slot("hypercall", self.call)
        builder.slot("direct_interrupt", lambda machine, vcpu: self.direct)

    def call(self, machine, vcpu, frame):
        self.seen.append((frame.registers.rax, frame.cpl, frame.mode))
        frame.registers.rax = 7
        return self.end


@pytest.mark.parametrize(("end", "rip"), [(HypercallEnd.COMPLETED, 0x1003), (HypercallEnd.PREEMPTED, 0x1000)])
def test_vmmcall_goes_to_its_owner_and_rip_stays_when_preempted(end, rip):
    owner = Owner(end)
    machine = make_machine("io", given={"owner": owner}, guests=1)
    regs = registers(machine, rip=0x1000, rax=17, cpl=3)
    leave(machine, ExitCode.VMMCALL, insn=b"\x0f\x01\xd9")
    assert owner.seen == [(17, 3, CodeMode.REAL)]
    assert (regs.rax, regs.rip) == (7, rip)


@pytest.mark.parametrize(
    ("cr0", "rflags", "attributes", "efer", "mode"),
    [
        (0x10, 2, 0x93, 0x1000, CodeMode.REAL),
        (0x11, 2 | 1 << 17, 0xF3, 0x1000, CodeMode.VM86),
        (0x11, 2, 0x09B, 0x1000, CodeMode.BITS_16),
        (0x11, 2, 0xC9B, 0x1000, CodeMode.BITS_32),
        (0x8000_0011, 2, 0xA9B, 0x1100, CodeMode.BITS_64),
        (0x8000_0011, 2, 0xC9B, 0x1100, CodeMode.BITS_32),
        (0x11, 2, 0xA9B, 0x1100, CodeMode.BITS_16),
    ],
)
def test_the_mode_of_the_calling_code(machine, cr0, rflags, attributes, efer, mode):
    vcpu = machine.vcpus[0]
    vcpu.system.cr0, vcpu.regs.rflags, vcpu.system.efer = cr0, rflags, efer
    vcpu.system.cs = (8, attributes, 0xFFFF_FFFF, 0)
    assert code_mode(vcpu) is mode


def test_a_direct_interrupt_goes_before_the_controllers_and_ends_hlt():
    owner = Owner(HypercallEnd.COMPLETED, direct=0xF3)
    machine = make_machine("io", given={"owner": owner}, guests=1)
    apic = io.devices(machine, machine.vcpus[0]).lapics[0]
    apic.registers[0xF0] = 0x1FF
    apic.accept(0xF8)
    registers(machine, rip=0x1000, rflags=0x202)
    outcome = leave(machine, ExitCode.HLT, insn=b"\xf4")
    assert outcome.first(Injected) == Injected(0, event(0xF3, EventType.INTERRUPT))
    owner.direct = None
    assert machine.apply(Schedule()).first(Injected) == Injected(0, event(0xF8, EventType.INTERRUPT))


def test_a_guests_invd_does_not_destroy_others_data():
    machine = make_machine("io", guests=1, caches=True, generation="rome")
    machine.memory.write(0x5000, b"dirty", None, 1)
    leave(machine, ExitCode.INVD)
    assert machine.memory.read(0x5000, 5, None) == b"dirty"
    assert machine.memory.dirty_lines == 0


def test_hlt_sleeps_until_an_interrupt_and_resumes_behind_it(machine):
    pics = io.devices(machine, machine.vcpus[0]).pics
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xEF)):
        pics.write(port, value)
    regs = registers(machine, rip=0x1000, rflags=0x202)
    outcome = leave(machine, ExitCode.HLT, insn=b"\xf4")
    assert outcome.first(Resumed) is None
    assert machine.vcpus[0].halted
    machine.apply(io.InterruptLine(0, 4, True))
    outcome = machine.apply(Schedule())
    assert outcome.first(Injected) == Injected(0, event(0x24, EventType.INTERRUPT))
    assert regs.rip == 0x1001


@pytest.mark.parametrize(
    ("vector", "error", "expected"),
    [
        (Vector.DB, 0, event(1, EventType.EXCEPTION)),
        (Vector.UD, 0, event(6, EventType.EXCEPTION)),
        (Vector.NM, 0, event(7, EventType.EXCEPTION)),
        (Vector.GP, 0x18, event(13, EventType.EXCEPTION, 0x18)),
        (Vector.AC, 0, event(17, EventType.EXCEPTION, 0)),
        (Vector.PF, 6, event(14, EventType.EXCEPTION, 6)),
    ],
)
def test_an_intercepted_exception_goes_back_to_the_guest(machine, vector, error, expected):
    outcome = leave(machine, X + vector, error, 0xCAFE000)
    assert outcome.first(Injected) == Injected(0, expected)
    assert machine.vcpus[0].system.cr2 == (0xCAFE000 if vector == Vector.PF else 0)


def test_a_breakpoint_needs_its_length_and_a_machine_check_stays_with_the_host(machine):
    regs = registers(machine, rip=0x1000)
    outcome = leave(machine, X + Vector.BP, insn=b"\xcc")
    assert outcome.first(Injected) == Injected(0, event(3, EventType.EXCEPTION))
    assert regs.rip == 0x1001
    assert leave(machine, X + Vector.MC).first(Injected) is None


def test_int_n_is_injected_as_what_it_was(machine):
    regs = registers(machine, rip=0x1000)
    assert leave(machine, ExitCode.SWINT, 0x80, insn=b"\xcd\x80").first(Injected) == Injected(
        0, event(0x80, EventType.SOFTWARE)
    )
    assert regs.rip == 0x1002
    regs = registers(machine, rip=0x1000)
    leave(machine, ExitCode.SWINT, 0x80, insn=b"\xcd\x80", next_rip=0x1002)
    assert regs.rip == 0x1000
    assert machine.vcpus[0].vmcb.next_rip == 0x1002


def test_shutdown_ends_the_vm(machine):
    assert leave(machine, ExitCode.SHUTDOWN).first(Stopped) == Stopped(0, "shutdown (triple fault)")


@pytest.mark.parametrize("code", [ExitCode.INTR, ExitCode.NMI, ExitCode.SMI])
def test_the_hosts_own_interrupts_change_nothing(machine, code):
    regs = registers(machine, rip=0x1000)
    assert leave(machine, code).first(Resumed) == Resumed(0, 0x1000)
    assert regs.rip == 0x1000


def test_write_traps_take_note_of_the_new_value():
    machine = machine_of(Mode.SEV_ES)
    leave(machine, 0x94, 0x20)
    leave(machine, ExitCode.EFER_WRITE_TRAP, 0x500)
    assert machine.vcpus[0].system.cr4 == 0x20
    assert machine.vcpus[0].system.efer == 0x1500


def test_exits_reset(machine):
    assert_resets(
        machine,
        SetRegisters(0, (("rax", 1), ("rip", 0x1000))),
        CpuExit(0, ExitCode.CPUID, 0, 0, b"\x0f\xa2", 0),
        CpuExit(0, ExitCode.IOIO, io.ioio_word(0x3F8, 1, is_in=False), 0x1001, b"\xee", 0),
        io.SerialInput(0, b"x"),
        io.InterruptLine(0, 4, True),
    )
