"""Grants: entries that a domain writes, what of them is in use, and the flags that tell it so.

Nothing is copied or mapped with a key: a granted page is useful to another domain only if it is shared (C-bit clear).
Source: Xen xen/common/grant_table.c (_set_status_v1, _set_status_v2, reduce_status_for_pin, acquire_grant_for_copy,
release_grant_for_copy).
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.units import PAGE_BYTES
from sevlab.plugins.xen.frames import allocate_page, fetch, page_of, store
from sevlab.plugins.xen.layout import GrantEntryV1, GrantEntryV2
from sevlab.plugins.xen.numbers import Gntst, Gtf
from sevlab.plugins.xen.state import ActiveGrant, Domain, GrantTable, xen

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

MAX_FRAMES = 64
"""Grant frames that a domain may have. Source: Xen's default gnttab_max_frames."""
RESERVED_ENTRIES = 8
STATUS_BYTES = 2
ENTRIES_V1, ENTRIES_V2 = PAGE_BYTES // GrantEntryV1.SIZE, PAGE_BYTES // GrantEntryV2.SIZE
STATUS_PER_PAGE = PAGE_BYTES // STATUS_BYTES
MAX_PINS = 255
"""Uses of one kind that Xen counts in 8 bits."""
_V1, _V2 = Struct("<HHI"), Struct("<HHHHQ")
"""The entries as numbers: flags, domain, frame; flags, domain, offset, length, frame."""
_PERMIT_ACCESS, _TRANSITIVE, _TYPE_MASK, _READONLY, _READING, _WRITING, _SUB_PAGE = (
    int(flag)
    for flag in (
        Gtf.PERMIT_ACCESS,
        Gtf.TRANSITIVE,
        Gtf.TYPE_MASK,
        Gtf.READONLY,
        Gtf.READING,
        Gtf.WRITING,
        Gtf.SUB_PAGE,
    )
)
_record = tuple.__new__
"""Makes a NamedTuple without the keyword machinery."""


class GrantEntry(NamedTuple):
    """An entry, of either version, as fetched once."""

    flags: int
    domid: int
    frame: int
    offset: int = 0
    length: int = 0

    @property
    def kind(self) -> int:
        """Invalid, access, transfer or transitive."""
        return self.flags & _TYPE_MASK


def entries(table: GrantTable) -> int:
    """How many references the table holds."""
    return len(table.frames) * (ENTRIES_V1 if table.table_version == 1 else ENTRIES_V2)


def status_frames_for(frames: int) -> int:
    """Status frames that go with this many frames of version 2."""
    return -(-frames * ENTRIES_V2 // STATUS_PER_PAGE)


def entry_spa(table: GrantTable, ref: int) -> int:
    """SPA of an entry; `ref` below `entries`."""
    per_page, size = (ENTRIES_V1, GrantEntryV1.SIZE) if table.table_version == 1 else (ENTRIES_V2, GrantEntryV2.SIZE)
    return table.frames[ref // per_page] + ref % per_page * size


def status_spa(table: GrantTable, ref: int) -> int:
    """SPA of the 16-bit word where Xen says what is in use: the flags, or the status frames of version 2."""
    if table.table_version == 1:
        return entry_spa(table, ref)
    return table.status_frames[ref // STATUS_PER_PAGE] + ref % STATUS_PER_PAGE * STATUS_BYTES


def read_entry(machine: Machine, table: GrantTable, ref: int) -> GrantEntry:
    """One fetch of an entry."""
    spa = entry_spa(table, ref)
    if table.table_version == 1:
        return _record(GrantEntry, (*_V1.unpack(fetch(machine, spa, GrantEntryV1.SIZE)), 0, 0))
    flags, domid, offset, length, frame = _V2.unpack(fetch(machine, spa, GrantEntryV2.SIZE))
    return GrantEntry(flags, domid, frame, offset, length)


def _change_flags(machine: Machine, table: GrantTable, ref: int, *, set_: int = 0, clear: int = 0) -> None:
    spa = status_spa(table, ref)
    word = int.from_bytes(fetch(machine, spa, STATUS_BYTES), "little")
    store(machine, spa, (word & ~clear | set_).to_bytes(STATUS_BYTES, "little"))


def set_status(
    machine: Machine,
    domain: Domain,
    ref: int,
    entry: GrantEntry,
    *,
    pinned: bool,
    readonly: bool,
    mapping: bool,
    user: int,
) -> bool:
    """Mark an entry as in use by domain `user`; False when it does not allow that."""
    table = domain.grants
    mask = _TYPE_MASK | (_SUB_PAGE if mapping else 0)
    if not pinned:
        transitive = table.table_version == 2 and not mapping and entry.flags & mask == _TRANSITIVE
        if (entry.flags & mask != _PERMIT_ACCESS and not transitive) or entry.domid != user:
            return False
    if not readonly and entry.flags & _READONLY:
        return False
    _change_flags(machine, table, ref, set_=_READING | (0 if readonly else _WRITING))
    return True


def reduce_status(machine: Machine, domain: Domain, ref: int, active: ActiveGrant | None, *, readonly: bool) -> None:
    """Clear what is not in use any more."""
    readers, writers = (0, 0) if active is None else (active.readers, active.writers)
    clear = 0 if readers or writers else _READING
    if not readonly and not writers:
        clear |= _WRITING
    if clear and ref < entries(domain.grants):
        _change_flags(machine, domain.grants, ref, clear=clear)


def unpin(domain: Domain, ref: int, *, readonly: bool) -> ActiveGrant | None:
    """One use less; None when it was the last."""
    active = domain.grants.active[ref]
    if readonly:
        active.readers -= 1
    else:
        active.writers -= 1
    if active.readers or active.writers:
        return active
    del domain.grants.active[ref]
    return None


class Claim(NamedTuple):
    """A grant acquired for a copy: the page and the part of it that may be used."""

    domain: Domain
    ref: int
    spa: int
    start: int
    length: int
    readonly: bool


def acquire_for_copy(
    machine: Machine, domain: Domain, ref: int, user: int, *, readonly: bool, transitive_allowed: bool = True
) -> Claim | Gntst:
    """Pin a grant of `domain` for a copy by domain `user`; the reason when it does not work."""
    table = domain.grants
    if ref >= entries(table):
        return Gntst.BAD_GNTREF
    active = table.active.get(ref)
    if active is not None and (active.domid != user or (active.readers if readonly else active.writers) >= MAX_PINS):
        return Gntst.GENERAL_ERROR
    entry = read_entry(machine, table, ref)
    if table.table_version == 2 and entry.kind == _TRANSITIVE:
        return _acquire_transitive(machine, domain, ref, entry, user, readonly=readonly, allowed=transitive_allowed)
    if active is None or (not readonly and not active.writers):
        if not set_status(
            machine, domain, ref, entry, pinned=active is not None, readonly=readonly, mapping=False, user=user
        ):
            return Gntst.GENERAL_ERROR
        spa = page_of(machine, domain, entry.frame)
        if spa is None:
            reduce_status(machine, domain, ref, active, readonly=readonly)
            return Gntst.BAD_PAGE
        sub_page = table.table_version == 2 and bool(entry.flags & _SUB_PAGE)
        start, length = (entry.offset, entry.length) if sub_page else (0, PAGE_BYTES)
        if active is None:
            active = table.active[ref] = ActiveGrant(
                domid=user,
                spa=spa,
                start=start,
                length=length,
                is_sub_page=sub_page,
                source_domid=domain.domid,
                source_ref=ref,
            )
        elif (active.spa, active.source_domid, active.source_ref) != (spa, domain.domid, ref) or (
            active.is_sub_page and (not sub_page or (active.start, active.length) != (start, length))
        ):
            reduce_status(machine, domain, ref, active, readonly=readonly)
            return Gntst.GENERAL_ERROR
    if readonly:
        active.readers += 1
    else:
        active.writers += 1
    return Claim(domain, ref, active.spa, active.start, active.length, readonly)


def _acquire_transitive(
    machine: Machine, domain: Domain, ref: int, entry: GrantEntry, user: int, *, readonly: bool, allowed: bool
) -> Claim | Gntst:
    """A grant of a grant: one level only, never of oneself."""
    table = domain.grants
    active = table.active.get(ref)
    if (active is None or (not readonly and not active.writers)) and not set_status(
        machine, domain, ref, entry, pinned=active is not None, readonly=readonly, mapping=False, user=user
    ):
        return Gntst.GENERAL_ERROR
    third = xen(machine).domains.get(entry.offset)
    if not allowed or third is None or third is domain:
        reduce_status(machine, domain, ref, active, readonly=readonly)
        return Gntst.GENERAL_ERROR
    far_ref = entry.frame & 0xFFFF_FFFF
    claim = acquire_for_copy(machine, third, far_ref, domain.domid, readonly=readonly, transitive_allowed=False)
    if isinstance(claim, Gntst):
        reduce_status(machine, domain, ref, active, readonly=readonly)
        return claim
    if active is None:
        active = table.active[ref] = ActiveGrant(
            domid=user,
            spa=claim.spa,
            start=claim.start,
            length=claim.length,
            is_sub_page=True,
            source_domid=third.domid,
            source_ref=far_ref,
        )
    elif (active.spa, active.start, active.length, active.source_domid, active.source_ref, active.is_sub_page) != (
        claim.spa,
        claim.start,
        claim.length,
        third.domid,
        far_ref,
        True,
    ):
        release(machine, claim)
        reduce_status(machine, domain, ref, active, readonly=readonly)
        return Gntst.EAGAIN
    if readonly:
        active.readers += 1
    else:
        active.writers += 1
    return Claim(domain, ref, active.spa, active.start, active.length, readonly)


def release(machine: Machine, claim: Claim) -> None:
    """Let go of a claim, and of the one behind a transitive grant."""
    active = claim.domain.grants.active[claim.ref]
    behind = (active.source_domid, active.source_ref)
    left = unpin(claim.domain, claim.ref, readonly=claim.readonly)
    reduce_status(machine, claim.domain, claim.ref, left, readonly=claim.readonly)
    if behind[0] != claim.domain.domid:
        release(machine, claim._replace(domain=xen(machine).domains[behind[0]], ref=behind[1]))


def grow(machine: Machine, domain: Domain, frames: int) -> bool:
    """Let the table have at least `frames` frames, and the status frames that go with them; False without memory."""
    table = domain.grants
    shared, status = list(table.frames), list(table.status_frames)
    wanted_status = status_frames_for(max(frames, len(shared))) if table.table_version == 2 else 0
    for pages, wanted in ((shared, frames), (status, wanted_status)):
        while len(pages) < wanted:
            spa = allocate_page(machine)
            if spa is None:
                return False
            pages.append(spa)
    table.frames, table.status_frames = tuple(shared), tuple(status)
    return True
