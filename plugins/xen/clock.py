"""Time as Xen tells it: the clock in vcpu_info, runstates, timers and watchdogs.

Source: Xen xen/arch/x86/time.c (update_vcpu_system_time), xen/common/sched/core.c, xen/include/public/vcpu.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.determinism import TSC_HZ
from sevlab.core.units import MASK32
from sevlab.plugins import io
from sevlab.plugins.xen.events import end_poll, raise_timer
from sevlab.plugins.xen.frames import fetch, store
from sevlab.plugins.xen.layout import (
    SharedInfo,
    SharedInfo32,
    VcpuInfo,
    VcpuRunstateInfo,
    VcpuRunstateInfo32,
    VcpuTimeInfo,
)
from sevlab.plugins.xen.numbers import SHUTDOWN_REASONS
from sevlab.plugins.xen.state import Domain, RunState, XenVcpu, domain_of, xen
from sevlab.plugins.xen.xenstore import toolstack

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

NANOSECONDS = 1_000_000_000
MASK63 = (1 << 63) - 1
TIME_OFFSET = VcpuInfo.FIELDS["time"].offset
TSC_STABLE = 1


def now(machine: Machine) -> int:
    """Nanoseconds since boot, from the time-stamp counter."""
    return machine.tsc() * NANOSECONDS // TSC_HZ


def scale(hz: int) -> tuple[int, int]:
    """(tsc_to_system_mul, tsc_shift as a byte) of a counter of `hz`. Source: xen/arch/x86/time.c, set_time_scale."""
    shift, half = 0, hz
    while half > NANOSECONDS * 2:
        half >>= 1
        shift -= 1
    low = half & 0xFFFF_FFFF
    while low <= NANOSECONDS:
        low <<= 1
        shift += 1
    return (NANOSECONDS << 32) // low, shift & 0xFF


MULTIPLIER, SHIFT = scale(TSC_HZ)


def time_info(machine: Machine, clock_version: int) -> bytes:
    """vcpu_time_info for this moment."""
    return VcpuTimeInfo.build(
        time_version=clock_version & 0xFFFF_FFFE,
        tsc_timestamp=machine.tsc() & (1 << 64) - 1,
        system_time=now(machine) & (1 << 64) - 1,
        tsc_to_system_mul=MULTIPLIER,
        tsc_shift=SHIFT,
        flags=TSC_STABLE,
    )


def update_time(machine: Machine, vcpu: XenVcpu) -> None:
    """Write the clock where the vCPU reads it: vcpu_info, and the area it registered by physical address. An area
    registered by linear address is written with the copy that its registration made.
    """
    for spa in (vcpu.info_spa + TIME_OFFSET if vcpu.info_spa else 0, vcpu.time_spa):
        if spa:
            before = int.from_bytes(fetch(machine, spa, 4), "little")
            store(machine, spa, time_info(machine, before + 2))


def start(machine: Machine, domain: Domain) -> None:
    """The clocks of a domain that is built: before its first instruction, in what it does not know to be shared."""
    write_wallclock(machine, domain)
    for vcpu in domain.vcpus:
        update_time(machine, vcpu)


def write_wallclock(machine: Machine, domain: Domain) -> None:
    """Put the date of Xen's own start into shared_info, in the layout that the domain has.

    Source: Xen xen/common/time.c (update_domain_wallclock_time).
    """
    board = io.devices(machine, machine.vcpus[domain.vcpus[0].vcpu_id])
    seconds = int(board.rtc.now(0).timestamp())
    fields = (SharedInfo32 if domain.narrow else SharedInfo).FIELDS
    version_spa = domain.shared_info_spa + fields["wc_version"].offset
    update = (int.from_bytes(fetch(machine, version_spa, 4), "little") | 1) + 1
    for name, value in (("wc_sec", seconds), ("wc_nsec", 0), ("wc_sec_hi", seconds >> 32), ("wc_version", update)):
        store(machine, domain.shared_info_spa + fields[name].offset, (value & MASK32).to_bytes(4, "little"))


def latch_width(machine: Machine, domain: Domain, *, narrow: bool) -> None:
    """shared_info has the layout of the code that sets the callback or the hypercall page; the date is put there anew.

    Source: Xen xen/arch/x86/hvm/hvm.c (hvm_latch_shinfo_size).
    """
    domain.narrow = narrow
    write_wallclock(machine, domain)


def runstate(machine: Machine, domain: Domain, vcpu: XenVcpu) -> bytes:
    """vcpu_runstate_info, with the time in the present state counted up to now."""
    moment = now(machine)
    times = list(vcpu.times)
    times[vcpu.run_state] += moment - vcpu.entered
    layout = VcpuRunstateInfo32 if domain.narrow else VcpuRunstateInfo
    return layout.build(
        state=int(vcpu.run_state),
        state_entry_time=vcpu.entered & MASK63,
        time=tuple(value & (1 << 64) - 1 for value in times),
    )


def change_runstate(machine: Machine, domain: Domain, vcpu: XenVcpu, state: RunState) -> None:
    """The vCPU runs, waits, or is off from now on."""
    if vcpu.run_state is state:
        return
    moment = now(machine)
    times = list(vcpu.times)
    times[vcpu.run_state] += moment - vcpu.entered
    vcpu.times = (times[0], times[1], times[2], times[3])
    vcpu.entered, vcpu.run_state = moment, state
    if vcpu.runstate_spa:
        store(machine, vcpu.runstate_spa, runstate(machine, domain, vcpu))


def next_timer(machine: Machine, vcpu: Vcpu) -> int | None:
    """The slot of that name: the TSC at which the next timer, poll or watchdog of the vCPU's domain ends."""
    domain = domain_of(machine, vcpu)
    if domain is None:
        return None
    due = [*domain.watchdogs.values()]
    for its in domain.vcpus:
        due += [its.singleshot] if its.singleshot else []
        due += [its.next_period] if its.period else []
        due += [its.poll_until] if its.polling is not None and its.poll_until else []
    return -(-min(due) * TSC_HZ // NANOSECONDS) if due else None


def tick(machine: Machine) -> None:
    """Let everything happen that is due."""
    moment = now(machine)
    for domain in xen(machine).domains.values():
        for vcpu in domain.vcpus:
            if vcpu.singleshot and moment >= vcpu.singleshot:
                vcpu.singleshot = 0
                raise_timer(machine, domain, vcpu)
            if vcpu.period and moment >= vcpu.next_period:
                missed = (moment - vcpu.next_period) // vcpu.period
                vcpu.next_period += (missed + 1) * vcpu.period
                raise_timer(machine, domain, vcpu)
            if vcpu.polling is not None and vcpu.poll_until and moment >= vcpu.poll_until:
                end_poll(machine, vcpu)
        if any(moment >= due for due in domain.watchdogs.values()):
            domain.watchdogs.clear()
            shut_down(machine, domain, SHUTDOWN_REASONS.index("watchdog"))


def shut_down(machine: Machine, domain: Domain, reason: int) -> None:
    """End a domain; the first reason counts."""
    if domain.shutdown_code is None:
        domain.shutdown_code = reason
    name = SHUTDOWN_REASONS[reason] if reason < len(SHUTDOWN_REASONS) else f"reason {reason}"
    if not machine.hypervisor.vms[domain.vm_id].stopped:
        machine.hypervisor.stop(machine, domain.vm_id, f"SCHEDOP_shutdown: {name}")
        toolstack.released(machine, domain.domid)
