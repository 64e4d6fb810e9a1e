"""Argument structures of sched_op, vcpu_op, hvm_op."""

from __future__ import annotations

from sevlab.core.layout import Layout, raw_bytes, u8, u16, u32, u64


class Shutdown(Layout, size=4):
    """shutdown, shutdown_code."""

    reason = u32(0)


class Poll(Layout, size=24):
    """poll."""

    ports = u64(0)
    nr_ports = u32(8)
    timeout = u64(16, unit="ns, absolute")


class Poll32(Layout, size=16):
    """The same, 32-bit."""

    ports = u32(0)
    nr_ports = u32(4)
    timeout = u64(8)


class RemoteShutdown(Layout, size=8):
    """remote_shutdown."""

    domain_id = u16(0)
    reason = u32(4)


class Watchdog(Layout, size=8):
    """watchdog."""

    id = u32(0)
    timeout = u32(4, unit="s")


class PeriodicTimer(Layout, size=8):
    """set_periodic_timer."""

    period_ns = u64(0)


class SingleshotTimer(Layout, size=16):
    """set_singleshot_timer."""

    timeout_abs_ns = u64(0)
    flags = u32(8, doc="bit 0: must lie in the future")


class SingleshotTimer32(Layout, size=12):
    """The same, 32-bit."""

    timeout_abs_ns = u64(0)
    flags = u32(8)


class RegisterVcpuInfo(Layout, size=16):
    """register_vcpu_info."""

    mfn = u64(0, doc="a guest frame number for translated guests")
    page_offset = u32(8)


class Area(Layout, size=8):
    """Where a runstate or time area lies: a linear or guest-physical address, as the operation says."""

    addr = u64(0)


class VcpuHvmContext(Layout, size=128):
    """initialise, 64-bit mode."""

    mode = u32(0, values=(0, 1), doc="0 32-bit, 1 64-bit")
    pad = u32(4)
    rax = u64(8)
    rcx = u64(16)
    rdx = u64(24)
    rbx = u64(32)
    rsp = u64(40)
    rbp = u64(48)
    rsi = u64(56)
    rdi = u64(64)
    rip = u64(72)
    rflags = u64(80)
    cr0 = u64(88)
    cr3 = u64(96)
    cr4 = u64(104)
    efer = u64(112)


class VcpuHvmContext32(Layout, size=128):
    """initialise, 32-bit mode. Source: Xen xen/include/public/hvm/hvm_vcpu.h."""

    mode = u32(0, values=(0,))
    pad = u32(4)
    eax = u32(8)
    ecx = u32(12)
    edx = u32(16)
    ebx = u32(20)
    esp = u32(24)
    ebp = u32(28)
    esi = u32(32)
    edi = u32(36)
    eip = u32(40)
    eflags = u32(44)
    cr0 = u32(48)
    cr3 = u32(52)
    cr4 = u32(56)
    pad1 = u32(60)
    efer = u64(64)
    cs_base = u32(72)
    ds_base = u32(76)
    ss_base = u32(80)
    es_base = u32(84)
    tr_base = u32(88)
    cs_limit = u32(92)
    ds_limit = u32(96)
    ss_limit = u32(100)
    es_limit = u32(104)
    tr_limit = u32(108)
    cs_ar = u16(112, doc="bits 3:0 type, 4 S, 6:5 DPL, 7 P, 8 AVL, 9 L, 10 D/B, 11 G; the others 0")
    ds_ar = u16(114)
    ss_ar = u16(116)
    es_ar = u16(118)
    tr_ar = u16(120)
    pad2 = raw_bytes(122, 6)


class Xentrace(Layout, size=32):
    """xentrace."""

    event = u16(0)
    extra_bytes = u16(2)
    extra = raw_bytes(4, 28)


class ContextPage(Layout, size=8):
    """initialise in FastABI: the page whose first bytes are a VcpuHvmContext; not a structure in memory."""

    gfn = u64(0)


class HvmParam(Layout, size=16):
    """set_param, get_param."""

    domid = u16(0)
    index = u32(4)
    value = u64(8)


class GetTime(Layout, size=8):
    """get_time."""

    now = u64(0, unit="ns")


class GetMemType(Layout, size=16):
    """get_mem_type."""

    domid = u16(0)
    mem_type = u16(2)
    pfn = u64(8)


class PagetableDying(Layout, size=16):
    """pagetable_dying."""

    domid = u16(0)
    gpa = u64(8)


class UpcallVector(Layout, size=8):
    """set_evtchn_upcall_vector."""

    vcpu = u32(0)
    vector = u8(4)


LAYOUTS: tuple[type[Layout], ...] = (
    Shutdown,
    Poll,
    Poll32,
    RemoteShutdown,
    Watchdog,
    PeriodicTimer,
    SingleshotTimer,
    SingleshotTimer32,
    RegisterVcpuInfo,
    Area,
    VcpuHvmContext,
    VcpuHvmContext32,
    Xentrace,
    ContextPage,
    HvmParam,
    GetTime,
    GetMemType,
    PagetableDying,
    UpcallVector,
)
