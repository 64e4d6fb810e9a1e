"""Argument structures of the hypercalls, by width of the caller.

A handle is an address: linear in the legacy ABI, guest-physical in the physical-address ABI. Where 64- and 32-bit
callers use different structures there are two layouts with the same field names, side by side in a `Shape`.
Source of every offset: Xen xen/include/public/{memory,grant_table,event_channel,sched,vcpu,version,physdev}.h,
hvm/hvm_op.h; the 32-bit forms as the compat headers generated from them.
"""

from __future__ import annotations

from typing import NamedTuple

from sevlab.core.layout import Layout, array, raw_bytes, u8, u16, u32, u64


class Shape(NamedTuple):
    """A structure in its 64-bit and its 32-bit form."""

    wide: type[Layout]
    narrow: type[Layout]


class MemoryReservation(Layout, size=32):
    """increase_reservation, decrease_reservation, populate_physmap."""

    extent_start = u64(0)
    nr_extents = u64(8)
    extent_order = u32(16)
    mem_flags = u32(20)
    domid = u16(24)


class MemoryReservation32(Layout, size=20):
    """The same, 32-bit."""

    extent_start = u32(0)
    nr_extents = u32(4)
    extent_order = u32(8)
    mem_flags = u32(12)
    domid = u16(16)


class MemoryDomain(Layout, size=2):
    """current_reservation, maximum_reservation, maximum_gpfn."""

    domid = u16(0)


class AddToPhysmap(Layout, size=24):
    """add_to_physmap."""

    domid = u16(0)
    size_pages = u16(2)
    space = u32(4)
    idx = u64(8)
    gpfn = u64(16)


class AddToPhysmap32(Layout, size=16):
    """The same, 32-bit."""

    domid = u16(0)
    size_pages = u16(2)
    space = u32(4)
    idx = u32(8)
    gpfn = u32(12)


class AddToPhysmapBatch(Layout, size=32):
    """add_to_physmap_batch."""

    domid = u16(0)
    space = u16(2)
    size_pages = u16(4)
    foreign_domid = u16(6)
    idxs = u64(8)
    gpfns = u64(16)
    errs = u64(24)


class AddToPhysmapBatch32(Layout, size=20):
    """The same, 32-bit."""

    domid = u16(0)
    space = u16(2)
    size_pages = u16(4)
    foreign_domid = u16(6)
    idxs = u32(8)
    gpfns = u32(12)
    errs = u32(16)


class RemoveFromPhysmap(Layout, size=16):
    """remove_from_physmap."""

    domid = u16(0)
    gpfn = u64(8)


class RemoveFromPhysmap32(Layout, size=8):
    """The same, 32-bit."""

    domid = u16(0)
    gpfn = u32(4)


class MemoryMap(Layout, size=16):
    """memory_map."""

    nr_entries = u32(0)
    buffer_handle = u64(8)


class MemoryMap32(Layout, size=8):
    """The same, 32-bit."""

    nr_entries = u32(0)
    buffer_handle = u32(4)


class SetMemoryMap(Layout, size=24):
    """set_memory_map."""

    domid = u16(0)
    nr_entries = u32(8)
    buffer_handle = u64(16)


class SetMemoryMap32(Layout, size=12):
    """The same, 32-bit."""

    domid = u16(0)
    nr_entries = u32(4)
    buffer_handle = u32(8)


class E820Entry(Layout, size=20):
    """A range of guest-physical space."""

    addr = u64(0)
    length = u64(8)
    type = u32(16, values=(1, 2, 3, 4, 5))


class MapGrantRef(Layout, size=32):
    """map_grant_ref."""

    host_addr = u64(0)
    flags = u32(8)
    ref = u32(12)
    dom = u16(16)
    status = u16(18)
    handle = u32(20)
    dev_bus_addr = u64(24)


class UnmapGrantRef(Layout, size=24):
    """unmap_grant_ref."""

    host_addr = u64(0)
    dev_bus_addr = u64(8)
    handle = u32(16)
    status = u16(20)


class SetupTable(Layout, size=24):
    """setup_table."""

    dom = u16(0)
    nr_frames = u32(4)
    status = u16(8)
    frame_list = u64(16)


class SetupTable32(Layout, size=16):
    """The same, 32-bit."""

    dom = u16(0)
    nr_frames = u32(4)
    status = u16(8)
    frame_list = u32(12)


class GrantCopy(Layout, size=40):
    """copy; a source or destination is a reference or a frame number of the caller."""

    source = u64(0)
    source_domid = u16(8)
    source_offset = u16(10)
    dest = u64(16)
    dest_domid = u16(24)
    dest_offset = u16(26)
    len = u16(32)
    flags = u16(34)
    status = u16(36)


class GrantCopy32(Layout, size=24):
    """The same, 32-bit."""

    source = u32(0)
    source_domid = u16(4)
    source_offset = u16(6)
    dest = u32(8)
    dest_domid = u16(12)
    dest_offset = u16(14)
    len = u16(16)
    flags = u16(18)
    status = u16(20)


class QuerySize(Layout, size=16):
    """query_size."""

    dom = u16(0)
    nr_frames = u32(4)
    max_nr_frames = u32(8)
    status = u16(12)


class SetVersion(Layout, size=4):
    """set_version."""

    table_version = u32(0)


class GetVersion(Layout, size=8):
    """get_version."""

    dom = u16(0)
    table_version = u32(4)


class SwapGrantRef(Layout, size=12):
    """swap_grant_ref."""

    ref_a = u32(0)
    ref_b = u32(4)
    status = u16(8)


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
    """initialise, 64-bit mode; the 32-bit form of the registers is not modelled."""

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


class FeatureInfo(Layout, size=8):
    """get_features."""

    submap_idx = u32(0)
    submap = u32(4)


class PhysdevEoi(Layout, size=4):
    """eoi."""

    irq = u32(0)


class IrqStatusQuery(Layout, size=8):
    """irq_status_query."""

    irq = u32(0)
    flags = u32(4)


class MapPirq(Layout, size=40):
    """map_pirq."""

    domid = u16(0)
    type = u32(4)
    index = u32(8)
    pirq = u32(12)
    bus = u32(16)
    devfn = u32(20)
    entry_nr = u32(24)
    table_base = u64(32)


class MapPirq32(Layout, size=36):
    """The same, 32-bit."""

    domid = u16(0)
    type = u32(4)
    index = u32(8)
    pirq = u32(12)
    bus = u32(16)
    devfn = u32(20)
    entry_nr = u32(24)
    table_base = u64(28)


class UnmapPirq(Layout, size=8):
    """unmap_pirq."""

    domid = u16(0)
    pirq = u32(4)


class FreePirq(Layout, size=8):
    """get_free_pirq."""

    type = u32(0)
    pirq = u32(4)


class PlatformStatus(Layout, size=24):
    """coco_op platform_status."""

    platform = u32(0, values=(0, 1, 2, 3), doc="none, AMD SEV, TDX, RME")
    platform_flags = u32(4, doc="bit 0 SEV-ES, 1 SEV-SNP, 2 SEV-TIO")
    flags = u32(8, doc="bit 0 supported, 1 unsafe")
    features = u32(12)
    version_major = u32(16)
    version_minor = u32(20)


class PrepareInitialMem(Layout, size=24):
    """coco_op prepare_initial_mem."""

    domid = u16(0)
    gfn = u64(8)
    count = u64(16)


class HvFlush(Layout, size=24):
    """HvFlushVirtualAddressSpace and List."""

    address_space = u64(0)
    flags = u64(8)
    vcpu_mask = u64(16)


class HvFlushEx(Layout, size=32):
    """The Ex forms; the banks follow."""

    address_space = u64(0)
    flags = u64(8)
    set_format = u64(16, doc="0 sparse, 1 all")
    valid_bank_mask = u64(24)


class HvSendIpi(Layout, size=16):
    """HvSendSyntheticClusterIpi."""

    vector = u32(0)
    target_vtl = u8(4)
    reserved_zero = raw_bytes(5, 3)
    vcpu_mask = u64(8)


class HvSendIpiEx(Layout, size=24):
    """HvSendSyntheticClusterIpiEx; the banks follow."""

    vector = u32(0)
    target_vtl = u8(4)
    reserved_zero = raw_bytes(5, 3)
    set_format = u64(8)
    valid_bank_mask = u64(16)


class DmOpBuf(Layout, size=16):
    """A buffer of dm_op."""

    handle = u64(0)
    length = u64(8)


class DmOpBuf32(Layout, size=8):
    """The same, 32-bit."""

    handle = u32(0)
    length = u32(4)


class CompileInfo(Layout, size=144):
    """compile_info of xen_version."""

    compiler = raw_bytes(0, 64)
    compile_by = raw_bytes(64, 16)
    compile_domain = raw_bytes(80, 32)
    compile_date = raw_bytes(112, 32)


class ControlHead(Layout, size=8):
    """First words of sysctl, domctl and platform_op."""

    cmd = u32(0)
    interface_version = u32(4)


class BankContents(Layout, size=512):
    """The banks of a sparse set of virtual processors; one for each bit of the mask, at most 64."""

    bank = array(0, 64, u64)


def argument_layouts() -> tuple[type[Layout], ...]:
    """Every layout of this module, in order."""
    return tuple(
        item for item in globals().values() if isinstance(item, type) and issubclass(item, Layout) and item is not Layout
    )
