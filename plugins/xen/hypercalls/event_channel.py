"""event_channel_op. Source: Xen xen/common/event_channel.c and event_fifo.c, check by check in their order."""

from __future__ import annotations

from typing import Any

from sevlab.plugins.xen import backends, events
from sevlab.plugins.xen.arguments import (
    AllocUnbound,
    BindInterdomain,
    BindIpi,
    BindPirq,
    BindVcpu,
    BindVirq,
    Dom,
    EvtchnStatus,
    ExpandArray,
    InitControl,
    Port,
    SetPriority,
)
from sevlab.plugins.xen.call import Call
from sevlab.plugins.xen.frames import may_write, page_of
from sevlab.plugins.xen.layout import FifoControlBlock
from sevlab.plugins.xen.numbers import DOMAIN_VIRQS, NR_VIRQS, PER_VCPU_VIRQS, Errno, Evtchnop, Nr
from sevlab.plugins.xen.operations import Operation, run_operation, signed
from sevlab.plugins.xen.state import CHANNEL, ChannelState, Domain, EventChannel, vcpu_of, xen

PORTS_PER_BUCKET = 64
"""Ports become valid in buckets of a page of 64-byte structures. Source: xen/include/xen/sched.h."""
NR_PIRQS = 256
"""PIRQs of a guest. Source: xen/common/domain.c, extra_domU_irqs on top of the static ones; 256 is a choice."""
RESERVED_PORT = 0
SEND, INTERDOMAIN, IPI = Evtchnop.SEND, ChannelState.INTERDOMAIN, ChannelState.IPI


def free_port(call: Call, domain: Domain) -> int:
    """The lowest free port, or a negated `Errno`."""
    limit = min(domain.max_port + 1, events.max_ports(domain))
    for port in range(1, limit):
        if port not in domain.channels and not events.is_busy(call.machine, domain, port):
            return port
    return -Errno.ENOSPC


def open_port(call: Call, domain: Domain, port: int, state: ChannelState, **fields: Any) -> EventChannel:
    """Take `port` into use; ports up to the end of its bucket become valid."""
    channel = domain.channels[port] = EventChannel(port=port, state=state, **fields)
    if port >= domain.valid_ports:
        domain.valid_ports = (port // PORTS_PER_BUCKET + 1) * PORTS_PER_BUCKET
    return channel


def valid(domain: Domain, port: int) -> bool:
    """Whether Xen has a structure for this port, free or not."""
    return port < domain.valid_ports


def alloc_unbound(call: Call, a: Any) -> int:
    """A port that a domain may bind to."""
    domain = call.any_domain(a.dom)
    if domain is None:
        return -Errno.ESRCH
    port = free_port(call, domain)
    if port < 0:
        return port
    if not call.may(domain):
        return -Errno.EPERM
    remote = call.domain.domid if a.remote_dom == 0x7FF0 else a.remote_dom
    open_port(call, domain, port, ChannelState.UNBOUND, remote_domid=remote)
    a.port = port
    return 0


def bind_interdomain(call: Call, a: Any) -> int:
    """Connect to a port that another domain (or this one) left unbound for us."""
    remote = call.any_domain(a.remote_dom)
    if remote is None:
        return -Errno.ESRCH
    port = free_port(call, call.domain)
    if port < 0:
        return port
    far = remote.channels.get(a.remote_port)
    if far is None or far.state is not ChannelState.UNBOUND or far.remote_domid != call.domain.domid:
        return -Errno.EINVAL
    near = open_port(
        call, call.domain, port, ChannelState.INTERDOMAIN, remote_domid=remote.domid, remote_port=a.remote_port
    )
    far.state, far.remote_domid, far.remote_port = ChannelState.INTERDOMAIN, call.domain.domid, port
    events.set_pending(call.machine, call.domain, near)  # notifications may have been lost before
    a.local_port = port
    return 0


def bind_virq(call: Call, a: Any) -> int:
    """A port for a virtual interrupt; global ones are the control domain's."""
    if signed(a.virq, 32) < 0 or a.virq >= NR_VIRQS:
        return -Errno.EINVAL
    if a.virq not in PER_VCPU_VIRQS and a.vcpu:
        return -Errno.EINVAL
    vcpu = vcpu_of(call.machine, call.domain, a.vcpu)
    if vcpu is None:
        return -Errno.ENOENT
    if a.virq not in PER_VCPU_VIRQS | DOMAIN_VIRQS and not call.domain.is_control:
        return -Errno.EBUSY
    if a.virq in vcpu.virqs:
        return -Errno.EEXIST
    port = free_port(call, call.domain)
    if port < 0:
        return port
    open_port(call, call.domain, port, ChannelState.VIRQ, number=a.virq, vcpu=a.vcpu)
    vcpu.virqs[a.virq] = port
    a.port = port
    return 0


def bind_ipi(call: Call, a: Any) -> int:
    """A port that notifies one's own vCPU."""
    if vcpu_of(call.machine, call.domain, a.vcpu) is None:
        return -Errno.ENOENT
    port = free_port(call, call.domain)
    if port < 0:
        return port
    open_port(call, call.domain, port, ChannelState.IPI, vcpu=a.vcpu)
    a.port = port
    return 0


def bind_pirq(call: Call, a: Any) -> int:
    """A port for a physical interrupt line, as an HVM guest has them: emulated."""
    domain = call.domain
    if a.pirq >= NR_PIRQS:
        return -Errno.EINVAL
    if a.pirq in domain.pirq_ports:
        return -Errno.EEXIST
    port = free_port(call, domain)
    if port < 0:
        return port
    open_port(call, domain, port, ChannelState.PIRQ, number=a.pirq)
    domain.pirq_ports[a.pirq] = port
    a.port = port
    return 0


def close_port(call: Call, domain: Domain, port: int) -> int:
    """Close a port; the other end of a connection becomes unbound again."""
    channel = domain.channels.get(port)
    if channel is None or channel.xen_consumer:
        return -Errno.EINVAL
    if channel.state is ChannelState.INTERDOMAIN and not channel.backend:
        far = xen(call.machine).domains[channel.remote_domid].channels[channel.remote_port]
        far.state, far.remote_domid, far.remote_port = ChannelState.UNBOUND, domain.domid, 0
    elif channel.state is ChannelState.VIRQ:
        owner = domain.vcpus[channel.vcpu if channel.number in PER_VCPU_VIRQS else 0]
        del owner.virqs[channel.number]
    elif channel.state is ChannelState.PIRQ:
        del domain.pirq_ports[channel.number]
        if channel.number in domain.pirqs:
            del domain.pirqs[channel.number]
    events.clear_pending(call.machine, domain, port)
    domain.channels.pop(port, None)
    return 0


def close(call: Call, a: Any) -> int:
    """Close a port of one's own."""
    return close_port(call, call.domain, a.port)


def send(call: Call, a: Any) -> int:
    """Notify the other end."""
    channel = call.domain.channels.get(a.port)
    if channel is None or channel.xen_consumer or not CHANNEL.allows(channel.state, SEND):
        return -Errno.EINVAL
    if channel.backend:
        backends.notify(call.machine, call.domain, channel)
    elif channel.state is INTERDOMAIN:
        remote = xen(call.machine).domains[channel.remote_domid]
        far = remote.channels[channel.remote_port]
        if not far.xen_consumer:
            events.set_pending(call.machine, remote, far)
    elif channel.state is IPI:
        events.set_pending(call.machine, call.domain, channel)
    return 0


def status(call: Call, a: Any) -> int:
    """What a port is."""
    domain = call.any_domain(a.dom)
    if domain is None:
        return -Errno.ESRCH
    if not valid(domain, a.port):
        return -Errno.EINVAL
    if not call.may(domain):
        return -Errno.EPERM
    channel = domain.channels.get(a.port)
    if channel is None:
        a.status, a.vcpu = 0, 0
        return 0
    a.status, a.vcpu = int(channel.state), channel.vcpu
    if channel.state in (ChannelState.UNBOUND, ChannelState.INTERDOMAIN):
        a.u = a.u & 0xFFFF_0000 | channel.remote_domid
        if channel.state is ChannelState.INTERDOMAIN:
            a.u_port = channel.remote_port
    elif channel.state in (ChannelState.PIRQ, ChannelState.VIRQ):
        a.u = channel.number
    return 0


def bind_vcpu(call: Call, a: Any) -> int:
    """Let another vCPU be notified."""
    if vcpu_of(call.machine, call.domain, a.vcpu) is None:
        return -Errno.ENOENT
    channel = call.domain.channels.get(a.port)
    if channel is None or channel.xen_consumer or not CHANNEL.allows(channel.state, Evtchnop.BIND_VCPU):
        return -Errno.EINVAL
    if channel.state is ChannelState.VIRQ and channel.number in PER_VCPU_VIRQS:
        return -Errno.EINVAL
    channel.vcpu = a.vcpu
    return 0


def unmask(call: Call, a: Any) -> int:
    """Clear a port's mask and deliver what waits."""
    if not valid(call.domain, a.port):
        return -Errno.EINVAL
    channel = call.domain.channels.get(a.port)
    if channel is not None and not channel.xen_consumer:
        events.unmask(call.machine, call.domain, channel)
    return 0


def _reset_domain(call: Call, domid: int, *, resuming: bool) -> int:
    domain = call.any_domain(domid)
    if domain is None:
        return -Errno.ESRCH
    if not call.may(domain):
        return -Errno.EPERM
    if domain is not call.domain:
        return -Errno.EINVAL  # it would have to be paused by its controller
    port = domain.next_reset if resuming else int(not domain.next_reset)
    domain.next_reset = max(domain.next_reset, port)
    if not port:
        return -Errno.EBUSY
    while valid(domain, port) and any(not channel.xen_consumer for channel in domain.channels.values()):
        close_port(call, domain, port)
        if not port & 0x3F and call.preempt_check():
            domain.next_reset = port
            return -Errno.ERESTART
        port += 1
    domain.next_reset = 0
    if any(not channel.xen_consumer for channel in domain.channels.values()):
        return -Errno.EAGAIN
    if domain.fifo:
        leave_fifo(domain)
    return 0


def _reset(call: Call, a: Any, *, resuming: bool) -> int:
    result = _reset_domain(call, a.dom, resuming=resuming)
    if result == -Errno.ERESTART:
        return call.continue_(Nr.EVENT_CHANNEL_OP, Evtchnop.RESET_CONT, call.args[1])
    return result


def reset(call: Call, a: Any) -> int:
    """Close all ports and return to two levels."""
    return _reset(call, a, resuming=False)


def reset_cont(call: Call, a: Any) -> int:
    """Go on with a reset that was preempted."""
    return _reset(call, a, resuming=True)


def leave_fifo(domain: Domain) -> None:
    """Forget control blocks and event arrays."""
    domain.fifo, domain.event_array = False, ()
    domain.last_queue.clear()
    for vcpu in domain.vcpus:
        vcpu.control_spa = 0
        vcpu.tails.clear()


def init_control(call: Call, a: Any) -> int:
    """Give a vCPU its control block; the first one switches the domain to FIFO."""
    domain = call.domain
    a.link_bits = events.FIFO_LINK_BITS
    vcpu = vcpu_of(call.machine, domain, a.vcpu)
    if vcpu is None:
        return -Errno.ENOENT
    if a.page_offset > 4096 - FifoControlBlock.SIZE or a.page_offset & 7:
        return -Errno.EINVAL
    if vcpu.control_spa:
        return -Errno.EINVAL
    spa = page_of(call.machine, domain, a.control_gfn)
    if spa is None or not may_write(call.machine, spa):
        return -Errno.EINVAL
    if not domain.fifo:
        for channel in domain.channels.values():
            channel.pending = channel.pending or events.is_pending(call.machine, domain, channel.port)
            channel.priority = events.PRIORITY_DEFAULT
        domain.fifo = True
    vcpu.control_spa = spa + a.page_offset
    return 0


def expand_array(call: Call, a: Any) -> int:
    """One more page of event words; what was raised without one is raised again."""
    domain = call.domain
    if not domain.fifo:
        return -Errno.EOPNOTSUPP
    if len(domain.event_array) >= events.MAX_ARRAY_PAGES:
        return -Errno.ENOSPC
    spa = page_of(call.machine, domain, a.array_gfn)
    if spa is None or not may_write(call.machine, spa):
        return -Errno.EINVAL
    first = len(domain.event_array) * events.WORDS_PER_PAGE
    domain.event_array = (*domain.event_array, spa)
    for port in sorted(domain.channels):
        channel = domain.channels[port]
        if first <= port < first + events.WORDS_PER_PAGE and channel.pending:
            events.set_pending(call.machine, domain, channel)
    return 0


def set_priority(call: Call, a: Any) -> int:
    """The queue for a port's future events."""
    if not valid(call.domain, a.port):
        return -Errno.EINVAL
    if not call.domain.fifo:
        return -Errno.ENOSYS
    if a.priority > events.PRIORITY_LOWEST:
        return -Errno.EINVAL
    channel = call.domain.channels.get(a.port)
    if channel is not None:
        channel.priority = a.priority
    return 0


PORT_FAST = (("port", 2),)

OPERATIONS: dict[int, Operation] = {
    Evtchnop.BIND_INTERDOMAIN: Operation(
        bind_interdomain,
        BindInterdomain,
        ("local_port",),
        (("remote_dom", 2), ("remote_port", 3)),
        (("local_port", 4),),
    ),
    Evtchnop.BIND_VIRQ: Operation(bind_virq, BindVirq, ("port",), (("virq", 2), ("vcpu", 3)), (("port", 4),)),
    Evtchnop.BIND_PIRQ: Operation(bind_pirq, BindPirq, ("port",), (("pirq", 2), ("flags", 3)), (("port", 4),)),
    Evtchnop.CLOSE: Operation(close, Port, (), PORT_FAST),
    Evtchnop.SEND: Operation(send, Port, (), PORT_FAST),
    Evtchnop.STATUS: Operation(
        status,
        EvtchnStatus,
        ("status", "vcpu", "u", "u_port"),
        (("dom", 2), ("port", 3)),
        (("status", 4), ("vcpu", 5), ("u", 6), ("u_port", 7)),
    ),
    Evtchnop.ALLOC_UNBOUND: Operation(
        alloc_unbound, AllocUnbound, ("port",), (("dom", 2), ("remote_dom", 3)), (("port", 4),)
    ),
    Evtchnop.BIND_IPI: Operation(bind_ipi, BindIpi, ("port",), (("vcpu", 2),), (("port", 4),)),
    Evtchnop.BIND_VCPU: Operation(bind_vcpu, BindVcpu, (), (("vcpu", 2), ("port", 3))),
    Evtchnop.UNMASK: Operation(unmask, Port, (), PORT_FAST),
    Evtchnop.RESET: Operation(reset, Dom, (), (("dom", 2),)),
    Evtchnop.RESET_CONT: Operation(reset_cont, Dom),
    Evtchnop.INIT_CONTROL: Operation(
        init_control,
        InitControl,
        ("link_bits",),
        (("control_gfn", 2), ("page_offset", 3), ("vcpu", 4)),
        (("link_bits", 5),),
    ),
    Evtchnop.EXPAND_ARRAY: Operation(expand_array, ExpandArray, (), (("array_gfn", 2),)),
    Evtchnop.SET_PRIORITY: Operation(set_priority, SetPriority, (), (("port", 2), ("priority", 3))),
}


def event_channel_op(call: Call) -> int:
    """Hypercall event_channel_op of cmd, ptr."""
    command, handle = call.args
    return run_operation(call, OPERATIONS, command, handle)
