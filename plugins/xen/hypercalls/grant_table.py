"""grant_table_op, as far as an HVM guest may use it.

Source: Xen xen/common/grant_table.c, check by check in their order; xen/arch/x86/hvm/{hypercall,grant_table}.c.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from sevlab.core.layout import Layout
from sevlab.core.memory import TAG_HYPERVISOR
from sevlab.core.units import MASK32, PAGE_BYTES, PAGE_SHIFT
from sevlab.plugins.xen import grants
from sevlab.plugins.xen.arguments import (
    GetVersion,
    GrantCopy,
    GrantCopy32,
    MapGrantRef,
    QuerySize,
    SetupTable,
    SetupTable32,
    SetVersion,
    Shape,
    SwapGrantRef,
    UnmapGrantRef,
)
from sevlab.plugins.xen.call import Abi, Call, is_grant
from sevlab.plugins.xen.frames import (
    INVALID_GFN,
    MAX_GFN,
    fetch,
    frame_spa,
    free_page,
    gfn_of,
    has_room,
    map_frame,
    may_write,
    page_of,
    store,
    unmap_frame,
)
from sevlab.plugins.xen.grants import Claim
from sevlab.plugins.xen.layout import GrantEntryV1, GrantEntryV2
from sevlab.plugins.xen.numbers import (
    COPY_DEST_GREF,
    COPY_SOURCE_GREF,
    Domid,
    Errno,
    Gntmap,
    Gntst,
    Gnttabop,
    Gtf,
    Nr,
)
from sevlab.plugins.xen.operations import Operation, run_operation
from sevlab.plugins.xen.state import ActiveGrant, Domain, Mapping, PageKind, xen

MAX_HANDLES = 1024 * (PAGE_BYTES // 16)
"""Grants that a domain may map at once. Source: Xen's default gnttab_max_maptrack_frames, 16 bytes an entry."""


def status(code: Gntst) -> int:
    """A status as the 16 bits that the structure holds."""
    return -code & 0xFFFF


# Map and unmap ----------------------------------------------------------------------------------------------------


def map_grant_ref(call: Call, a: Any) -> Gntst:
    """Map another domain's granted page at a guest frame."""
    if not a.flags & (Gntmap.DEVICE_MAP | Gntmap.HOST_MAP):
        return Gntst.BAD_GNTREF
    if a.flags & (Gntmap.DEVICE_MAP | Gntmap.APPLICATION_MAP | Gntmap.CONTAINS_PTE):
        return Gntst.GENERAL_ERROR
    remote = xen(call.machine).domains.get(a.dom)
    if remote is None:
        return Gntst.BAD_DOMAIN
    mine, table = call.domain.grants, remote.grants
    if len(mine.maptrack) >= MAX_HANDLES:
        return Gntst.NO_SPACE
    if a.ref >= grants.entries(table):
        return Gntst.BAD_GNTREF
    readonly = bool(a.flags & Gntmap.READONLY)
    active = table.active.get(a.ref)
    user = call.domain.domid
    if active is not None and (
        active.domid != user
        or (active.readers if readonly else active.writers) >= grants.MAX_PINS
        or active.is_sub_page
    ):
        return Gntst.GENERAL_ERROR
    if active is None or (not readonly and not active.writers):
        entry = grants.read_entry(call.machine, table, a.ref)
        if not grants.set_status(
            call.machine, remote, a.ref, entry, pinned=active is not None, readonly=readonly, mapping=True, user=user
        ):
            return Gntst.GENERAL_ERROR
        if active is None:
            spa = page_of(call.machine, remote, entry.frame)
            if spa is None:
                grants.reduce_status(call.machine, remote, a.ref, None, readonly=readonly)
                return Gntst.BAD_PAGE
            active = ActiveGrant(domid=user, spa=spa, length=PAGE_BYTES, source_domid=a.dom, source_ref=a.ref)
            table.active[a.ref] = active
    if readonly:
        active.readers += 1
    else:
        active.writers += 1
    gfn = a.host_addr >> PAGE_SHIFT
    unmappable = (
        a.flags & ~Gntmap.READONLY != Gntmap.HOST_MAP
        or gfn > MAX_GFN
        or is_grant(call.domain, gfn)
        or call.domain.special.get(gfn) is PageKind.FOREIGN
        or not has_room(call.machine)
    )
    if unmappable:
        left = grants.unpin(remote, a.ref, readonly=readonly)
        grants.reduce_status(call.machine, remote, a.ref, left, readonly=readonly)
        return Gntst.GENERAL_ERROR
    kind = PageKind.GRANT_RO if readonly else PageKind.GRANT_RW
    map_frame(call.machine, call.domain, gfn, active.spa, kind, writable=not readonly)
    handle = next(number for number in range(MAX_HANDLES) if number not in mine.maptrack)
    mine.maptrack[handle] = Mapping(domid=a.dom, ref=a.ref, flags=a.flags, spa=active.spa)
    a.dev_bus_addr, a.handle = active.spa, handle
    return Gntst.OKAY


def unmap_grant_ref(call: Call, a: Any) -> Gntst:
    """Remove a mapping. Without a host address nothing is removed, and that is no error."""
    mapping = call.domain.grants.maptrack.get(a.handle)
    if mapping is None:
        return Gntst.BAD_HANDLE
    remote = xen(call.machine).domains[mapping.domid]
    if not a.host_addr:
        return Gntst.OKAY
    gfn = a.host_addr >> PAGE_SHIFT
    if not is_grant(call.domain, gfn) or frame_spa(call.machine, call.domain, gfn) != mapping.spa:
        return Gntst.GENERAL_ERROR
    unmap_frame(call.machine, call.domain, gfn)
    readonly = bool(mapping.flags & Gntmap.READONLY)
    call.domain.grants.maptrack.pop(a.handle, None)
    left = grants.unpin(remote, mapping.ref, readonly=readonly)
    grants.reduce_status(call.machine, remote, mapping.ref, left, readonly=readonly)
    return Gntst.OKAY


# Copy -------------------------------------------------------------------------------------------------------------


def _side(call: Call, a: Any, *, source: bool) -> Claim | Gntst:
    """Pin one side of a copy."""
    number, domid = (a.source, a.source_domid) if source else (a.dest, a.dest_domid)
    domain = call.any_domain(domid)
    assert domain is not None  # tested by copy()
    if a.flags & (COPY_SOURCE_GREF if source else COPY_DEST_GREF):
        return grants.acquire_for_copy(call.machine, domain, number & MASK32, call.domain.domid, readonly=source)
    spa = page_of(call.machine, domain, number)
    if spa is None:
        return Gntst.BAD_PAGE
    return Claim(domain, -1, spa, 0, PAGE_BYTES, source)


def copy(call: Call, a: Any) -> Gntst:
    """Copy within one page each; a side is a reference, or a frame of the caller's own."""
    if not a.len:
        return Gntst.OKAY
    for domid, by_ref in ((a.source_domid, a.flags & COPY_SOURCE_GREF), (a.dest_domid, a.flags & COPY_DEST_GREF)):
        if not by_ref and domid != Domid.SELF:
            return Gntst.PERMISSION_DENIED
        if call.any_domain(domid) is None:
            return Gntst.BAD_DOMAIN
    held: list[Claim] = []
    try:
        for source in (True, False):
            claim = _side(call, a, source=source)
            if isinstance(claim, Gntst):
                return claim
            held.append(claim)
        return _copy_bytes(call, a, *held)
    finally:
        for claim in held:
            if claim.ref >= 0:
                grants.release(call.machine, claim)


def _copy_bytes(call: Call, a: Any, source: Claim, dest: Claim) -> Gntst:
    if not may_write(call.machine, dest.spa):
        return Gntst.GENERAL_ERROR
    if a.source_offset + a.len > PAGE_BYTES or a.dest_offset + a.len > PAGE_BYTES:
        return Gntst.BAD_COPY_ARG
    for offset, claim in ((a.source_offset, source), (a.dest_offset, dest)):
        if offset < claim.start or offset + a.len > claim.start + claim.length:
            return Gntst.GENERAL_ERROR
    data = fetch(call.machine, source.spa + a.source_offset, a.len)
    call.machine.memory.write(dest.spa + a.dest_offset, data, None, TAG_HYPERVISOR)
    return Gntst.OKAY


def swap_grant_ref(call: Call, a: Any) -> Gntst:
    """Exchange two entries that nobody uses."""
    table = call.domain.grants
    if a.ref_a >= grants.entries(table) or a.ref_b >= grants.entries(table):
        return Gntst.BAD_GNTREF
    if a.ref_a == a.ref_b:
        return Gntst.OKAY
    if a.ref_a in table.active or a.ref_b in table.active:
        return Gntst.EAGAIN
    size = (GrantEntryV1 if table.table_version == 1 else GrantEntryV2).SIZE
    places = [(grants.entry_spa(table, a.ref_a), grants.entry_spa(table, a.ref_b), size)]
    if table.table_version == 2:
        places.append((grants.status_spa(table, a.ref_a), grants.status_spa(table, a.ref_b), grants.STATUS_BYTES))
    for one, other, length in places:
        kept = fetch(call.machine, one, length)
        store(call.machine, one, fetch(call.machine, other, length))
        store(call.machine, other, kept)
    return Gntst.OKAY


class Batch(NamedTuple):
    """An operation on an array: each element gets its status."""

    run: Callable[[Call, Any], Gntst]
    shape: type[Layout] | Shape
    whole: bool = False
    """Xen writes back the whole element, not only its status."""


BATCHES: dict[int, Batch] = {
    Gnttabop.MAP_GRANT_REF: Batch(map_grant_ref, MapGrantRef, whole=True),
    Gnttabop.UNMAP_GRANT_REF: Batch(unmap_grant_ref, UnmapGrantRef),
    Gnttabop.COPY: Batch(copy, Shape(GrantCopy, GrantCopy32)),
    Gnttabop.SWAP_GRANT_REF: Batch(swap_grant_ref, SwapGrantRef),
}


def run_batch(call: Call, command: int, batch: Batch, handle: int, count: int) -> int:
    """Each element in turn; a continuation starts at the first that is left. An element that cannot be read or written
    ends it with EFAULT, those before it are done.
    """
    layout = call.layout(batch.shape)
    status_at = layout.FIELDS["status"].offset
    for index in range(count):
        at = handle + index * layout.SIZE & call.mask
        if index and call.preempt_check():
            return call.continue_(Nr.GRANT_TABLE_OP, command, at, count - index)
        snapshot = call.read(at, batch.shape)
        if snapshot is None:
            return -Errno.EFAULT
        if not batch.whole:
            written = call.copy_out(at + status_at, status(batch.run(call, snapshot)).to_bytes(2, "little"))
        else:
            element = SimpleNamespace(**{name: getattr(snapshot, name) for name in snapshot.FIELDS})
            element.status = status(batch.run(call, element))
            written = call.copy_out(at, snapshot.replace(**vars(element)).to_bytes())
        if not written:
            return -Errno.EFAULT
    return 0


# The table itself -------------------------------------------------------------------------------------------------


def _target(call: Call, a: Any) -> Domain | None:
    """The domain of a table operation; None when its status says why not."""
    domain = call.any_domain(a.dom)
    if domain is None:
        a.status = status(Gntst.BAD_DOMAIN)
    elif not call.may(domain):
        a.status = status(Gntst.PERMISSION_DENIED)
        return None
    return domain


def setup_table(call: Call, a: Any) -> int:
    """Grow the table and say where its frames are mapped: for a translated guest, where it mapped them itself."""
    domain = _target(call, a)
    if domain is None:
        return 0
    if a.nr_frames > grants.MAX_FRAMES or not grants.grow(call.machine, domain, a.nr_frames):
        a.status = status(Gntst.GENERAL_ERROR)
        return 0
    a.status = 0
    for index in range(a.nr_frames):
        gfn = gfn_of(call.machine, domain, domain.grants.frames[index])
        value = (INVALID_GFN if gfn is None else gfn) & call.mask
        if not call.copy_out(a.frame_list + index * call.long_bytes, value.to_bytes(call.long_bytes, "little")):
            a.status = status(Gntst.BAD_VIRT_ADDR)
            break
    return 0


def query_size(call: Call, a: Any) -> int:
    """How large the table is and may become."""
    domain = _target(call, a)
    if domain is not None:
        a.nr_frames, a.max_nr_frames, a.status = len(domain.grants.frames), grants.MAX_FRAMES, 0
    return 0


def set_version(call: Call, a: Any) -> int:
    """Change the version; entries past the reserved ones must not be in use, and are wiped."""
    table = call.domain.grants
    wanted, before = a.table_version, table.table_version
    a.table_version = before
    if wanted not in (1, 2):
        return -Errno.EINVAL
    if wanted == before:
        return 0
    if any(ref >= grants.RESERVED_ENTRIES for ref in table.active):
        return -Errno.EBUSY
    result = _to_version_2(call, table) if wanted == 2 else _to_version_1(call, table)
    a.table_version = table.table_version
    return result


def _wipe(call: Call, spas: tuple[int, ...]) -> None:
    for spa in spas:
        store(call.machine, spa, bytes(PAGE_BYTES))


def _to_version_2(call: Call, table: Any) -> int:
    kept = [grants.read_entry(call.machine, table, ref) for ref in range(grants.RESERVED_ENTRIES)]
    table.table_version = 2
    if not grants.grow(call.machine, call.domain, len(table.frames)):
        table.table_version = 1
        return -Errno.ENOMEM
    _wipe(call, table.frames + table.status_frames)
    used = Gtf.READING | Gtf.WRITING
    for ref, entry in enumerate(kept):
        data = GrantEntryV2.build(flags=entry.flags & ~used, domid=entry.domid, frame=entry.frame)
        store(call.machine, grants.entry_spa(table, ref), data)
        store(call.machine, grants.status_spa(table, ref), (entry.flags & used).to_bytes(2, "little"))
    return 0


def _to_version_1(call: Call, table: Any) -> int:
    if any(grant.is_sub_page for grant in table.active.values()):
        return -Errno.EAGAIN
    kept = []
    for ref in range(grants.RESERVED_ENTRIES):
        entry = grants.read_entry(call.machine, table, ref)
        if entry.kind == Gtf.TRANSITIVE or (entry.kind == Gtf.PERMIT_ACCESS and entry.frame >> 32):
            return -Errno.ERANGE
        word = int.from_bytes(fetch(call.machine, grants.status_spa(table, ref), 2), "little")
        kept.append(
            GrantEntryV1.build(flags=entry.flags | word, domid=entry.domid, frame=entry.frame)
            if entry.kind == Gtf.PERMIT_ACCESS
            else bytes(GrantEntryV1.SIZE)
        )
    for spa in table.status_frames:
        gfn = gfn_of(call.machine, call.domain, spa)
        if gfn is not None:
            unmap_frame(call.machine, call.domain, gfn)
        free_page(call.machine, spa)
    table.status_frames = ()
    table.table_version = 1
    _wipe(call, table.frames)
    for ref, data in enumerate(kept):
        store(call.machine, grants.entry_spa(table, ref), data)
    return 0


def get_version(call: Call, a: Any) -> int:
    """The version of a domain's table."""
    domain = call.any_domain(a.dom)
    if domain is None:
        return -Errno.ESRCH
    if not call.may(domain):
        return -Errno.EPERM
    a.table_version = domain.grants.table_version
    return 0


OPERATIONS: dict[int, Operation] = {
    Gnttabop.SETUP_TABLE: Operation(setup_table, Shape(SetupTable, SetupTable32), ("status",)),
    Gnttabop.QUERY_SIZE: Operation(
        query_size, QuerySize, ("nr_frames", "max_nr_frames", "status"), (), (("nr_frames", 2), ("max_nr_frames", 3))
    ),
    Gnttabop.SET_VERSION: Operation(set_version, SetVersion, ("table_version",), (("table_version", 2),), always=True),
    Gnttabop.GET_VERSION: Operation(get_version, GetVersion, ("table_version",), (), (("table_version", 2),)),
}


def _fast(run: Callable[[Call, Any], Gntst]) -> Callable[[Call, Any], int]:
    def once(call: Call, a: Any) -> int:
        a.status = status(run(call, a))
        return 0

    return once


FAST_OPERATIONS: dict[int, Operation] = {
    **OPERATIONS,
    Gnttabop.MAP_GRANT_REF: Operation(
        _fast(map_grant_ref),
        MapGrantRef,
        (),
        (("dom", 2), ("host_addr", 3), ("flags", 4), ("ref", 5)),
        (("handle", 6), ("status", 7)),
    ),
    Gnttabop.UNMAP_GRANT_REF: Operation(
        _fast(unmap_grant_ref), UnmapGrantRef, (), (("host_addr", 3), ("handle", 6)), ()
    ),
}
"""FastABI has no copy: a domain with nothing else cannot copy grants. QUERY_SIZE and GET_VERSION are of the caller."""


def grant_table_op(call: Call) -> int:
    """Hypercall grant_table_op of cmd, ptr, count."""
    command, handle, count = call.args
    if call.abi is Abi.FAST:
        return run_operation(call, FAST_OPERATIONS, command, handle)
    if command not in BATCHES and command not in OPERATIONS:
        return -Errno.ENOSYS
    if count >> 31:
        return -Errno.EINVAL
    batch = BATCHES.get(command)
    if batch is not None:
        return run_batch(call, command, batch, handle, count)
    if command in (Gnttabop.SETUP_TABLE, Gnttabop.QUERY_SIZE) and count != 1:
        return -Errno.EINVAL
    return run_operation(call, OPERATIONS, command, handle)
