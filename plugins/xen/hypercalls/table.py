"""Every hypercall that an HVM guest has: number, handler, arguments."""

from __future__ import annotations

from sevlab.core.units import MASK32, MASK64
from sevlab.plugins.xen.dispatch import HypercallEntry
from sevlab.plugins.xen.hypercalls import event_channel, grant_table, hvm, memory, other, sched, vcpu, version
from sevlab.plugins.xen.numbers import Nr

LONG, U32, U16 = MASK64, MASK32, 0xFFFF
"""Types of arguments, as masks; LONG is an unsigned long, a pointer, or a signed 64-bit argument."""

TABLE: dict[int, HypercallEntry] = {
    Nr.PLATFORM_OP: HypercallEntry("platform_op", other.control_op, (LONG,)),
    Nr.MEMORY_OP: HypercallEntry("memory_op", memory.memory_op, (LONG, LONG), fast=True),
    Nr.MULTICALL: HypercallEntry("multicall", other.multicall, (LONG, LONG)),
    Nr.SET_TIMER_OP: HypercallEntry("set_timer_op", sched.set_timer_op, (LONG,), split=True),
    Nr.XEN_VERSION: HypercallEntry("xen_version", version.xen_version, (U32, LONG), fast=True),
    Nr.CONSOLE_IO: HypercallEntry("console_io", other.console_io, (U32, U32, LONG)),
    Nr.GRANT_TABLE_OP: HypercallEntry("grant_table_op", grant_table.grant_table_op, (U32, LONG, U32), fast=True),
    Nr.VM_ASSIST: HypercallEntry("vm_assist", other.vm_assist, (U32, U32)),
    Nr.VCPU_OP: HypercallEntry("vcpu_op", vcpu.vcpu_op, (U32, U32, LONG), fast=True),
    Nr.XSM_OP: HypercallEntry("xsm_op", other.xsm_op, (LONG,)),
    Nr.SCHED_OP: HypercallEntry("sched_op", sched.sched_op, (U32, LONG), fast=True),
    Nr.EVENT_CHANNEL_OP: HypercallEntry("event_channel_op", event_channel.event_channel_op, (U32, LONG), fast=True),
    Nr.PHYSDEV_OP: HypercallEntry("physdev_op", other.physdev_op, (U32, LONG)),
    Nr.HVM_OP: HypercallEntry("hvm_op", hvm.hvm_op, (LONG, LONG), fast=True),
    Nr.SYSCTL: HypercallEntry("sysctl", other.control_op, (LONG,)),
    Nr.DOMCTL: HypercallEntry("domctl", other.control_op, (LONG,)),
    Nr.ARGO_OP: HypercallEntry("argo_op", other.disabled, (U32, LONG, LONG, LONG, LONG)),
    Nr.XENPMU_OP: HypercallEntry("xenpmu_op", other.disabled, (U32, LONG)),
    Nr.DM_OP: HypercallEntry("dm_op", other.dm_op, (U16, U32, LONG)),
    Nr.HYPFS_OP: HypercallEntry("hypfs_op", other.hypfs_op, (U32, LONG, LONG, LONG, LONG)),
    Nr.COCO_OP: HypercallEntry("coco_op", other.coco_op, (U32, LONG)),
}


def markdown_table() -> str:
    """The table for documentation."""
    lines = ["| Number | Hypercall | Arguments | FastABI |", "| --- | --- | --- | --- |"]
    for number, entry in TABLE.items():
        lines.append(f"| {int(number)} | {entry.name} | {len(entry.masks)} | {'yes' if entry.fast else '-'} |")
    return "\n".join(lines)
