"""vcpu_op, sched_op and timers: life of a vCPU, areas that Xen writes, time."""

from __future__ import annotations

import pytest
from sevlab.core.events import AdvanceClock, CpuExit, Injected, Stopped
from sevlab.core.svm import ExitCode, Vector
from sevlab.plugins import io
from sevlab.plugins.xen import Errno, HypercallStep, Nr, Schedop, Vcpuop, xen
from sevlab.plugins.xen.arguments import Area, Shutdown, VcpuHvmContext, VcpuHvmContext32, Watchdog
from sevlab.plugins.xen.layout import SharedInfo, VcpuRunstateInfo, VcpuTimeInfo
from sevlab.plugins.xen.numbers import Evtchnop, MapSpace, Virq

from tests.plugins.xen.world import BOUNCE, INFO, PAGE, call, guest_of, machine_of

MS = 2_000_000
"""Ticks of a millisecond."""
CONTEXT = {"mode": 1, "rip": 0x1000, "rsp": 0x8000, "cr0": 0x8000_0011, "cr3": 0x5000, "cr4": 0x20, "efer": 0x500}


@pytest.fixture
def machine():
    return machine_of(vcpus=2)


def op(guest, command, on=0, **fields):
    return guest.invoke(Nr.VCPU_OP, command, on=on, **fields)


# Life -------------------------------------------------------------------------------------------------------------


def test_a_second_vcpu_is_initialised_started_and_stopped(machine):
    guest = guest_of(machine)
    assert op(guest, Vcpuop.UP, 1).result == -Errno.EINVAL
    assert op(guest, Vcpuop.INITIALISE, 1, **CONTEXT, rdi=7).result == 0
    vcpu = machine.vcpus[1]
    assert (vcpu.regs.rip, vcpu.regs.rdi, vcpu.system.cr3, vcpu.system.cs[1]) == (0x1000, 7, 0x5000, 0xA9B)
    assert vcpu.halted
    assert op(guest, Vcpuop.IS_UP, 1).result == 0
    assert op(guest, Vcpuop.UP, 1).result == 0
    assert (vcpu.halted, op(guest, Vcpuop.IS_UP, 1).result) == (False, 1)
    assert op(guest, Vcpuop.INITIALISE, 1, **CONTEXT).result == -Errno.EEXIST
    assert op(guest, Vcpuop.DOWN, 1).result == 0
    assert vcpu.halted


@pytest.mark.parametrize(
    ("fields", "result"),
    [
        ({"pad": 1}, -Errno.EINVAL),
        ({"mode": 2}, -Errno.EINVAL),
        ({"rip": 1 << 47}, -Errno.EINVAL),
        ({"rip": (1 << 64) - (1 << 47)}, 0),
        ({"cr0": 0x11}, -Errno.EINVAL),
        ({"cr4": 0}, -Errno.EINVAL),
        ({"efer": 0}, -Errno.EINVAL),
        ({"efer": 0x1500}, -Errno.EINVAL),  # SVME
        ({"efer": 0x500 | 1 << 15}, -Errno.EINVAL),
        ({"efer": 0x4D01}, 0),
        ({"cr4": 0x20 | 1 << 12}, -Errno.EINVAL),  # five levels
        ({"cr4": 0x20 | 1 << 13}, -Errno.EINVAL),  # VMXE
        ({"cr4": 0x20 | 1 << 20}, 0),
    ],
)
def test_first_registers_are_checked(machine, fields, result):
    guest = guest_of(machine)
    assert op(guest, Vcpuop.INITIALISE, 1, **(CONTEXT | fields)).result == result
    assert xen(machine).domains[1].vcpus[1].initialised == (result == 0)


@pytest.mark.parametrize(
    ("fields", "result"),
    [
        ({"cr4": 0x6B0}, 0),
        ({"cr4": 0x20 | 1 << 8}, 0),  # PCE has no bit in CPUID
        ({"cr4": 0x20 | 1 << 20}, 0),  # SMEP
        ({"cr4": 0x20 | 1 << 21}, -Errno.EINVAL),  # SMAP
        ({"cr4": 0x20 | 1 << 18}, -Errno.EINVAL),  # OSXSAVE
        ({"efer": 0xD01}, 0),
        ({"efer": 0x500 | 1 << 14}, -Errno.EINVAL),  # FFXSE
        ({"efer": 0x500 | 1 << 21}, -Errno.EINVAL),  # automatic IBRS
    ],
)
def test_cr4_and_efer_are_held_against_the_guests_cpuid(fields, result):
    machine = machine_of(vcpus=2, plugins=("sme", "sev", "sev_es", "engines"))  # which describes a processor
    assert op(guest_of(machine), Vcpuop.INITIALISE, 1, **(CONTEXT | fields)).result == result


def test_a_32_bit_vcpu_is_held_against_cpuid_too(machine):
    assert initialise_32(guest_of(machine), cr4=1 << 12) == -Errno.EINVAL
    assert initialise_32(guest_of(machine), efer=1 << 12) == -Errno.EINVAL
    assert initialise_32(guest_of(machine), cr4=1 << 4) == 0


FLAT = {f"{name}_limit": 0xFFFF_FFFF for name in ("cs", "ds", "ss", "es")}
CONTEXT_32 = FLAT | {"cr0": 0x11, "eip": 0x10_0000, "ebx": 7, "efer": 0, "eflags": 0, "tr_limit": 0x67}
CONTEXT_32 |= {"cs_ar": 0xC9A, "ds_ar": 0xC92, "ss_ar": 0xC92, "es_ar": 0, "tr_ar": 0x89, "cs_base": 0x1000}


def initialise_32(guest, **fields):
    guest.write(BOUNCE, VcpuHvmContext32.build(**(CONTEXT_32 | fields)))
    return guest.call(Nr.VCPU_OP, Vcpuop.INITIALISE, 1, BOUNCE)


def test_a_vcpu_starts_in_32_bit_mode_with_the_segments_that_it_is_given(machine):
    assert initialise_32(guest_of(machine), efer=0x100) == 0
    vcpu = machine.vcpus[1]
    assert (vcpu.regs.rip, vcpu.regs.rbx, vcpu.regs.rflags) == (0x10_0000, 7, 2)
    system = vcpu.system
    assert system.cs == (0, 0xC9B, 0xFFFF_FFFF, 0x1000)  # accessed
    assert (system.ss[1], system.es[1], system.tr[1]) == (0xC93, 0, 0x8B)
    assert (system.cr0, system.cpl, system.efer) == (0x11, 0, 0x1500)


@pytest.mark.parametrize(
    "fields",
    [
        {"pad1": 1},
        {"pad2": bytes(5) + b"\1"},
        {"cs_ar": 0},
        {"cs_ar": 0xC92},
        {"cs_ar": 0x1C9A},
        {"cs_ar": 0xC1A},
        {"cs_ar": 0xC8A},
        {"ss_ar": 0xC9A},
        {"ss_ar": 0xC90},
        {"ss_ar": 0xCF2},
        {"ds_ar": 0xC98},
        {"ds_ar": 0xCF2},
        {"es_ar": 0xCF2},
        {"tr_ar": 0x99},
        {"tr_ar": 0x81},
        {"tr_ar": 0},
        {"eip": 0x10_0000, "cs_ar": 0x49A, "cs_limit": 0xF_FFFF},
        {"efer": 0x400},
    ],
)
def test_32_bit_registers_that_no_processor_would_load_are_refused(machine, fields):
    assert initialise_32(guest_of(machine), **fields) == -Errno.EINVAL
    assert not xen(machine).domains[1].vcpus[1].initialised


def test_the_limit_of_the_code_segment_counts_pages_where_it_says_so(machine):
    assert initialise_32(guest_of(machine), cs_limit=0x100, eip=0x10_0FFF) == 0


def test_the_last_vcpu_down_ends_the_domain(machine):
    guest = guest_of(machine)
    op(guest, Vcpuop.DOWN, 0)
    assert machine.hypervisor.vms[0].stopped == "SCHEDOP_shutdown: poweroff"


def test_an_nmi_is_injected(machine):
    guest = guest_of(machine)
    assert call(machine, Nr.VCPU_OP, Vcpuop.SEND_NMI, 0, PAGE) == -Errno.EINVAL
    outcome = machine.apply(HypercallStep(0, Nr.VCPU_OP, Vcpuop.SEND_NMI, 0, 0, 0, 0, 0, 0))
    assert outcome.first(Injected).event & 0xFF == Vector.NMI
    assert op(guest, Vcpuop.GET_PHYSID, 0).result == -Errno.EINVAL


# Areas ------------------------------------------------------------------------------------------------------------


def test_vcpu_info_moves_once_with_an_upcall(machine):
    guest = guest_of(machine)
    guest.share(PAGE)
    assert op(guest, Vcpuop.REGISTER_VCPU_INFO, mfn=PAGE >> 12, page_offset=64).result == 0
    assert guest.number(PAGE + 64, 1) == 1
    assert guest.number(PAGE + 72, 8) == (1 << 64) - 1
    assert guest.number(PAGE + 96 + 24, 4)  # the clock's multiplier
    assert op(guest, Vcpuop.REGISTER_VCPU_INFO, mfn=PAGE >> 12, page_offset=64).result == -Errno.EBUSY


@pytest.mark.parametrize(
    ("fields", "result"),
    [
        ({"page_offset": 4032}, 0),
        ({"page_offset": 4040}, -Errno.ENXIO),
        ({"page_offset": 4}, -Errno.ENXIO),
        ({"page_offset": 4096}, -Errno.EINVAL),
        ({"mfn": 1 << 40}, -Errno.EINVAL),
        ({"mfn": 1 << 52}, -Errno.EINVAL),
    ],
)
def test_where_vcpu_info_may_lie(machine, fields, result):
    guest = guest_of(machine)
    guest.share(PAGE)
    values = {"mfn": PAGE >> 12, "page_offset": 0} | fields
    assert op(guest, Vcpuop.REGISTER_VCPU_INFO, **values).result == result


def test_runstate_by_physical_address_is_kept_up_to_date(machine):
    guest = guest_of(machine)
    guest.share(PAGE)
    assert op(guest, Vcpuop.REGISTER_RUNSTATE_PHYS_AREA, addr=PAGE).result == 0
    machine.apply(AdvanceClock(5 * MS))
    guest.invoke(Nr.SCHED_OP, Schedop.BLOCK)
    machine.vcpus[0].halted = False
    machine.apply(CpuExit(0, ExitCode.CPUID, 0, 0, b"\x0f\xa2", 0))
    info = VcpuRunstateInfo.from_bytes(guest.read(PAGE, 48))
    assert info.state == 0
    assert op(guest, Vcpuop.REGISTER_RUNSTATE_PHYS_AREA, addr=PAGE + 4095).result == -Errno.ENXIO
    assert op(guest, Vcpuop.REGISTER_RUNSTATE_PHYS_AREA, addr=(1 << 64) - 1).result == 0
    assert op(guest, Vcpuop.REGISTER_RUNSTATE_PHYS_AREA, addr=1 << 40).result == -Errno.EINVAL


def test_get_runstate_counts_the_time(machine):
    guest = guest_of(machine)
    machine.apply(AdvanceClock(3 * MS))
    assert call(machine, Nr.VCPU_OP, Vcpuop.GET_RUNSTATE_INFO, 0, PAGE) == 0
    info = VcpuRunstateInfo.from_bytes(guest.read(PAGE, 48))
    assert (info.state, info.time[0]) == (0, 3_000_000)
    assert call(machine, Nr.VCPU_OP, Vcpuop.GET_RUNSTATE_INFO, 0, 1 << 40) == -Errno.EFAULT


def test_areas_by_linear_address_are_written_once(machine):
    guest = guest_of(machine)
    guest.write(BOUNCE, Area.build(addr=PAGE))
    machine.apply(AdvanceClock(2 * MS))
    assert guest.call(Nr.VCPU_OP, Vcpuop.REGISTER_RUNSTATE_MEMORY_AREA, 0, BOUNCE) == 0
    assert VcpuRunstateInfo.from_bytes(guest.read(PAGE, 48)).time[0] == 2_000_000
    guest.write(BOUNCE, Area.build(addr=PAGE + 64))
    assert guest.call(Nr.VCPU_OP, Vcpuop.REGISTER_VCPU_TIME_MEMORY_AREA, 0, BOUNCE) == 0
    assert VcpuTimeInfo.from_bytes(guest.read(PAGE + 64, 32)).system_time == 2_000_000


def test_the_clock_says_the_time(machine):
    guest = guest_of(machine)
    guest.share(PAGE)
    machine.apply(AdvanceClock(7 * MS))
    assert op(guest, Vcpuop.REGISTER_VCPU_TIME_PHYS_AREA, addr=PAGE).result == 0
    info = VcpuTimeInfo.from_bytes(guest.read(PAGE, 32))
    assert (info.time_version & 1, info.system_time, info.flags) == (0, 7_000_000, 1)
    shift = info.tsc_shift - 256 if info.tsc_shift > 127 else info.tsc_shift
    later = 10 * MS
    scaled = later << shift if shift >= 0 else later >> -shift
    assert abs((scaled * info.tsc_to_system_mul >> 32) - 10_000_000) <= 1


# Timers -----------------------------------------------------------------------------------------------------------


def with_timer(machine):
    guest = guest_of(machine)
    guest.map_page(MapSpace.SHARED_INFO, 0, INFO)
    port = guest.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.BIND_VIRQ, virq=Virq.TIMER, vcpu=0).fields["port"]
    return guest, port


def test_the_clocks_run_before_the_first_instruction(machine):
    domain = xen(machine).domains[1]
    shared = SharedInfo.from_bytes(machine.memory.read(domain.shared_info_spa, SharedInfo.SIZE, None))
    date = io.devices(machine, machine.vcpus[0]).rtc.now(0)
    assert (shared.wc_sec, shared.wc_sec_hi, shared.wc_version) == (int(date.timestamp()), 0, 2)
    for vcpu in range(2):
        clock = VcpuTimeInfo.from_bytes(shared.vcpu_info[vcpu * 64 + 32 : vcpu * 64 + 64])
        assert clock.time_version == 2
        assert clock.tsc_to_system_mul


def test_whoever_lets_time_pass_is_told_of_the_next_timer(machine):
    guest, vcpu = guest_of(machine), machine.vcpus[1]
    assert io.next_event(machine, vcpu) is None
    op(guest, Vcpuop.SET_SINGLESHOT_TIMER, timeout_abs_ns=5_000_000)
    op(guest, Vcpuop.SET_PERIODIC_TIMER, 1, period_ns=7_000_000)
    assert io.next_event(machine, vcpu) == 5 * MS
    machine.apply(AdvanceClock(5 * MS - 1))
    assert xen(machine).domains[1].vcpus[0].singleshot
    machine.apply(AdvanceClock(1))
    assert not xen(machine).domains[1].vcpus[0].singleshot
    assert io.next_event(machine, vcpu) == 7 * MS


def test_a_singleshot_timer_fires_once_when_it_is_due(machine):
    guest, port = with_timer(machine)
    assert op(guest, Vcpuop.SET_SINGLESHOT_TIMER, timeout_abs_ns=1_000_000).result == 0
    machine.apply(AdvanceClock(MS - 1000))
    assert guest.pending(INFO) == set()
    machine.apply(AdvanceClock(1000))
    assert guest.pending(INFO) == {port}
    guest.acknowledge(INFO)
    machine.apply(AdvanceClock(10 * MS))
    assert guest.pending(INFO) == set()
    op(guest, Vcpuop.SET_SINGLESHOT_TIMER, timeout_abs_ns=1)
    assert guest.pending(INFO) == {port}  # it lies in the past
    assert op(guest, Vcpuop.SET_SINGLESHOT_TIMER, 1, timeout_abs_ns=1).result == -Errno.EINVAL
    assert op(guest, Vcpuop.STOP_SINGLESHOT_TIMER, 1).result == -Errno.EINVAL


def test_a_periodic_timer_fires_again_and_again(machine):
    guest, port = with_timer(machine)
    assert op(guest, Vcpuop.SET_PERIODIC_TIMER, period_ns=999_999).result == -Errno.EINVAL
    assert op(guest, Vcpuop.SET_PERIODIC_TIMER, period_ns=1 << 62).result == -Errno.EINVAL
    assert op(guest, Vcpuop.SET_PERIODIC_TIMER, period_ns=1_000_000).result == 0
    for _ in range(3):
        machine.apply(AdvanceClock(MS))
        assert guest.pending(INFO) == {port}
        guest.acknowledge(INFO)
    op(guest, Vcpuop.STOP_PERIODIC_TIMER)
    machine.apply(AdvanceClock(5 * MS))
    assert guest.pending(INFO) == set()


@pytest.mark.parametrize(
    ("timeout", "due"), [(0, 0), (5_000_000, 5_000_000), ((1 << 63) + 5, 100_000_000), (1 << 51, 100_000_000)]
)
def test_set_timer_op(machine, timeout, due):
    assert call(machine, Nr.SET_TIMER_OP, timeout) == 0
    assert xen(machine).domains[1].vcpus[0].singleshot == due


def test_set_timer_op_of_32_bit_code_has_two_halves():
    machine = machine_of(start="protected")
    assert call(machine, Nr.SET_TIMER_OP, 5, 1, names=("rbx", "rcx")) == 0
    assert xen(machine).domains[1].vcpus[0].singleshot == 1 << 32 | 5


# sched_op ---------------------------------------------------------------------------------------------------------


def sched(guest, command, layout, **fields):
    guest.write(BOUNCE, layout.build(**fields))
    return guest.call(Nr.SCHED_OP, command, BOUNCE)


@pytest.mark.parametrize(
    ("reason", "word"), [(0, "poweroff"), (5, "soft reset"), (77, "reason 77"), (0x102, "suspend")]
)
def test_a_shutdown_ends_the_vm(machine, reason, word):
    guest = guest_of(machine)
    guest.write(BOUNCE, Shutdown.build(reason=reason))
    outcome = machine.apply(HypercallStep(0, Nr.SCHED_OP, Schedop.SHUTDOWN, BOUNCE, 0, 0, 0, 0, 0))
    assert outcome.first(Stopped) == Stopped(0, f"SCHEDOP_shutdown: {word}")


def test_a_shutdown_code_counts_once(machine):
    guest = guest_of(machine)
    assert sched(guest, Schedop.SHUTDOWN_CODE, Shutdown, reason=3) == 0
    assert sched(guest, Schedop.SHUTDOWN_CODE, Shutdown, reason=1) == 0
    assert xen(machine).domains[1].shutdown_code == 3


def test_a_watchdog_bites_unless_it_is_fed(machine):
    guest = guest_of(machine)
    assert sched(guest, Schedop.WATCHDOG, Watchdog, id=0, timeout=2) == 1
    assert sched(guest, Schedop.WATCHDOG, Watchdog, id=0, timeout=9) == 2
    assert sched(guest, Schedop.WATCHDOG, Watchdog, id=0, timeout=9) == -Errno.ENOSPC
    assert sched(guest, Schedop.WATCHDOG, Watchdog, id=3, timeout=9) == -Errno.EINVAL
    machine.apply(AdvanceClock(1500 * MS))
    assert sched(guest, Schedop.WATCHDOG, Watchdog, id=1, timeout=2) == 0
    machine.apply(AdvanceClock(1500 * MS))
    assert not machine.hypervisor.vms[0].stopped
    assert sched(guest, Schedop.WATCHDOG, Watchdog, id=2, timeout=0) == 0
    assert sched(guest, Schedop.WATCHDOG, Watchdog, id=2, timeout=0) == -Errno.EINVAL
    machine.apply(AdvanceClock(600 * MS))
    assert machine.hypervisor.vms[0].stopped == "SCHEDOP_shutdown: watchdog"


def test_others_may_only_be_ended_by_the_control_domain():
    for control, result in ((False, -Errno.EPERM), (True, 0)):
        machine = machine_of(control_domain=control)
        guest = guest_of(machine)
        guest.write(BOUNCE, (1 if control else 2).to_bytes(8, "little"))
        assert guest.call(Nr.SCHED_OP, Schedop.REMOTE_SHUTDOWN, BOUNCE) == result
        guest.write(BOUNCE, (9).to_bytes(8, "little"))
        assert guest.call(Nr.SCHED_OP, Schedop.REMOTE_SHUTDOWN, BOUNCE) == -Errno.ESRCH
        assert call(machine, Nr.SCHED_OP, Schedop.PIN_OVERRIDE, 0) == (0 if control else -Errno.EPERM)


def test_the_context_layout_is_128_bytes():
    assert VcpuHvmContext.SIZE == 128
