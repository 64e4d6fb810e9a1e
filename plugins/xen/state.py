"""What Xen knows of its domains: channels, grants, parameters, frames, vCPUs."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from sevlab.core.state import StateDict, Stateful, new
from sevlab.core.statemachine import StateMachine
from sevlab.plugins.xen.numbers import Errno, Evtchnop
from sevlab.plugins.xen.xenstore.store import Xenstore

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine


class ChannelState(IntEnum):
    """State of a port, numbered as EVTCHNSTAT_*. Source: xen/include/xen/sched.h, ECS_*."""

    FREE = 0
    UNBOUND = 1
    INTERDOMAIN = 2
    PIRQ = 3
    VIRQ = 4
    IPI = 5


CHANNEL = StateMachine(
    name="event channel",
    initial=ChannelState.FREE,
    reject=Errno.EINVAL,
    table={
        ChannelState.FREE: {
            Evtchnop.ALLOC_UNBOUND: ChannelState.UNBOUND,
            Evtchnop.BIND_INTERDOMAIN: ChannelState.INTERDOMAIN,
            Evtchnop.BIND_VIRQ: ChannelState.VIRQ,
            Evtchnop.BIND_IPI: ChannelState.IPI,
            Evtchnop.BIND_PIRQ: ChannelState.PIRQ,
        },
        ChannelState.UNBOUND: {
            Evtchnop.SEND: ChannelState.UNBOUND,
            Evtchnop.BIND_VCPU: ChannelState.UNBOUND,
            Evtchnop.CLOSE: ChannelState.FREE,
        },
        ChannelState.INTERDOMAIN: {
            Evtchnop.SEND: ChannelState.INTERDOMAIN,
            Evtchnop.BIND_VCPU: ChannelState.INTERDOMAIN,
            Evtchnop.CLOSE: ChannelState.FREE,
        },
        ChannelState.PIRQ: {
            Evtchnop.BIND_VCPU: ChannelState.PIRQ,
            Evtchnop.CLOSE: ChannelState.FREE,
        },
        ChannelState.VIRQ: {
            Evtchnop.BIND_VCPU: ChannelState.VIRQ,
            Evtchnop.CLOSE: ChannelState.FREE,
        },
        ChannelState.IPI: {
            Evtchnop.SEND: ChannelState.IPI,
            Evtchnop.CLOSE: ChannelState.FREE,
        },
    },
)
"""What an operation on a port makes of it. Its remote end changes too: UNBOUND becomes INTERDOMAIN by the other's
bind_interdomain, INTERDOMAIN becomes UNBOUND by the other's close. bind_vcpu of a per-vCPU VIRQ is refused besides."""


class Backend(IntEnum):
    """Which service of the control domain is the other end of a channel, where the model plays that domain."""

    NONE = 0
    XENSTORE = 1
    CONSOLE = 2


class EventChannel(Stateful):
    """A port that is not free."""

    port: int = 0
    state: ChannelState = ChannelState.FREE
    remote_domid: int = 0
    remote_port: int = 0
    number: int = 0
    """The VIRQ or PIRQ."""
    vcpu: int = 0
    """Index of the vCPU that is notified."""
    priority: int = 7
    pending: bool = False
    """Raised while its page of the event array is missing (FIFO)."""
    xen_consumer: bool = False
    """Xen's own end: the guest may neither send on it nor close it."""
    backend: Backend = Backend.NONE
    """An interdomain channel to a service of domain 0, whose own end is not there."""


class ActiveGrant(Stateful):
    """A grant that somebody uses. Counts of read-only and of writable uses, and what is pinned."""

    readers: int = 0
    writers: int = 0
    domid: int = 0
    spa: int = 0
    start: int = 0
    length: int = 0
    is_sub_page: bool = False
    source_domid: int = 0
    source_ref: int = 0


class Mapping(Stateful):
    """A maptrack entry: what a handle stands for."""

    domid: int = 0
    ref: int = 0
    flags: int = 0
    spa: int = 0


class GrantTable(Stateful):
    """A domain's grants. `frames` and `status_frames` are SPAs of the pages shared with it."""

    table_version: int = 1
    frames: tuple[int, ...] = ()
    status_frames: tuple[int, ...] = ()
    active: StateDict[int, ActiveGrant] = new(StateDict)
    maptrack: StateDict[int, Mapping] = new(StateDict)


class RunState(IntEnum):
    """State of a vCPU in vcpu_runstate_info."""

    RUNNING = 0
    RUNNABLE = 1
    BLOCKED = 2
    OFFLINE = 3


class XenVcpu(Stateful):
    """What Xen keeps of one vCPU; addresses of areas are 0 where there is none, times are nanoseconds."""

    index: int = 0
    vcpu_id: int = 0
    info_spa: int = 0
    info_registered: bool = False
    upcall_vector: int = 0
    initialised: bool = False
    down: bool = True
    polling: tuple[int, ...] | None = None
    """Ports that sched_op poll waits for; None when it does not wait."""
    poll_until: int = 0
    singleshot: int = 0
    period: int = 0
    next_period: int = 0
    runstate_spa: int = 0
    runstate_gva: int = 0
    time_spa: int = 0
    time_gva: int = 0
    times: tuple[int, int, int, int] = (0, 0, 0, 0)
    entered: int = 0
    """When the present runstate began."""
    run_state: RunState = RunState.OFFLINE
    virqs: StateDict[int, int] = new(StateDict)
    """Port by VIRQ."""
    hyperv_assist: int = 0
    hyperv_crash: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
    control_spa: int = 0
    tails: StateDict[int, int] = new(StateDict)
    """Last port of the FIFO queue, by priority."""


class PageKind(IntEnum):
    """What is behind a guest frame that is not the domain's RAM."""

    XEN = 0
    """A page of Xen's that the domain shares: shared_info, grant frames."""
    GRANT_RW = 1
    GRANT_RO = 2
    FOREIGN = 3


class Domain(Stateful):
    """One domain; it is VM `vm_id` of the machine."""

    domid: int = 0
    vm_id: int = 0
    is_control: bool = False
    vcpus: tuple[XenVcpu, ...] = ()
    shared_info_spa: int = 0
    narrow: bool = False
    """shared_info and runstate have their 32-bit layout."""
    pages: int = 0
    max_pages: int = 0
    memory_map: bytes = b""
    """E820 entries that the guest may ask for."""
    special: StateDict[int, PageKind] = new(StateDict)
    """Guest frames that are not RAM of the domain, by frame number."""
    params: StateDict[int, int] = new(StateDict)
    channels: StateDict[int, EventChannel] = new(StateDict)
    valid_ports: int = 64
    max_port: int = 1023
    next_reset: int = 0
    fifo: bool = False
    event_array: tuple[int, ...] = ()
    last_queue: StateDict[int, tuple[int, int]] = new(StateDict)
    """(vCPU index, priority) of the queue that a port was linked to last."""
    pirqs: StateDict[int, int] = new(StateDict)
    """Emulated GSI by PIRQ."""
    pirq_ports: StateDict[int, int] = new(StateDict)
    grants: GrantTable = new(GrantTable)
    watchdogs: StateDict[int, int] = new(StateDict)
    """When a watchdog bites, by slot."""
    callback_asserted: bool = False
    shutdown_code: int | None = None
    console: bytes = b""
    """The last that it wrote with console_io."""
    console_output: bytes = b""
    """The last that the backend took from its console ring."""
    assists: int = 0
    hyperv_os_id: int = 0
    hyperv_hypercall: int = 0
    hyperv_reference_tsc: int = 0


class XenState(Stateful):
    """The plugin's state."""

    domains: StateDict[int, Domain] = new(StateDict)
    """By domain id."""
    domid_of_vm: StateDict[int, int] = new(StateDict)
    free_spas: tuple[int, ...] = ()
    """Pages that domains gave back."""
    xenstore: Xenstore = new(Xenstore)


def xen(machine: Machine) -> XenState:
    """The plugin's state in `machine`."""
    return machine.components["xen"]  # type: ignore[return-value]  # a cast costs a call, several times an exit


def domain_of(machine: Machine, vcpu: Vcpu) -> Domain | None:
    """The domain that `vcpu` belongs to; None for a VM made after boot."""
    state: XenState = machine.components["xen"]  # type: ignore[assignment]
    domid = state.domid_of_vm.get(vcpu.vm_id)
    return None if domid is None else state.domains[domid]


def backend_channel(domain: Domain, backend: Backend) -> EventChannel | None:
    """The domain's channel to a service; None when it has closed it."""
    return next((channel for channel in domain.channels.values() if channel.backend is backend), None)


def vcpu_of(machine: Machine, domain: Domain, index: int) -> XenVcpu | None:
    """The vCPU with this index in a domain."""
    return domain.vcpus[index] if index < len(domain.vcpus) else None
