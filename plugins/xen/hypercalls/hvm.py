"""hvm_op and the parameters. Source: Xen xen/arch/x86/hvm/hvm.c (hvm_allow_set_param, hvm_set_param, do_hvm_op)."""

from __future__ import annotations

from typing import Any

from sevlab.plugins.xen import clock, events
from sevlab.plugins.xen.arguments import GetMemType, GetTime, HvmParam, PagetableDying, UpcallVector, Xentrace
from sevlab.plugins.xen.call import Call
from sevlab.plugins.xen.frames import frame_spa
from sevlab.plugins.xen.numbers import NR_PARAMS, Errno, Hvmop, Param
from sevlab.plugins.xen.operations import Operation, run_operation
from sevlab.plugins.xen.records import Traced
from sevlab.plugins.xen.state import Domain, vcpu_of

GUEST_SETS = frozenset(
    (
        Param.CALLBACK_IRQ,
        Param.VM86_TSS,
        Param.VM86_TSS_SIZED,
        Param.ACPI_IOPORTS_LOCATION,
        Param.VM_GENERATION_ID_ADDR,
        Param.STORE_EVTCHN,
        Param.CONSOLE_EVTCHN,
        Param.X87_FIP_WIDTH,
    )
)
GUEST_READS = GUEST_SETS | {Param.STORE_PFN, Param.CONSOLE_PFN, Param.ALTP2M}
DEPRECATED = frozenset(
    (
        Param.PAE_ENABLED,
        Param.DM_DOMAIN,
        Param.MEMORY_EVENT_CR0,
        Param.MEMORY_EVENT_CR3,
        Param.MEMORY_EVENT_CR4,
        Param.MEMORY_EVENT_INT3,
        Param.NESTEDHVM,
        Param.MEMORY_EVENT_SINGLE_STEP,
        Param.BUFIOREQ_EVTCHN,
        Param.MEMORY_EVENT_MSR,
    )
)
ONCE = frozenset(
    (
        Param.VIRIDIAN,
        Param.IOREQ_PFN,
        Param.BUFIOREQ_PFN,
        Param.IOREQ_SERVER_PFN,
        Param.NR_IOREQ_SERVER_PAGES,
        Param.MCA_CAP,
    )
)
TIMER_MODE_MAX, SHUTDOWN_MAX = 3, 5
TSS_BYTES = 104
TSS_MAX_BYTES = TSS_BYTES + 256 // 8 + 0x10000 // 8 + 1
OLD_TSS_BYTES = 128
RAM_RW, MMIO_DM = 0, 2


def allowed(call: Call, domain: Domain, index: int, value: int) -> int:
    """Whether a parameter may be set: 0 or a negated `Errno`."""
    if not call.may(domain):
        return -Errno.EPERM
    if index == Param.ALTP2M:
        return -Errno.EEXIST
    if index in DEPRECATED:
        return -Errno.EINVAL
    if index not in GUEST_SETS and domain is call.domain:
        return -Errno.EPERM
    before = domain.params.get(index, 0)
    return -Errno.EEXIST if index in ONCE and before and before != value else 0


def set_param(call: Call, a: Any) -> int:
    """Set a parameter."""
    if a.index >= NR_PARAMS:
        return -Errno.EINVAL
    domain = call.any_domain(a.domid)
    if domain is None:
        return -Errno.ESRCH
    result = allowed(call, domain, a.index, a.value)
    if result:
        return result
    index, value = a.index, a.value
    if index == Param.CALLBACK_IRQ:
        set_callback(call, domain, value)
        return 0
    if index == Param.VM86_TSS:
        if value >> 32:
            return _bad_tss(call, domain)
        index, value = Param.VM86_TSS_SIZED, value | OLD_TSS_BYTES << 32 if value else 0
    elif index == Param.VM86_TSS_SIZED:
        if value >> 32 < TSS_BYTES:
            return _bad_tss(call, domain)
        value = value & 0xFFFF_FFFF | min(value >> 32, TSS_MAX_BYTES) << 32
    elif not _legal(index, value):
        return -Errno.EINVAL
    domain.params[index] = value
    return 0


def _bad_tss(call: Call, domain: Domain) -> int:
    """A TSS that cannot work crashes the domain that set it for itself."""
    if domain is call.domain:
        clock.shut_down(call.machine, domain, 3)
    return -Errno.EINVAL


def _legal(index: int, value: int) -> bool:
    if index == Param.TIMER_MODE:
        return value <= TIMER_MODE_MAX
    if index == Param.TRIPLE_FAULT_REASON:
        return value <= SHUTDOWN_MAX
    if index == Param.X87_FIP_WIDTH:
        return value in (0, 4, 8)
    if index == Param.ACPI_IOPORTS_LOCATION:
        return value in (0, 1)
    if index == Param.ACPI_S_STATE:
        return value in (0, 3)
    if index == Param.NR_IOREQ_SERVER_PAGES:
        return 0 < value <= 64
    return True


def set_callback(call: Call, domain: Domain, via: int) -> None:
    """Choose how vCPU 0 (or every vCPU, by vector) is told of events; also latches the layout of shared_info."""
    events.release_line(call.machine, domain)
    domain.params[Param.CALLBACK_IRQ] = via
    if domain is call.domain:
        clock.latch_width(call.machine, domain, narrow=call.narrow)
    for vcpu in domain.vcpus:
        if not vcpu.down and vcpu.info_spa and call.machine.memory.read(vcpu.info_spa, 1, None)[0]:
            events.assert_upcall(call.machine, domain, vcpu)


def get_param(call: Call, a: Any) -> int:
    """Read a parameter."""
    if a.index >= NR_PARAMS:
        return -Errno.EINVAL
    domain = call.any_domain(a.domid)
    if domain is None:
        return -Errno.ESRCH
    if not call.may(domain):
        return -Errno.EPERM
    if a.index in DEPRECATED:
        return -Errno.EINVAL
    if a.index not in GUEST_READS and domain is call.domain:
        return -Errno.EPERM
    if a.index == Param.VM86_TSS:
        a.value = domain.params.get(Param.VM86_TSS_SIZED, 0) & 0xFFFF_FFFF
    else:
        a.value = domain.params.get(a.index, 0)
    return 0


def flush_tlbs(call: Call, handle: int) -> int:
    """Drop translations of all vCPUs; takes no argument."""
    if handle:
        return -Errno.EINVAL
    call.machine.access.forget()
    return 0


def pagetable_dying(call: Call, a: Any) -> int:
    """For shadow paging, which nobody has here."""
    domain = call.any_domain(a.domid)
    if domain is None:
        return -Errno.ESRCH
    return -Errno.EOPNOTSUPP if domain is not call.domain else -Errno.EINVAL


def get_time(call: Call, a: Any) -> int:
    """Xen's time."""
    a.now = clock.now(call.machine) & (1 << 64) - 1
    return 0


def get_mem_type(call: Call, a: Any) -> int:
    """What is at a frame: RAM, or nothing that is not emulated."""
    domain = call.any_domain(a.domid)
    if domain is None:
        return -Errno.ESRCH
    if not call.may(domain):
        return -Errno.EPERM
    a.mem_type = RAM_RW if frame_spa(call.machine, domain, a.pfn) is not None else MMIO_DM
    return 0


def set_upcall_vector(call: Call, a: Any) -> int:
    """Give a vCPU a vector of its own for upcalls, at its local APIC."""
    if a.vector < 0x10:
        return -Errno.EINVAL
    vcpu = vcpu_of(call.machine, call.domain, a.vcpu)
    if vcpu is None:
        return -Errno.ENOENT
    vcpu.upcall_vector = a.vector
    events.assert_upcall(call.machine, call.domain, vcpu)
    return 0


def guest_request(call: Call, handle: int) -> int:
    """Ask a monitor for attention: nobody monitors."""
    return -Errno.EINVAL if handle else 0


def altp2m(call: Call, _handle: int) -> int:
    """Alternate guest-physical maps are off."""
    return -Errno.EOPNOTSUPP


PARAM_FAST = (("domid", 2), ("index", 3))
TRACE_GUEST, TRACE_SUBCLASS_SHIFT = 0x0800_F000, 12
"""Source: Xen xen/include/public/trace.h."""


def xentrace(call: Call, a: Any) -> int:
    """Put an event of the guest's class into the trace, with up to seven words."""
    if a.extra_bytes % 4 or a.extra_bytes > len(a.extra) or a.event >> TRACE_SUBCLASS_SHIFT:
        return -Errno.EINVAL
    call.machine.emit(Traced(call.vcpu.vcpu_id, a.event | TRACE_GUEST, a.extra[: a.extra_bytes]))
    return 0


OPERATIONS: dict[int, Operation] = {
    Hvmop.SET_PARAM: Operation(set_param, HvmParam, (), (*PARAM_FAST, ("value", 4))),
    Hvmop.GET_PARAM: Operation(get_param, HvmParam, ("value",), PARAM_FAST, (("value", 4),)),
    Hvmop.FLUSH_TLBS: Operation(flush_tlbs, fast=()),
    Hvmop.PAGETABLE_DYING: Operation(pagetable_dying, PagetableDying),
    Hvmop.GET_TIME: Operation(get_time, GetTime, ("now",), (), (("now", 2),)),
    Hvmop.XENTRACE: Operation(xentrace, Xentrace),
    Hvmop.GET_MEM_TYPE: Operation(
        get_mem_type, GetMemType, ("mem_type",), (("domid", 2), ("pfn", 3)), (("mem_type", 4),)
    ),
    Hvmop.SET_EVTCHN_UPCALL_VECTOR: Operation(set_upcall_vector, UpcallVector, (), (("vcpu", 2), ("vector", 3))),
    Hvmop.GUEST_REQUEST_VM_EVENT: Operation(guest_request),
    Hvmop.ALTP2M: Operation(altp2m),
}


def hvm_op(call: Call) -> int:
    """Hypercall hvm_op of op, ptr."""
    command, handle = call.args
    return run_operation(call, OPERATIONS, command, handle)
