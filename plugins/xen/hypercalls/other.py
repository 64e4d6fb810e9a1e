"""The small ones: console_io, vm_assist, multicall, physdev_op, dm_op, coco_op, and what only toolstacks may do.

Source: Xen xen/drivers/char/console.c, xen/common/{kernel,multicall}.c, xen/arch/x86/{physdev,irq}.c,
xen/arch/x86/hvm/dm.c; coco_op: Vates xen/include/public/hvm/coco.h.
"""

from __future__ import annotations

from struct import Struct
from typing import Any

from sevlab.plugins.xen.arguments import (
    ControlHead,
    DmOpBuf,
    DmOpBuf32,
    FreePirq,
    IrqStatusQuery,
    MapPirq,
    MapPirq32,
    PhysdevEoi,
    PlatformStatus,
    PrepareInitialMem,
    Shape,
    UnmapPirq,
)
from sevlab.plugins.xen.call import Call
from sevlab.plugins.xen.events import CALLBACK_VECTOR, callback
from sevlab.plugins.xen.frames import page_of
from sevlab.plugins.xen.hypercalls.event_channel import NR_PIRQS
from sevlab.plugins.xen.layout import MulticallEntry, MulticallEntry32
from sevlab.plugins.xen.numbers import Domid, Errno, Nr, Physdevop
from sevlab.plugins.xen.operations import Operation, run_operation, signed
from sevlab.plugins.xen.state import xen

CONSOLE_WRITE, CONSOLE_READ = 0, 1
CONSOLE_CHUNK = 127
CONSOLE_KEPT = 4096
"""Bytes of a domain's console output that the model keeps."""
INT_MAX = (1 << 31) - 1


def console_io(call: Call) -> int:
    """Hypercall console_io of cmd, count, ptr: for the control domain; in debug builds everybody may write."""
    command, count, handle = call.args
    if not call.domain.is_control and not (call.debug_build and command == CONSOLE_WRITE):
        return -Errno.EPERM
    if command == CONSOLE_READ:
        return -Errno.E2BIG if count > INT_MAX else 0  # nobody types
    if command != CONSOLE_WRITE:
        return -Errno.ENOSYS
    first = True
    while count:
        if not first and call.preempt_check():
            return call.continue_(Nr.CONSOLE_IO, CONSOLE_WRITE, count, handle)
        first = False
        length = min(count, CONSOLE_CHUNK)
        data = call.copy_in(handle, length)
        if data is None:
            return -Errno.EFAULT
        if not call.domain.is_control:
            data = bytes(byte for byte in data if 0x20 <= byte < 0x7F or byte in b"\n\t")
        call.domain.console = (call.domain.console + data)[-CONSOLE_KEPT:]
        handle, count = handle + length & call.mask, count - length
    return 0


# multicall --------------------------------------------------------------------------------------------------------

ENTRY = Shape(MulticallEntry, MulticallEntry32)
WORDS, WORDS_32 = Struct("<8Q"), Struct("<8I")
"""An entry is eight unsigned longs of the caller: number, result, six arguments. This is how it is read."""
CONSUMED = 0xAA


def multicall(call: Call) -> int:
    """Hypercall multicall of ptr, nr: entries in order, each with its result; one that is preempted is written back
    changed, and the multicall goes on with it. An entry's buffers are found in the ABI of the multicall itself.
    """
    handle, count = call.args
    if call.in_multicall:
        return -Errno.EINVAL
    layout, words = call.layout(ENTRY), WORDS_32 if call.narrow else WORDS
    handlers = call.machine.tables.hypercalls
    call.in_multicall = True
    result_at, width = layout.FIELDS["result"].offset, call.long_bytes
    for index in range(count):
        at = handle + index * layout.SIZE & call.mask
        if index and call.preempt_check():
            return call.continue_(Nr.MULTICALL, at, count - index)
        data = call.copy_in(at, layout.SIZE)
        if data is None:
            return -Errno.EFAULT
        number, _, *values = words.unpack(data)
        handler = handlers.get(number)
        if handler is None:
            result = -Errno.ENOSYS
        else:
            call.number = number
            call.args = handler.cut(values, narrow=call.narrow)
            result = handler.run(call)
        continuation, call.continuation = call.continuation, None
        if call.debug_build:
            call.copy_out(at, bytes((CONSUMED,)) * layout.SIZE)
        if not call.copy_out(at + result_at, (result & call.mask).to_bytes(width, "little")):
            return -Errno.EFAULT
        if continuation is not None:
            number, args = continuation
            entry: Any = layout.from_bytes(data)
            changed = entry.replace(op=number, args=tuple(arg & call.mask for arg in (*args, *values[len(args) :])))
            if not call.copy_out(at, changed.to_bytes()):
                return -Errno.EFAULT
            return call.continue_(Nr.MULTICALL, at, count - index)
        if call.vcpu.stopped:
            break
    return 0


# Assists ----------------------------------------------------------------------------------------------------------

RUNSTATE_UPDATE_FLAG = 5
ASSIST_ENABLE, ASSIST_DISABLE = 0, 1


def vm_assist(call: Call) -> int:
    """Hypercall vm_assist of cmd, type: an HVM guest has one, the update flag of runstate areas."""
    command, kind = call.args
    if kind != RUNSTATE_UPDATE_FLAG:
        return -Errno.EINVAL
    if command == ASSIST_ENABLE:
        call.domain.assists |= 1 << kind
    elif command == ASSIST_DISABLE:
        call.domain.assists &= ~(1 << kind)
    else:
        return -Errno.ENOSYS
    return 0


# physdev_op -------------------------------------------------------------------------------------------------------

MAP_GSI = 1
GSIS = 48
"""GSIs of a guest in Xen. Source: xen/arch/x86/include/asm/hvm/irq.h, NR_HVM_DOMU_IRQS (pins of its I/O APIC)."""
NEEDS_EOI = 1
FIRST_FREE_PIRQ = 16


def eoi(call: Call, a: Any) -> int:
    """End of interrupt of a PIRQ: for an emulated one nothing is left to do."""
    if a.irq >= NR_PIRQS or (a.irq not in call.domain.pirqs and a.irq not in call.domain.pirq_ports):
        return -Errno.EINVAL
    return 0


def irq_status(call: Call, a: Any) -> int:
    """Whether a PIRQ needs an EOI: always."""
    if a.irq >= NR_PIRQS or a.irq not in call.domain.pirqs:
        return -Errno.EINVAL
    a.flags = NEEDS_EOI
    return 0


def map_pirq(call: Call, a: Any) -> int:
    """Let a PIRQ stand for an emulated GSI; only where events come by vector. A GSI or PIRQ that is mapped already
    stays as it is, and that is no error.
    """
    domain = call.any_domain(a.domid)
    if domain is None:
        return -Errno.ESRCH
    if domain is not call.domain:
        return -Errno.EPERM
    if callback(domain)[0] != CALLBACK_VECTOR and not domain.vcpus[0].upcall_vector:
        return -Errno.EINVAL
    if a.type != MAP_GSI or a.index >= GSIS:
        return -Errno.EINVAL
    pirq = signed(a.pirq, 32)
    if pirq < 0:
        pirq = _free_pirq(call)
    if not 0 <= pirq < NR_PIRQS:
        return -Errno.EINVAL
    a.pirq = pirq
    if pirq in domain.pirqs or a.index in domain.pirqs.values():
        return 0
    domain.pirqs[pirq] = a.index
    return 0


def _free_pirq(call: Call) -> int:
    taken = call.domain.pirqs.keys() | call.domain.pirq_ports.keys()
    return next((pirq for pirq in range(FIRST_FREE_PIRQ, NR_PIRQS) if pirq not in taken), -Errno.ENOSPC)


def unmap_pirq(call: Call, a: Any) -> int:
    """Take a mapping back; one that is not there is no error."""
    domain = call.any_domain(a.domid)
    if domain is None:
        return -Errno.ESRCH
    if domain is not call.domain:
        return -Errno.EPERM
    if a.pirq in domain.pirqs:
        del domain.pirqs[a.pirq]
    return 0


def get_free_pirq(call: Call, a: Any) -> int:
    """A PIRQ that nothing uses; it is not taken by asking."""
    pirq = _free_pirq(call)
    if pirq < 0:
        return pirq
    a.pirq = pirq
    return 0


PHYSDEV_OPERATIONS: dict[int, Operation] = {
    Physdevop.EOI: Operation(eoi, PhysdevEoi),
    Physdevop.IRQ_STATUS_QUERY: Operation(irq_status, IrqStatusQuery, ("flags",)),
    Physdevop.MAP_PIRQ: Operation(map_pirq, Shape(MapPirq, MapPirq32), ("pirq",), always=True),
    Physdevop.UNMAP_PIRQ: Operation(unmap_pirq, UnmapPirq),
    Physdevop.GET_FREE_PIRQ: Operation(get_free_pirq, FreePirq, ("pirq",)),
}


def physdev_op(call: Call) -> int:
    """Hypercall physdev_op of cmd, ptr: those for the hardware domain are ENOSYS for everybody."""
    command, handle = call.args
    return run_operation(call, PHYSDEV_OPERATIONS, command, handle)


# For toolstacks ---------------------------------------------------------------------------------------------------

INTERFACE_VERSIONS = {Nr.SYSCTL: 0x16, Nr.DOMCTL: 0x18, Nr.PLATFORM_OP: 0x0300_0001}
DM_BUFFERS = 2


def control_op(call: Call) -> int:
    """sysctl, domctl, platform_op: a guest is refused after its interface version was read; for the control domain
    none is modelled.
    """
    head = call.read(call.args[0], ControlHead)
    if head is None:
        return -Errno.EFAULT
    if head.interface_version != INTERFACE_VERSIONS[Nr(call.number)]:
        return -Errno.EACCES
    return -Errno.ENOSYS if call.domain.is_control else -Errno.EPERM


def xsm_op(call: Call) -> int:
    """Hypercall xsm_op of ptr: no security module."""
    return -Errno.ENOSYS


def disabled(call: Call) -> int:
    """argo_op and xenpmu_op: off by default."""
    return -Errno.EOPNOTSUPP


def hypfs_op(call: Call) -> int:
    """hypfs_op: for the control domain, and empty."""
    return -Errno.ENOENT if call.domain.is_control else -Errno.EPERM


def dm_op(call: Call) -> int:
    """Hypercall dm_op of domid, nr_bufs, ptr: a device model's calls on another domain. The count is tested before a
    buffer's descriptor is used.
    """
    domid, count, handle = call.args
    if count > DM_BUFFERS:
        return -Errno.E2BIG
    shape = Shape(DmOpBuf, DmOpBuf32)
    size = call.layout(shape).SIZE
    buffers = [call.read(handle + index * size & call.mask, shape) for index in range(count)]
    if any(buffer is None for buffer in buffers):
        return -Errno.EFAULT
    if domid in (Domid.SELF, call.domain.domid):
        return -Errno.EPERM
    target = xen(call.machine).domains.get(domid)
    if target is None:
        return -Errno.ESRCH
    if not call.domain.is_control:
        return -Errno.EPERM
    if not buffers or buffers[0].length < 4 or call.copy_in(buffers[0].handle, 4) is None:
        return -Errno.EFAULT
    return -Errno.EOPNOTSUPP


# coco_op ----------------------------------------------------------------------------------------------------------

AMD_SEV, PLATFORM_SUPPORTED = 1, 1
PLATFORM_ES, PLATFORM_SNP = 1, 2


def platform_status(call: Call, a: Any) -> int:
    """What the host can encrypt: nothing without the plugin for it."""
    names = call.machine.plugins.names
    if "sev" in names:
        a.platform, a.flags = AMD_SEV, PLATFORM_SUPPORTED
        a.platform_flags = (PLATFORM_ES if "sev_es" in names else 0) | (PLATFORM_SNP if "snp" in names else 0)
    else:
        a.platform = a.platform_flags = a.flags = 0
    a.features = a.version_major = a.version_minor = 0
    return 0


def prepare_initial_mem(call: Call, a: Any) -> int:
    """Encrypt pages of a domain that is being built: the range is checked, but the launch itself is done with the
    commands of the Secure Processor.
    """
    domain = xen(call.machine).domains.get(a.domid)
    if domain is None:
        return -Errno.ESRCH
    if not a.count or a.count > domain.max_pages:
        return -Errno.EINVAL
    if any(page_of(call.machine, domain, a.gfn + index) is None for index in (0, a.count - 1)):
        return -Errno.EINVAL
    return -Errno.EOPNOTSUPP


COCO_OPERATIONS: dict[int, Operation] = {
    0: Operation(
        platform_status,
        PlatformStatus,
        ("platform", "platform_flags", "flags", "features", "version_major", "version_minor"),
    ),
    1: Operation(prepare_initial_mem, PrepareInitialMem),
}


def coco_op(call: Call) -> int:
    """Hypercall coco_op of cmd, ptr: of the toolstack, not of guests."""
    command, handle = call.args
    if not call.domain.is_control:
        return -Errno.EPERM
    return run_operation(call, COCO_OPERATIONS, command, handle)
