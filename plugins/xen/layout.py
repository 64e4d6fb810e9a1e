"""Structures that guest and hypervisor share for long: pages, rings, entries.

Source of every offset: Xen xen/include/public/{xen,vcpu,grant_table,event_channel}.h, arch-x86/xen-*.h,
hvm/{hvm_vcpu,start_info}.h, io/{console,xs_wire}.h, hvm/ioreq.h.
"""

from __future__ import annotations

from sevlab.core.layout import Layout, array, bits, flag, raw_bytes, u8, u16, u32, u64

VCPU_INFO_BYTES = 64
LEGACY_MAX_VCPUS = 32
"""vCPUs whose vcpu_info is in shared_info until they register another place."""


class SharedInfo(Layout, size=3136):
    """shared_info of a 64-bit guest."""

    vcpu_info = raw_bytes(0, LEGACY_MAX_VCPUS * VCPU_INFO_BYTES)
    evtchn_pending = raw_bytes(2048, 512, doc="a bit for each port")
    evtchn_mask = raw_bytes(2560, 512)
    wc_version = u32(3072, doc="odd while it changes")
    wc_sec = u32(3076)
    wc_nsec = u32(3080)
    wc_sec_hi = u32(3084)
    max_pfn = u64(3088)
    pfn_to_mfn_frame_list_list = u64(3096)
    nmi_reason = u64(3104)
    p2m_cr3 = u64(3112)
    p2m_vaddr = u64(3120)
    p2m_generation = u64(3128)


class SharedInfo32(Layout, size=2344):
    """shared_info of a 32-bit guest."""

    vcpu_info = raw_bytes(0, LEGACY_MAX_VCPUS * VCPU_INFO_BYTES)
    evtchn_pending = raw_bytes(2048, 128)
    evtchn_mask = raw_bytes(2176, 128)
    wc_version = u32(2304)
    wc_sec = u32(2308)
    wc_nsec = u32(2312)
    max_pfn = u32(2316)
    pfn_to_mfn_frame_list_list = u32(2320)
    nmi_reason = u32(2324)
    p2m_cr3 = u32(2328)
    p2m_vaddr = u32(2332)
    p2m_generation = u32(2336)
    wc_sec_hi = u32(2340)


class VcpuInfo(Layout, size=VCPU_INFO_BYTES):
    """vcpu_info of a 64-bit guest."""

    evtchn_upcall_pending = u8(0)
    evtchn_upcall_mask = u8(1, doc="not used by HVM guests for delivery")
    evtchn_pending_sel = u64(8, doc="a bit for each word of evtchn_pending")
    cr2 = u64(16)
    time = raw_bytes(32, 32, doc="VcpuTimeInfo")


class VcpuInfo32(Layout, size=VCPU_INFO_BYTES):
    """vcpu_info of a 32-bit guest."""

    evtchn_upcall_pending = u8(0)
    evtchn_upcall_mask = u8(1)
    evtchn_pending_sel = u32(4)
    cr2 = u32(8)
    time = raw_bytes(32, 32, doc="VcpuTimeInfo")


class VcpuTimeInfo(Layout, size=32):
    """Xen's clock for one vCPU: ns = system_time + ((tsc - tsc_timestamp) << shift) * mul >> 32."""

    time_version = u32(0, doc="odd while it changes")
    tsc_timestamp = u64(8)
    system_time = u64(16, unit="ns")
    tsc_to_system_mul = u32(24)
    tsc_shift = u8(28, doc="signed; negative shifts right")
    flags = u8(29, doc="bit 0 TSC stable, bit 1 guest stopped")


class VcpuRunstateInfo(Layout, size=48):
    """Runstate of a vCPU, 64-bit guest."""

    state = u32(0, values=(0, 1, 2, 3), doc="running, runnable, blocked, offline")
    state_entry_time = u64(8, unit="ns", doc="bit 63: being updated")
    time = array(16, 4, u64)


class VcpuRunstateInfo32(Layout, size=44):
    """Runstate of a vCPU, 32-bit guest: nothing between state and entry time."""

    state = u32(0, values=(0, 1, 2, 3))
    state_entry_time = u64(4, unit="ns")
    time = array(12, 4, u64)


class MulticallEntry(Layout, size=64):
    """One call of a multicall, 64-bit guest."""

    op = u64(0)
    result = u64(8)
    args = array(16, 6, u64, doc="five are used")


class MulticallEntry32(Layout, size=32):
    """One call of a multicall, 32-bit guest."""

    op = u32(0)
    result = u32(4)
    args = array(8, 6, u32)


class XenconsInterface(Layout, size=3092):
    """The console ring; `in` and `out` as the guest sees them."""

    input = raw_bytes(0, 1024)
    output = raw_bytes(1024, 2048)
    in_cons = u32(3072)
    in_prod = u32(3076)
    out_cons = u32(3080)
    out_prod = u32(3084)
    connection = u8(3088)


class XenstoreInterface(Layout, size=2080):
    """The xenstore ring."""

    req = raw_bytes(0, 1024)
    rsp = raw_bytes(1024, 1024)
    req_cons = u32(2048)
    req_prod = u32(2052)
    rsp_cons = u32(2056)
    rsp_prod = u32(2060)
    server_features = u32(2064)
    connection = u32(2068)
    error = u32(2072)
    evtchn_port = u32(2076)


class XsdSockmsg(Layout, size=16):
    """Head of a xenstore message; at most 4096 bytes follow."""

    type = u32(0)
    req_id = u32(4)
    tx_id = u32(8)
    len = u32(12)


class GrantEntryV1(Layout, size=8):
    """A grant of version 1."""

    flags = u16(0)
    domid = u16(2)
    frame = u32(4)


class GrantEntryV2(Layout, size=16):
    """A grant of version 2, any of its forms: full page, part of a page, transitive."""

    flags = u16(0)
    domid = u16(2)
    page_off_or_trans_domid = u16(4, doc="sub-page: offset; transitive: domain")
    length = u16(6, doc="sub-page")
    frame = u64(8, doc="transitive: the low 32 bits are the reference")


class FifoControlBlock(Layout, size=72):
    """A vCPU's control block of FIFO event channels."""

    ready = u32(0, doc="a bit for each priority")
    head = array(8, 16, u32)


class FifoEventWord(Layout, size=4):
    """The word of one port in an event array."""

    link = bits(0, u32, 16, 0)
    busy = flag(0, u32, 28)
    linked = flag(0, u32, 29)
    masked = flag(0, u32, 30)
    pending = flag(0, u32, 31)


class HvmStartInfo(Layout, size=56):
    """What a PVH guest starts with, version 1."""

    magic = u32(0, values=(0x336E_C578,))
    start_version = u32(4)
    flags = u32(8)
    nr_modules = u32(12)
    modlist_paddr = u64(16)
    cmdline_paddr = u64(24)
    rsdp_paddr = u64(32)
    memmap_paddr = u64(40)
    memmap_entries = u32(48)


class Ioreq(Layout, size=32):
    """A request to a device model; such pages are never mapped by a guest."""

    addr = u64(0)
    data = u64(8)
    count = u32(16)
    size = u32(20)
    vp_eport = u32(24)
    state = bits(30, u8, 3, 0, doc="none, ready, in process, response ready")
    data_is_ptr = flag(30, u8, 4)
    dir = flag(30, u8, 5, doc="1 reads")
    df = flag(30, u8, 6)
    type = u8(31, values=(0, 1, 2, 7, 8), doc="PIO, copy, PCI config, time offset, invalidate")


LAYOUTS = (
    SharedInfo,
    SharedInfo32,
    VcpuInfo,
    VcpuInfo32,
    VcpuTimeInfo,
    VcpuRunstateInfo,
    VcpuRunstateInfo32,
    MulticallEntry,
    MulticallEntry32,
    XenconsInterface,
    XenstoreInterface,
    XsdSockmsg,
    GrantEntryV1,
    GrantEntryV2,
    FifoControlBlock,
    FifoEventWord,
    HvmStartInfo,
    Ioreq,
)
