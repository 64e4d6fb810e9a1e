"""vcpu_op. Source: Xen xen/common/domain.c (common_vcpu_op, map_guest_area), xen/arch/x86/domain.c (do_vcpu_op),
xen/arch/x86/hvm/domain.c (arch_set_info_hvm_guest).
"""

from __future__ import annotations

from typing import Any

from sevlab.core.cpu import CONTROL_SEV_ES
from sevlab.core.paging import CR0_PG, CR4_PAE, EFER_LME
from sevlab.core.units import PAGE_MASK, PAGE_SHIFT
from sevlab.plugins import io
from sevlab.plugins.xen import clock, events
from sevlab.plugins.xen.arguments import (
    Area,
    ContextPage,
    PeriodicTimer,
    RegisterVcpuInfo,
    Shape,
    SingleshotTimer,
    SingleshotTimer32,
    VcpuHvmContext,
    VcpuHvmContext32,
)
from sevlab.plugins.xen.call import Abi, Call
from sevlab.plugins.xen.cpu_policy import cr4_is_valid, efer_is_valid
from sevlab.plugins.xen.frames import fetch, may_write, page_of, store
from sevlab.plugins.xen.layout import VCPU_INFO_BYTES, VcpuRunstateInfo, VcpuRunstateInfo32, VcpuTimeInfo
from sevlab.plugins.xen.numbers import Errno, Vcpuop
from sevlab.plugins.xen.operations import FAST_REGISTERS, Operation, run_operation, signed
from sevlab.plugins.xen.state import RunState, XenVcpu

MODE_64 = 1
FLAT_64, FLAT_DATA = 0xA9B, 0xC93
EFER_SVME, EFER_LMA = 1 << 12, 1 << 10
REGISTERS_64 = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "rip")
REGISTERS_32 = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "eip")
SEGMENTS = ("cs", "ds", "ss", "es")
SEGMENT_ACCESSED, SEGMENT_PRESENT, SEGMENT_GRANULARITY = 1, 1 << 7, 1 << 11
TSS_BUSY, BUSY_TSS = 2, 0xB
RFLAGS_KEPT = 0x003F_7FD5
MILLISECOND = 1_000_000
MAX_PERIOD = (1 << 62) - 1
"""STIME_DELTA_MAX. Source: xen/include/xen/time.h."""
NOWHERE = (1 << 64) - 1
"""An area's address that only takes the registration back."""


def target(call: Call) -> XenVcpu:
    """The vCPU that the call names; `vcpu_op` has looked."""
    return call.domain.vcpus[call.args[1]]


# Life -------------------------------------------------------------------------------------------------------------


def initialise(call: Call, a: Any) -> int:
    """Give a vCPU its first registers, as far as its CPUID has them; it stays down. A vCPU whose registers are
    encrypted got them, measured, before it ran: EOPNOTSUPP (UNVERIFIED: no such Xen exists).

    Source: Xen xen/arch/x86/hvm/domain.c (arch_set_info_hvm_guest).
    """
    vcpu = target(call)
    real = call.machine.vcpus[vcpu.vcpu_id]
    if real.vmcb.encryption_control & CONTROL_SEV_ES:
        return -Errno.EOPNOTSUPP
    if vcpu.initialised:
        return -Errno.EEXIST
    if a.pad or a.mode > MODE_64:
        return -Errno.EINVAL
    narrow = a.mode != MODE_64
    if narrow:
        a = VcpuHvmContext32.from_bytes(a.to_bytes())
    if not (_context_32_is_legal(a) if narrow else _context_64_is_legal(a)):
        return -Errno.EINVAL
    efer = a.efer | (EFER_LMA if a.efer & EFER_LME else 0)
    if not cr4_is_valid(call.machine, real, a.cr4) or not efer_is_valid(call.machine, real, efer):
        return -Errno.EINVAL
    for name in REGISTERS_32 if narrow else REGISTERS_64:
        setattr(real.regs, "r" + name[1:], getattr(a, name))
    real.regs.rflags = (a.eflags if narrow else a.rflags) & RFLAGS_KEPT | 2
    system = real.system
    system.cr0, system.cr3, system.cr4 = a.cr0, a.cr3, a.cr4
    system.efer = efer | EFER_SVME  # the processor's own: a guest runs with it set
    if narrow:
        for name in SEGMENTS:
            attributes = _attributes(getattr(a, name + "_ar"))
            setattr(system, name, (0, attributes, getattr(a, name + "_limit"), getattr(a, name + "_base")))
        system.tr = (0, a.tr_ar | TSS_BUSY, a.tr_limit, a.tr_base)
        system.cpl = a.ss_ar >> 5 & 3
    else:
        system.cs = (0, FLAT_64, 0xFFFF_FFFF, 0)
        system.ds = system.ss = system.es = (0, FLAT_DATA, 0xFFFF_FFFF, 0)
        system.tr = (0, 0x8B, 0x67, 0)
        system.cpl = 0
    vcpu.initialised = True
    return 0


def _context_64_is_legal(a: Any) -> bool:
    """A 64-bit vCPU starts in long mode with paging."""
    canonical = signed(a.rip >> 47, 17) in (0, -1)
    return canonical and bool(a.cr0 & CR0_PG and a.cr4 & CR4_PAE and a.efer & EFER_LME)


def _attributes(value: int) -> int:
    """A present segment has been accessed."""
    return value | SEGMENT_ACCESSED if value & SEGMENT_PRESENT else value


def _context_32_is_legal(a: Any) -> bool:
    """Segments as a processor would load them; EIP inside the code segment; privileges that fit each other."""
    if a.pad1 or any(a.pad2):
        return False
    cs, ds, ss, es = (_attributes(getattr(a, name + "_ar")) for name in SEGMENTS)
    if not all(map(_segment_is_legal, SEGMENTS, (cs, ds, ss, es))) or not _segment_is_legal("tr", a.tr_ar | TSS_BUSY):
        return False
    limit = (a.cs_limit << 12 | 0xFFF) & 0xFFFF_FFFF if cs & SEGMENT_GRANULARITY else a.cs_limit
    dpl = cs >> 5 & 3
    if a.eip > limit or ss >> 5 & 3 != dpl:
        return False
    if any(data & SEGMENT_PRESENT and data >> 5 & 3 > dpl for data in (ds, es)):
        return False
    return not a.efer & EFER_LMA or bool(a.efer & EFER_LME)


def _segment_is_legal(name: str, attributes: int) -> bool:
    """Source: Xen xen/arch/x86/hvm/domain.c (check_segment)."""
    kind, code_or_data = attributes & 0xF, bool(attributes & 0x10)
    if attributes >> 12:
        return False
    if not attributes:
        return name in ("ds", "es")
    if (code_or_data or kind != BUSY_TSS) if name == "tr" else not code_or_data:
        return False
    if not attributes & SEGMENT_PRESENT:
        return False
    code, readable_or_writable = bool(kind & 8), bool(kind & 2)
    return {
        "cs": code,
        "ss": not code and readable_or_writable,
        "ds": not code or readable_or_writable,
        "es": not code or readable_or_writable,
        "tr": True,
    }[name]


def up(call: Call, _argument: Any) -> int:
    """Let a vCPU run."""
    vcpu = target(call)
    if not vcpu.initialised:
        return -Errno.EINVAL
    if vcpu.down:
        vcpu.down = False
        call.machine.vcpus[vcpu.vcpu_id].halted = False
        clock.change_runstate(call.machine, call.domain, vcpu, RunState.RUNNABLE)
    return 0


def down(call: Call, _argument: Any) -> int:
    """Stop a vCPU; the last one down ends the domain."""
    vcpu = target(call)
    if not any(other is not vcpu and not other.down for other in call.domain.vcpus):
        clock.shut_down(call.machine, call.domain, 0)
        return 0
    if not vcpu.down:
        vcpu.down = True
        call.machine.vcpus[vcpu.vcpu_id].halted = True
        clock.change_runstate(call.machine, call.domain, vcpu, RunState.OFFLINE)
    return 0


def is_up(call: Call, _argument: Any) -> int:
    """Whether a vCPU may run."""
    return int(not target(call).down)


def send_nmi(call: Call, handle: int) -> int:
    """Raise an NMI."""
    if handle:
        return -Errno.EINVAL
    vcpu = target(call)
    real = call.machine.vcpus[vcpu.vcpu_id]
    io.devices(call.machine, real).lapics[vcpu.vcpu_id].nmi_pending = True
    if not vcpu.down:
        io.wake(call.machine, real)
    return 0


def get_physid(call: Call, _argument: Any) -> int:
    """Only a pinned hardware domain may know its processors."""
    return -Errno.EINVAL


# Timers -----------------------------------------------------------------------------------------------------------


def set_periodic(call: Call, a: Any) -> int:
    """Start the periodic timer: a millisecond at least."""
    if not MILLISECOND <= a.period_ns <= MAX_PERIOD:
        return -Errno.EINVAL
    vcpu = target(call)
    vcpu.period, vcpu.next_period = a.period_ns, clock.now(call.machine) + a.period_ns
    return 0


def stop_periodic(call: Call, _argument: Any) -> int:
    """Stop it."""
    target(call).period = 0
    return 0


def set_singleshot(call: Call, a: Any) -> int:
    """Start one's own singleshot timer; one that lies in the past fires at once."""
    vcpu = target(call)
    if a.timeout_abs_ns < clock.now(call.machine):
        vcpu.singleshot = 0
        events.raise_timer(call.machine, call.domain, vcpu)
    else:
        vcpu.singleshot = a.timeout_abs_ns
    return 0


def stop_singleshot(call: Call, _argument: Any) -> int:
    """Stop one's own singleshot timer."""
    if target(call) is not call.me:
        return -Errno.EINVAL
    call.me.singleshot = 0
    return 0


# Areas ------------------------------------------------------------------------------------------------------------


def area_spa(call: Call, gpa: int, length_bytes: int) -> int:
    """SPA of an area at guest-physical `gpa`, or a negated `Errno`: ENXIO across a page or misaligned, EINVAL where
    no page is, EACCES where Xen may not write (a page that the RMP gives to the guest: UNVERIFIED).
    """
    if gpa >> PAGE_SHIFT != gpa + length_bytes - 1 >> PAGE_SHIFT or gpa % call.long_bytes:
        return -Errno.ENXIO
    spa = page_of(call.machine, call.domain, gpa >> PAGE_SHIFT)
    if spa is None:
        return -Errno.EINVAL
    return spa + (gpa & PAGE_MASK) if may_write(call.machine, spa) else -Errno.EACCES


def register_vcpu_info(call: Call, a: Any) -> int:
    """Move vcpu_info to a page of the guest's, once; it gets an upcall so that nothing is lost."""
    vcpu = target(call)
    gpa = (a.mfn << PAGE_SHIFT) + a.page_offset
    if gpa >> 64 or gpa >> PAGE_SHIFT != a.mfn:
        return -Errno.EINVAL
    if vcpu.info_registered:
        return -Errno.EBUSY
    spa = area_spa(call, gpa, VCPU_INFO_BYTES)
    if spa < 0:
        return spa
    machine = call.machine
    if vcpu.info_spa:
        store(machine, spa, fetch(machine, vcpu.info_spa, VCPU_INFO_BYTES))
    vcpu.info_spa, vcpu.info_registered = spa, True
    offset, ones = (4, b"\xff" * 4) if call.domain.narrow else (8, b"\xff" * 8)
    store(machine, spa + offset, ones)
    events.mark_events_pending(machine, call.domain, vcpu)
    clock.update_time(machine, vcpu)
    return 0


def get_runstate(call: Call, handle: int) -> int:
    """Copy the runstate out."""
    data = clock.runstate(call.machine, call.domain, target(call))
    return 0 if call.copy_out(handle, data) else -Errno.EFAULT


def register_runstate_linear(call: Call, a: Any) -> int:
    """Register the runstate area by linear address; that it cannot be written is no error."""
    vcpu = target(call)
    vcpu.runstate_gva = a.addr
    call.copy_out(a.addr, clock.runstate(call.machine, call.domain, vcpu))
    return 0


def register_runstate_physical(call: Call, a: Any) -> int:
    """Register the runstate area by guest-physical address."""
    vcpu = target(call)
    if a.addr == NOWHERE:
        vcpu.runstate_spa = 0
        return 0
    spa = area_spa(call, a.addr, VcpuRunstateInfo.SIZE)
    if spa < 0:
        return spa
    vcpu.runstate_spa = spa
    store(call.machine, spa, clock.runstate(call.machine, call.domain, vcpu))
    return 0


def register_time_linear(call: Call, a: Any) -> int:
    """Register another place for the clock by linear address."""
    target(call).time_gva = a.addr
    call.copy_out(a.addr, clock.time_info(call.machine, 2))
    return 0


def register_time_physical(call: Call, a: Any) -> int:
    """Register another place for the clock by guest-physical address."""
    vcpu = target(call)
    if a.addr == NOWHERE:
        vcpu.time_spa = 0
        return 0
    spa = area_spa(call, a.addr, VcpuTimeInfo.SIZE)
    if spa < 0:
        return spa
    vcpu.time_spa = spa
    clock.update_time(call.machine, vcpu)
    return 0


# FastABI ----------------------------------------------------------------------------------------------------------


def fast_initialise(call: Call, a: Any) -> int:
    """The context lies in a page by frame number."""
    spa = page_of(call.machine, call.domain, a.gfn)
    if spa is None:
        return -Errno.EINVAL
    return initialise(call, VcpuHvmContext.from_bytes(fetch(call.machine, spa, VcpuHvmContext.SIZE)))


def fast_runstate(call: Call, _argument: Any) -> int:
    """State, entry time and the four times in registers 2 to 7."""
    layout = VcpuRunstateInfo32 if call.domain.narrow else VcpuRunstateInfo
    info: Any = layout.from_bytes(clock.runstate(call.machine, call.domain, target(call)))
    for number, value in enumerate((info.state, info.state_entry_time, *info.time), start=2):
        setattr(call.frame.registers, FAST_REGISTERS[number], value)
        call.frame.written.add(FAST_REGISTERS[number])
    return 0


OPERATIONS: dict[int, Operation] = {
    Vcpuop.INITIALISE: Operation(initialise, VcpuHvmContext),
    Vcpuop.UP: Operation(up, fast=()),
    Vcpuop.DOWN: Operation(down, fast=()),
    Vcpuop.IS_UP: Operation(is_up, fast=()),
    Vcpuop.GET_RUNSTATE_INFO: Operation(get_runstate),
    Vcpuop.REGISTER_RUNSTATE_MEMORY_AREA: Operation(register_runstate_linear, Area),
    Vcpuop.SET_PERIODIC_TIMER: Operation(set_periodic, PeriodicTimer, (), (("period_ns", 3),)),
    Vcpuop.STOP_PERIODIC_TIMER: Operation(stop_periodic, fast=()),
    Vcpuop.SET_SINGLESHOT_TIMER: Operation(
        set_singleshot, Shape(SingleshotTimer, SingleshotTimer32), (), (("timeout_abs_ns", 3), ("flags", 4))
    ),
    Vcpuop.STOP_SINGLESHOT_TIMER: Operation(stop_singleshot, fast=()),
    Vcpuop.REGISTER_VCPU_INFO: Operation(register_vcpu_info, RegisterVcpuInfo, (), (("mfn", 3), ("page_offset", 4))),
    Vcpuop.SEND_NMI: Operation(send_nmi, fast=()),
    Vcpuop.GET_PHYSID: Operation(get_physid, fast=()),
    Vcpuop.REGISTER_VCPU_TIME_MEMORY_AREA: Operation(register_time_linear, Area),
    Vcpuop.REGISTER_RUNSTATE_PHYS_AREA: Operation(register_runstate_physical, Area, (), (("addr", 3),)),
    Vcpuop.REGISTER_VCPU_TIME_PHYS_AREA: Operation(register_time_physical, Area, (), (("addr", 3),)),
}
FAST_OPERATIONS: dict[int, Operation] = {
    **OPERATIONS,
    Vcpuop.GET_RUNSTATE_INFO: Operation(fast_runstate, fast=()),
    Vcpuop.INITIALISE: Operation(fast_initialise, ContextPage, (), (("gfn", 3),)),
}


def vcpu_op(call: Call) -> int:
    """Hypercall vcpu_op of cmd, vcpuid, ptr."""
    if call.abi is Abi.FAST:
        call.args = (call.args[0], call.frame.registers.rsi & 0xFFFF_FFFF, 0)
    command, index, handle = call.args
    if index >= len(call.domain.vcpus):
        return -Errno.ENOENT
    if command == Vcpuop.SET_SINGLESHOT_TIMER and target(call) is not call.me:
        return -Errno.EINVAL
    return run_operation(call, FAST_OPERATIONS if call.abi is Abi.FAST else OPERATIONS, command, handle)
