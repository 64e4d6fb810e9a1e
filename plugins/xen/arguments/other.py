"""Argument structures of xen_version, physdev_op, dm_op, coco_op, toolstack calls."""

from __future__ import annotations

from sevlab.core.layout import Layout, raw_bytes, u16, u32, u64


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


LAYOUTS: tuple[type[Layout], ...] = (
    FeatureInfo,
    PhysdevEoi,
    IrqStatusQuery,
    MapPirq,
    MapPirq32,
    UnmapPirq,
    FreePirq,
    PlatformStatus,
    PrepareInitialMem,
    DmOpBuf,
    DmOpBuf32,
    CompileInfo,
    ControlHead,
)
