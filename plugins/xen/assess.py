"""Which hypercall survives encryption with the legacy ABI, and what takes its place when it does not.

One row for each sub-operation that a guest may use. A buffer passed by linear address is lost as soon as the guest's
page tables are private; what is only in registers goes on working, through the GHCB under SEV-ES.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from sevlab.core.porting import CallFate
from sevlab.plugins.xen.hypercalls import event_channel, grant_table, hvm, memory, other, sched, vcpu, version
from sevlab.plugins.xen.hypercalls.table import TABLE
from sevlab.plugins.xen.numbers import (
    HYPERV_FLAG,
    Evtchnop,
    Gnttabop,
    HvCall,
    Hvmop,
    Memop,
    Nr,
    Physdevop,
    Schedop,
    Vcpuop,
    Version,
)
from sevlab.plugins.xen.operations import Operation


class Fate(Enum):
    """What becomes of a call that uses the legacy ABI."""

    SURVIVES = "works: registers only"
    LINEAR = "fails: its buffer is at a linear address"
    PHYSICAL = "works with a shared parameter page: its address is guest-physical in every ABI"
    REFUSED = "not for guests, encrypted or not"


class Survival(NamedTuple):
    """One sub-operation; `command` is -1 for a call without. `physical` and `fast` say which ABI replaces it."""

    number: int
    name: str
    command: int
    fate: Fate
    physical: bool
    fast: bool
    instead: str = ""
    shared: str = ""
    """What must be shared besides the arguments."""


NO_BUFFER: dict[int, frozenset[int]] = {
    Nr.SCHED_OP: frozenset((Schedop.YIELD, Schedop.BLOCK)),
    Nr.VCPU_OP: frozenset(
        (
            Vcpuop.UP,
            Vcpuop.DOWN,
            Vcpuop.IS_UP,
            Vcpuop.STOP_PERIODIC_TIMER,
            Vcpuop.STOP_SINGLESHOT_TIMER,
            Vcpuop.SEND_NMI,
        )
    ),
    Nr.HVM_OP: frozenset((Hvmop.FLUSH_TLBS, Hvmop.GUEST_REQUEST_VM_EVENT)),
    Nr.XEN_VERSION: frozenset((Version.VERSION, Version.PAGESIZE)),
    Nr.MEMORY_OP: frozenset((Memop.MAXIMUM_RAM_PAGE,)),
}
"""Sub-operations whose handle is NULL or not looked at."""

REFUSED: dict[int, frozenset[int]] = {
    Nr.SCHED_OP: frozenset((Schedop.REMOTE_SHUTDOWN, Schedop.PIN_OVERRIDE)),
    Nr.VCPU_OP: frozenset((Vcpuop.GET_PHYSID,)),
    Nr.MEMORY_OP: frozenset(
        command for command, operation in memory.OPERATIONS.items() if operation.run is memory.toolstack_only
    ),
    Nr.HVM_OP: frozenset((Hvmop.PAGETABLE_DYING, Hvmop.ALTP2M)),
}
NEVER = frozenset(
    (
        Nr.PLATFORM_OP,
        Nr.XSM_OP,
        Nr.SYSCTL,
        Nr.DOMCTL,
        Nr.ARGO_OP,
        Nr.XENPMU_OP,
        Nr.DM_OP,
        Nr.HYPFS_OP,
        Nr.COCO_OP,
        Nr.CONSOLE_IO,
    )
)

INSTEAD: dict[tuple[int, int], str] = {
    (Nr.VCPU_OP, Vcpuop.REGISTER_RUNSTATE_MEMORY_AREA): "register_runstate_phys_area",
    (Nr.VCPU_OP, Vcpuop.REGISTER_VCPU_TIME_MEMORY_AREA): "register_vcpu_time_phys_area",
    (Nr.VCPU_OP, Vcpuop.SET_SINGLESHOT_TIMER): "set_timer_op",
    (Nr.CONSOLE_IO, -1): "the console ring",
}
SHARED: dict[tuple[int, int], str] = {
    (Nr.VCPU_OP, Vcpuop.REGISTER_VCPU_INFO): "the page of vcpu_info",
    (Nr.VCPU_OP, Vcpuop.REGISTER_RUNSTATE_PHYS_AREA): "the runstate area",
    (Nr.VCPU_OP, Vcpuop.REGISTER_VCPU_TIME_PHYS_AREA): "the time area",
    (Nr.EVENT_CHANNEL_OP, Evtchnop.INIT_CONTROL): "the control block",
    (Nr.EVENT_CHANNEL_OP, Evtchnop.EXPAND_ARRAY): "the event array",
    (Nr.GRANT_TABLE_OP, Gnttabop.COPY): "both pages",
    (Nr.GRANT_TABLE_OP, Gnttabop.MAP_GRANT_REF): "the granted page",
    (Nr.GRANT_TABLE_OP, Gnttabop.SETUP_TABLE): "the grant frames",
    (Nr.MEMORY_OP, Memop.ADD_TO_PHYSMAP): "the page that is mapped, if it is Xen's",
}

COMMANDS: dict[int, tuple[type, dict[int, Operation], frozenset[int]]] = {
    Nr.MEMORY_OP: (
        Memop,
        memory.OPERATIONS,
        frozenset(
            (
                *memory.RESERVATIONS,
                *memory.QUESTIONS,
                Memop.ADD_TO_PHYSMAP,
                Memop.ADD_TO_PHYSMAP_BATCH,
                Memop.REMOVE_FROM_PHYSMAP,
                Memop.MAXIMUM_RAM_PAGE,
            )
        ),
    ),
    Nr.XEN_VERSION: (Version, version.OPERATIONS, frozenset((*version.FIXED, *version.VARIABLE))),
    Nr.GRANT_TABLE_OP: (Gnttabop, grant_table.FAST_OPERATIONS, frozenset(grant_table.BATCHES)),
    Nr.VCPU_OP: (Vcpuop, vcpu.FAST_OPERATIONS, frozenset()),
    Nr.SCHED_OP: (Schedop, sched.FAST_OPERATIONS, frozenset()),
    Nr.EVENT_CHANNEL_OP: (Evtchnop, event_channel.OPERATIONS, frozenset()),
    Nr.PHYSDEV_OP: (Physdevop, other.PHYSDEV_OPERATIONS, frozenset()),
    Nr.HVM_OP: (Hvmop, hvm.OPERATIONS, frozenset()),
}
"""By number: names of the sub-operations, those in a table, and those handled apart."""


def _rows() -> tuple[Survival, ...]:
    rows: list[Survival] = []
    for number, entry in TABLE.items():
        if number in NEVER:
            rows.append(Survival(number, entry.name, -1, Fate.REFUSED, False, False, INSTEAD.get((number, -1), "")))
            continue
        if number not in COMMANDS:
            fate = Fate.LINEAR if number == Nr.MULTICALL else Fate.SURVIVES
            rows.append(Survival(number, entry.name, -1, fate, fate is Fate.LINEAR, False))
            continue
        names, operations, apart = COMMANDS[number]
        rows += [
            _row(number, f"{entry.name} {names(command).name.lower()}", command, operations.get(command))
            for command in sorted(apart | operations.keys())
        ]
    rows += [
        Survival(HYPERV_FLAG | code, f"hyper-v {code.name.lower()}", -1, Fate.PHYSICAL, False, False)
        for code in HvCall
        if code not in (HvCall.NOTIFY_LONG_SPIN_WAIT, HvCall.EXT_CALL_QUERY_CAPABILITIES)
    ]
    return tuple(rows)


def _row(number: int, name: str, command: int, operation: Operation | None) -> Survival:
    fast = operation is not None and operation.fast is not None
    if command in REFUSED.get(number, ()):
        fate = Fate.REFUSED
    elif command in NO_BUFFER.get(number, ()):
        fate = Fate.SURVIVES
    else:
        fate = Fate.LINEAR
    where = number, command
    linear = fate is Fate.LINEAR
    return Survival(number, name, command, fate, linear, fast and linear, INSTEAD.get(where, ""), SHARED.get(where, ""))


SURVIVAL: tuple[Survival, ...] = _rows()
"""Every hypercall and sub-operation of a guest."""


def survival(number: int) -> tuple[Survival, ...]:
    """The rows of one hypercall number, as an exit trace has it in EAX: the sub-operation is in another register."""
    return tuple(row for row in SURVIVAL if row.number == number)


def fates() -> dict[int, tuple[CallFate, ...]]:
    """The same for `sevlab assess`, by number."""
    found: dict[int, tuple[CallFate, ...]] = {}
    for row in SURVIVAL:
        call, _, operation = row.name.partition(" ")
        instead = (
            *(("the FastABI",) if row.fast else ()),
            *(("the physical-address ABI",) if row.physical else ()),
            *((row.instead,) if row.instead else ()),
        )
        fate = CallFate(
            call,
            operation,
            row.fate.value,
            survives=row.fate is Fate.SURVIVES,
            allowed=row.fate is not Fate.REFUSED,
            instead=instead,
            shared=row.shared,
        )
        found[row.number] = (*found.get(row.number, ()), fate)
    return found


def markdown_table() -> str:
    """The table for documentation."""
    lines = ["| Call | Legacy ABI, encrypted | Physical | FastABI | Instead | Must be shared |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row in SURVIVAL:
        cells = (
            row.name,
            row.fate.value,
            "yes" if row.physical else "-",
            "yes" if row.fast else "-",
            row.instead,
            row.shared,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
