"""Argument structures of grant_table_op."""

from __future__ import annotations

from sevlab.core.layout import Layout, u16, u32, u64


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


LAYOUTS: tuple[type[Layout], ...] = (
    MapGrantRef,
    UnmapGrantRef,
    SetupTable,
    SetupTable32,
    GrantCopy,
    GrantCopy32,
    QuerySize,
    SetVersion,
    GetVersion,
    SwapGrantRef,
)
