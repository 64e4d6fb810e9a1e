"""memory_op. Source: Xen xen/common/memory.c, xen/arch/x86/mm.c (arch_memory_op), xen/arch/x86/mm/p2m.c
(xenmem_add_to_physmap_one), check by check in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sevlab.core.units import MASK32, PAGE_BYTES
from sevlab.plugins.xen import grants
from sevlab.plugins.xen.arguments import (
    AddToPhysmap,
    AddToPhysmap32,
    AddToPhysmapBatch,
    AddToPhysmapBatch32,
    E820Entry,
    MemoryDomain,
    MemoryExchange,
    MemoryExchange32,
    MemoryMap,
    MemoryMap32,
    MemoryReservation,
    MemoryReservation32,
    RemoveFromPhysmap,
    RemoveFromPhysmap32,
    SetMemoryMap,
    SetMemoryMap32,
    Shape,
)
from sevlab.plugins.xen.call import Abi, Call
from sevlab.plugins.xen.frames import (
    MAX_GFN,
    allocate_page,
    frame_spa,
    free_page,
    gfn_of,
    has_room,
    map_frame,
    page_of,
    unmap_frame,
)
from sevlab.plugins.xen.numbers import MAP_STATUS_FRAMES, MEMOP_EXTENT_SHIFT, Domid, Errno, MapSpace, Memop, Nr
from sevlab.plugins.xen.operations import Operation, run_operation
from sevlab.plugins.xen.state import Domain, PageKind, xen

MAX_EXTENTS = MASK32 >> MEMOP_EXTENT_SHIFT
DOMU_MAX_ORDER = 9
"""Largest extent of an ordinary domain: 2 MiB. Source: xen/include/asm-x86/config.h, CONFIG_DOMU_MAX_ORDER."""
POPULATE_ON_DEMAND = 1 << 16
E820_MAX = 1024
RESERVATION = Shape(MemoryReservation, MemoryReservation32)


# Reservations -----------------------------------------------------------------------------------------------------


def increase(call: Call, domain: Domain, _gfn: int, pages: int) -> bool:
    """Give the domain pages that are mapped nowhere: a translated domain cannot use them, and Xen says nothing of
    where they are; only the count changes.
    """
    return _charge(domain, pages)


def decrease(call: Call, domain: Domain, gfn: int, pages: int) -> bool:
    """Take pages away; a frame that holds none, or another domain's, ends it."""
    return all(remove_ram(call, domain, number) == 0 for number in range(gfn, gfn + pages))


def populate(call: Call, domain: Domain, gfn: int, pages: int) -> bool:
    """Put fresh pages at guest frames."""
    if gfn + pages - 1 > MAX_GFN or not _charge(domain, pages):
        return False
    for number in range(gfn, gfn + pages):
        if domain.special.get(number, PageKind.XEN) is not PageKind.XEN:
            domain.pages -= gfn + pages - number
            return False
        spa = allocate_page(call.machine) if has_room(call.machine) else None
        if spa is None:
            domain.pages -= gfn + pages - number
            return False
        map_frame(call.machine, domain, number, spa, None)
    return True


def _charge(domain: Domain, pages: int) -> bool:
    if domain.pages + pages > domain.max_pages:
        return False
    domain.pages += pages
    return True


def remove_ram(call: Call, domain: Domain, gfn: int) -> int:
    """Free what is at `gfn`; a page of Xen's is only unhooked. Source: xen/common/memory.c, guest_remove_page."""
    spa = frame_spa(call.machine, domain, gfn)
    if spa is None:
        return -Errno.ENOENT
    kind = domain.special.get(gfn)
    if kind not in (None, PageKind.XEN):
        return -Errno.ENXIO
    unmap_frame(call.machine, domain, gfn)
    if kind is None:
        free_page(call.machine, spa)
        domain.pages -= 1
    return 0


RESERVATIONS: dict[int, Callable[[Call, Domain, int, int], bool]] = {
    Memop.INCREASE_RESERVATION: increase,
    Memop.DECREASE_RESERVATION: decrease,
    Memop.POPULATE_PHYSMAP: populate,
}


def reservation(call: Call, command: int, handle: int, start: int) -> int:
    """increase_reservation, decrease_reservation, populate_physmap: how many extents were done, also on errors."""
    a = call.read(handle, RESERVATION)
    if a is None or a.nr_extents > MAX_EXTENTS or start >= a.nr_extents:
        return start
    domain = call.any_domain(a.domid)
    if domain is None or not call.may(domain) or a.extent_order > DOMU_MAX_ORDER:
        return start
    if command == Memop.POPULATE_PHYSMAP and a.mem_flags & POPULATE_ON_DEMAND:
        return start  # not for oneself, and toolstacks build no domains here
    run = RESERVATIONS[command]
    for done in range(start, a.nr_extents):
        if done != start and call.preempt_check():
            return call.continue_(Nr.MEMORY_OP, command | done << MEMOP_EXTENT_SHIFT, handle)
        gfn: int | None = 0
        if command != Memop.INCREASE_RESERVATION:
            gfn = call.read_long(a.extent_start + done * call.long_bytes & call.mask)
        if gfn is None or not run(call, domain, gfn, 1 << a.extent_order):
            return done
    return int(a.nr_extents)


# Mapping ----------------------------------------------------------------------------------------------------------


def _space_page(call: Call, domain: Domain, space: int, idx: int) -> int:
    """SPA of the page that a map space names, or a negated `Errno`."""
    if space == MapSpace.SHARED_INFO:
        return domain.shared_info_spa if idx == 0 else -Errno.EINVAL
    if space == MapSpace.GRANT_TABLE:
        return _grant_frame(call, domain, idx)
    if space == MapSpace.GMFN:
        if idx in domain.special:
            return -Errno.EACCES if domain.special[idx] is not PageKind.XEN else -Errno.EINVAL
        spa = page_of(call.machine, domain, idx)
        return -Errno.EACCES if spa is None else spa
    return -Errno.EINVAL


def _grant_frame(call: Call, domain: Domain, idx: int) -> int:
    """A frame of the grant table, which grows to it where it may."""
    table = domain.grants
    if table.table_version == 2 and idx & MAP_STATUS_FRAMES:
        idx &= ~MAP_STATUS_FRAMES & MASK32
        if idx >= len(table.status_frames):
            frames = (idx + 1) * grants.STATUS_PER_PAGE // grants.ENTRIES_V2
            if frames > grants.MAX_FRAMES or not grants.grow(call.machine, domain, frames):
                return -Errno.EINVAL
        return domain.grants.status_frames[idx]
    idx &= MASK32
    if idx >= len(table.frames) and (idx + 1 > grants.MAX_FRAMES or not grants.grow(call.machine, domain, idx + 1)):
        return -Errno.EINVAL
    return domain.grants.frames[idx]


def add_one(call: Call, domain: Domain, space: int, idx: int, gfn: int, foreign: int = Domid.INVALID) -> int:
    """Map one page of a space at `gfn`, in the place of what is there."""
    if space == MapSpace.GMFN_FOREIGN:
        return _add_foreign(call, domain, idx, gfn, foreign)
    if gfn > MAX_GFN or not has_room(call.machine):
        return -Errno.EINVAL if gfn > MAX_GFN else -Errno.ENOMEM
    spa = _space_page(call, domain, space, idx)
    if spa < 0:
        return spa
    old = idx if space == MapSpace.GMFN else gfn_of(call.machine, domain, spa)
    if old == gfn:
        return 0
    there = frame_spa(call.machine, domain, gfn)
    if there is not None:
        result = remove_ram(call, domain, gfn)
        if result:
            return result
    if old is not None:
        unmap_frame(call.machine, domain, old)
    map_frame(call.machine, domain, gfn, spa, None if space == MapSpace.GMFN else PageKind.XEN)
    return 0


def _add_foreign(call: Call, domain: Domain, idx: int, gfn: int, foreign: int) -> int:
    """Map another domain's page: only the control domain may."""
    if not call.domain.is_control or domain is not call.domain:
        return -Errno.EPERM
    other = xen(call.machine).domains.get(foreign)
    if other is None or other is domain:
        return -Errno.ESRCH if other is None else -Errno.EINVAL
    spa = page_of(call.machine, other, idx)
    if spa is None or gfn > MAX_GFN or not has_room(call.machine):
        return -Errno.EINVAL
    if frame_spa(call.machine, domain, gfn) is not None:
        result = remove_ram(call, domain, gfn)
        if result:
            return result
    map_frame(call.machine, domain, gfn, spa, PageKind.FOREIGN)
    return 0


def _mapping_target(call: Call, domid: int, space: int) -> Domain | int:
    """The domain whose map changes, or a negated `Errno`."""
    domain = call.any_domain(domid)
    if domain is None:
        return -Errno.ESRCH
    if space == MapSpace.DEV_MMIO:
        return -Errno.EACCES
    return domain if call.may(domain) else -Errno.EPERM


def add_to_physmap(call: Call, handle: int, start: int) -> int:
    """Map a page, or a range of the domain's own frames."""
    if start >> 16:
        return -Errno.EDOM
    a = call.read(handle, Shape(AddToPhysmap, AddToPhysmap32))
    if a is None:
        return -Errno.EFAULT
    if a.space == MapSpace.GMFN_FOREIGN:
        return -Errno.ENOSYS
    domain = _mapping_target(call, a.domid, a.space)
    if isinstance(domain, int):
        return domain
    if a.gpfn == call.mask:
        return -Errno.EINVAL
    if a.space != MapSpace.GMFN_RANGE:
        return add_one(call, domain, a.space, a.idx, a.gpfn)
    if a.size_pages < start:
        return -Errno.EILSEQ
    if a.gpfn + a.size_pages > call.mask or a.idx + a.size_pages > call.mask:
        return -Errno.EOVERFLOW
    backwards = a.idx < a.gpfn < a.idx + a.size_pages
    for done in range(start, a.size_pages):
        if done != start and call.preempt_check():
            return call.continue_(Nr.MEMORY_OP, Memop.ADD_TO_PHYSMAP | done << MEMOP_EXTENT_SHIFT, handle)
        step = a.size_pages - done - 1 if backwards else done
        result = add_one(call, domain, MapSpace.GMFN, a.idx + step, a.gpfn + step)
        if result:
            return result
    return 0


def add_to_physmap_batch(call: Call, handle: int, start: int) -> int:
    """Map many pages; each has its own error."""
    if start >> 16:
        return -Errno.EDOM
    a = call.read(handle, Shape(AddToPhysmapBatch, AddToPhysmapBatch32))
    if a is None:
        return -Errno.EFAULT
    if a.space == MapSpace.GMFN_RANGE:
        return -Errno.EOPNOTSUPP
    domain = _mapping_target(call, a.domid, a.space)
    if isinstance(domain, int):
        return domain
    if a.size_pages < start or (start and a.size_pages == start):
        return -Errno.EILSEQ
    for done in range(start, a.size_pages):
        if done != start and call.preempt_check():
            return call.continue_(Nr.MEMORY_OP, Memop.ADD_TO_PHYSMAP_BATCH | done << MEMOP_EXTENT_SHIFT, handle)
        idx = call.read_long(a.idxs + done * call.long_bytes & call.mask)
        gfn = call.read_long(a.gpfns + done * call.long_bytes & call.mask)
        if idx is None or gfn is None:
            return -Errno.EFAULT
        if gfn == call.mask:
            return -Errno.EINVAL
        result = add_one(call, domain, a.space, idx, gfn, a.foreign_domid)
        if not call.copy_out(a.errs + done * 4 & call.mask, (result & MASK32).to_bytes(4, "little")):
            return -Errno.EFAULT
    return 0


def remove_from_physmap(call: Call, handle: int) -> int:
    """Leave a hole where a page is; the page stays the domain's."""
    a = call.read(handle, Shape(RemoveFromPhysmap, RemoveFromPhysmap32))
    if a is None:
        return -Errno.EFAULT
    domain = call.any_domain(a.domid)
    if domain is None:
        return -Errno.ESRCH
    if not call.may(domain):
        return -Errno.EPERM
    if page_of(call.machine, domain, a.gpfn) is None:
        return -Errno.ENOENT
    unmap_frame(call.machine, domain, a.gpfn)
    return 0


# Questions --------------------------------------------------------------------------------------------------------


def count(call: Call, command: int, handle: int) -> int:
    """current_reservation, maximum_reservation, maximum_gpfn."""
    a = call.read(handle, MemoryDomain)
    if a is None:
        return -Errno.EFAULT
    domain = call.any_domain(a.domid)
    if domain is None:
        return -Errno.ESRCH
    if not call.may(domain):
        return -Errno.EPERM
    if command == Memop.CURRENT_RESERVATION:
        return domain.pages
    if command == Memop.MAXIMUM_RESERVATION:
        return domain.max_pages
    vm = call.machine.hypervisor.vms[domain.vm_id]
    return max((vm.memory_bytes // PAGE_BYTES - 1, *domain.special))


def memory_map(call: Call, a: Any) -> int:
    """The map that the toolstack gave the domain: its RAM from 0, unless it set another. In FastABI the buffer is
    guest-physical (UNVERIFIED: the description names a register and no kind of address).
    """
    known = call.domain.memory_map
    a.nr_entries = min(a.nr_entries, len(known) // E820Entry.SIZE)
    return 0 if call.copy_out(a.buffer_handle, known[: a.nr_entries * E820Entry.SIZE]) else -Errno.EFAULT


def set_memory_map(call: Call, a: Any) -> int:
    """Replace the map."""
    if a.nr_entries > E820_MAX:
        return -Errno.EINVAL
    domain = call.any_domain(a.domid)
    if domain is None:
        return -Errno.ESRCH
    if not call.may(domain):
        return -Errno.EPERM
    entries = call.copy_in(a.buffer_handle, a.nr_entries * E820Entry.SIZE)
    if entries is None:
        return -Errno.EFAULT
    domain.memory_map = entries
    return 0


def toolstack_only(call: Call, _handle: int) -> int:
    """Operations of toolstacks and monitors: not for guests, and not modelled for the control domain."""
    return -Errno.EOPNOTSUPP if call.domain.is_control else -Errno.EPERM


EXCHANGE = Shape(MemoryExchange, MemoryExchange32)


def exchange(call: Call, handle: int) -> int:
    """Exchange pages for others, which only a guest without nested paging can: an HVM guest gets EOPNOTSUPP when its
    first page would be taken. How far it came is written back with the error.

    Source: Xen xen/common/memory.c (memory_exchange), xen/arch/x86/mm.c (steal_page).
    """
    a = call.read(handle, EXCHANGE)
    if a is None:
        return -Errno.EFAULT
    done, result = _may_exchange(call, a)
    if result == 0:
        return 0
    field = call.layout(EXCHANGE).FIELDS["nr_exchanged"]
    written = call.copy_out(handle + field.offset & call.mask, done.to_bytes(call.long_bytes, "little"))
    return result if written else -Errno.EFAULT


def _may_exchange(call: Call, a: Any) -> tuple[int, int]:
    """(how far it came, a negated `Errno`), or 0 when nothing is left to do; chunks are of the larger extent."""
    done = a.nr_exchanged
    if max(a.in_extent_order, a.out_extent_order) > DOMU_MAX_ORDER:
        return done, -Errno.EPERM
    if (
        done > a.in_nr_extents
        or a.in_domid != a.out_domid
        or call.mask >> a.in_extent_order < a.in_nr_extents
        or call.mask >> a.out_extent_order < a.out_nr_extents
        or a.in_nr_extents << a.in_extent_order != a.out_nr_extents << a.out_extent_order
    ):
        return done, -Errno.EINVAL
    if done == a.in_nr_extents:
        return done, 0
    domain = call.any_domain(a.in_domid)
    if domain is None:
        return done, -Errno.ESRCH
    if not call.may(domain):
        return done, -Errno.EPERM
    in_chunk = max(a.out_extent_order - a.in_extent_order, 0)
    first = done >> in_chunk << in_chunk
    gfn = call.read_long(a.in_extent_start + first * call.long_bytes & call.mask)
    if gfn is None:
        return first, -Errno.EFAULT
    return first, -Errno.EINVAL if frame_spa(call.machine, domain, gfn) is None else -Errno.EOPNOTSUPP


OPERATIONS: dict[int, Operation] = {
    Memop.MEMORY_MAP: Operation(
        memory_map, Shape(MemoryMap, MemoryMap32), ("nr_entries",), (("nr_entries", 2), ("buffer_handle", 3))
    ),
    Memop.SET_MEMORY_MAP: Operation(set_memory_map, Shape(SetMemoryMap, SetMemoryMap32)),
    Memop.MACHINE_MEMORY_MAP: Operation(toolstack_only),
    Memop.SET_POD_TARGET: Operation(toolstack_only),
    Memop.GET_POD_TARGET: Operation(toolstack_only),
    Memop.ACCESS_OP: Operation(toolstack_only),
    Memop.SHARING_OP: Operation(toolstack_only),
    Memop.ACQUIRE_RESOURCE: Operation(toolstack_only),
    Memop.CLAIM_PAGES: Operation(toolstack_only),
}
QUESTIONS = (Memop.CURRENT_RESERVATION, Memop.MAXIMUM_RESERVATION, Memop.MAXIMUM_GPFN)


def memory_op(call: Call) -> int:
    """Hypercall memory_op of cmd, ptr: bits of cmd above 5 are the start extent of a continuation."""
    command, handle = call.args
    start, operation = command >> MEMOP_EXTENT_SHIFT, command & (1 << MEMOP_EXTENT_SHIFT) - 1
    if call.abi is Abi.FAST:
        return run_operation(call, OPERATIONS, command, handle)
    if operation in RESERVATIONS:
        return reservation(call, operation, handle, start)
    if operation == Memop.ADD_TO_PHYSMAP:
        return add_to_physmap(call, handle, start)
    if operation == Memop.ADD_TO_PHYSMAP_BATCH:
        return add_to_physmap_batch(call, handle, start)
    if operation == Memop.EXCHANGE:
        return -Errno.EINVAL if start else exchange(call, handle)
    if operation in QUESTIONS:
        return -Errno.EINVAL if start else count(call, operation, handle)
    if operation == Memop.REMOVE_FROM_PHYSMAP:
        return -Errno.EINVAL if start else remove_from_physmap(call, handle)
    if operation == Memop.MAXIMUM_RAM_PAGE:
        return -Errno.EINVAL if start else call.machine.memory.size_bytes // PAGE_BYTES
    return run_operation(call, OPERATIONS, command, handle)
