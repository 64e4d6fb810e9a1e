"""Argument structures of memory_op."""

from __future__ import annotations

from sevlab.core.layout import Layout, u16, u32, u64


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


class MemoryExchange(Layout, size=72):
    """exchange: two reservations and how far it came."""

    in_extent_start = u64(0)
    in_nr_extents = u64(8)
    in_extent_order = u32(16)
    in_mem_flags = u32(20)
    in_domid = u16(24)
    out_extent_start = u64(32)
    out_nr_extents = u64(40)
    out_extent_order = u32(48)
    out_mem_flags = u32(52)
    out_domid = u16(56)
    nr_exchanged = u64(64)


class MemoryExchange32(Layout, size=44):
    """The same, 32-bit."""

    in_extent_start = u32(0)
    in_nr_extents = u32(4)
    in_extent_order = u32(8)
    in_mem_flags = u32(12)
    in_domid = u16(16)
    out_extent_start = u32(20)
    out_nr_extents = u32(24)
    out_extent_order = u32(28)
    out_mem_flags = u32(32)
    out_domid = u16(36)
    nr_exchanged = u32(40)


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


LAYOUTS: tuple[type[Layout], ...] = (
    MemoryReservation,
    MemoryReservation32,
    MemoryExchange,
    MemoryExchange32,
    MemoryDomain,
    AddToPhysmap,
    AddToPhysmap32,
    AddToPhysmapBatch,
    AddToPhysmapBatch32,
    RemoveFromPhysmap,
    RemoveFromPhysmap32,
    MemoryMap,
    MemoryMap32,
    SetMemoryMap,
    SetMemoryMap32,
    E820Entry,
)
