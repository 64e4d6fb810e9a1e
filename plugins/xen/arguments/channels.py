"""Argument structures of event_channel_op: the same for 32- and 64-bit callers."""

from __future__ import annotations

from sevlab.core.layout import Layout, u8, u16, u32, u64


class BindInterdomain(Layout, size=12):
    """bind_interdomain."""

    remote_dom = u16(0)
    remote_port = u32(4)
    local_port = u32(8)


class BindVirq(Layout, size=12):
    """bind_virq."""

    virq = u32(0)
    vcpu = u32(4)
    port = u32(8)


class BindPirq(Layout, size=12):
    """bind_pirq."""

    pirq = u32(0)
    flags = u32(4)
    port = u32(8)


class Port(Layout, size=4):
    """close, send, unmask."""

    port = u32(0)


class EvtchnStatus(Layout, size=24):
    """status; what `u` holds depends on the status."""

    dom = u16(0)
    port = u32(4)
    status = u32(8)
    vcpu = u32(12)
    u = u32(16, doc="unbound: domain (16 bits); interdomain: domain; pirq or virq: its number")
    u_port = u32(20, doc="interdomain: the remote port")


class AllocUnbound(Layout, size=8):
    """alloc_unbound."""

    dom = u16(0)
    remote_dom = u16(2)
    port = u32(4)


class BindIpi(Layout, size=8):
    """bind_ipi."""

    vcpu = u32(0)
    port = u32(4)


class BindVcpu(Layout, size=8):
    """bind_vcpu."""

    port = u32(0)
    vcpu = u32(4)


class Dom(Layout, size=2):
    """reset."""

    dom = u16(0)


class InitControl(Layout, size=24):
    """init_control."""

    control_gfn = u64(0)
    page_offset = u32(8)
    vcpu = u32(12)
    link_bits = u8(16)


class ExpandArray(Layout, size=8):
    """expand_array."""

    array_gfn = u64(0)


class SetPriority(Layout, size=8):
    """set_priority."""

    port = u32(0)
    priority = u32(4)


LAYOUTS: tuple[type[Layout], ...] = (
    BindInterdomain,
    BindVirq,
    BindPirq,
    Port,
    EvtchnStatus,
    AllocUnbound,
    BindIpi,
    BindVcpu,
    Dom,
    InitControl,
    ExpandArray,
    SetPriority,
)
