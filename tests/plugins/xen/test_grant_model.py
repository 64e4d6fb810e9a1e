"""Grants of three domains against a naive model: statuses, what is in use, whose bytes are where, after every call."""

from __future__ import annotations

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st
from sevlab.plugins.xen import Gntst, Gnttabop, xen
from sevlab.plugins.xen.arguments import GrantCopy, MapGrantRef, UnmapGrantRef
from sevlab.plugins.xen.numbers import Domid, Gntmap, Gtf, MapSpace

from tests.plugins.xen.world import FRAMES, guest_of, machine_of

DOMAINS, REFS = (1, 2, 3), (8, 9)
PAGES, TARGET, MAPPED = 0x40000, 0x50000, 0x80000
READING, WRITING = 1 << 3, 1 << 4
PAST_THE_TABLE = 512


def content(domid, page):
    return b"page %d of domain %d" % (page, domid)


class Naive:
    """Which grants there are, and who uses them how: a list of (user, readonly) for each."""

    def __init__(self):
        self.granted = {}
        self.uses = {}
        self.mappings = {domid: {} for domid in DOMAINS}

    def grant(self, domid, ref, peer, page, readonly):
        if not self.uses.get((domid, ref)):
            self.granted[domid, ref] = (peer, page, readonly)

    def end(self, domid, ref):
        if not self.uses.get((domid, ref)):
            self.granted.pop((domid, ref), None)

    def refusal(self, user, domid, ref, *, readonly):
        """The status of whoever wants to use a grant; None when it works."""
        if domid not in DOMAINS:
            return Gntst.BAD_DOMAIN
        if ref == PAST_THE_TABLE:
            return Gntst.BAD_GNTREF
        peer, _, only = self.granted.get((domid, ref), (None, 0, False))
        return Gntst.GENERAL_ERROR if peer != user or (only and not readonly) else None

    def map(self, user, domid, ref, readonly, gpa):
        refusal = self.refusal(user, domid, ref, readonly=readonly)
        if refusal is not None:
            return -refusal
        handle = next(number for number in range(100) if number not in self.mappings[user])
        self.mappings[user][handle] = (domid, ref, readonly, gpa)
        self.uses.setdefault((domid, ref), []).append((user, readonly))
        return 0

    def unmap(self, user, handle):
        if handle not in self.mappings[user]:
            return -Gntst.BAD_HANDLE
        domid, ref, readonly, _ = self.mappings[user].pop(handle)
        self.uses[domid, ref].remove((user, readonly))
        return 0

    def flags(self, domid, ref):
        peer, _, only = self.granted.get((domid, ref), (None, 0, False))
        uses = self.uses.get((domid, ref), [])
        flags = 0 if peer is None else Gtf.PERMIT_ACCESS | (Gtf.READONLY if only else 0)
        return flags | (READING if uses else 0) | (WRITING if any(not only for _, only in uses) else 0)


@cache
def world():
    machine = machine_of(guests=3, memory_bytes=1 << 20)
    guests = {domid: guest_of(machine, domid - 1) for domid in DOMAINS}
    for domid, guest in guests.items():
        guest.map_page(MapSpace.GRANT_TABLE, 0, FRAMES)
        for page in range(2):
            guest.write(PAGES + page * 4096, content(domid, page))
    machine.mark()
    return machine, guests


def status(guest, command, layout, **fields):
    result, statuses = guest.batch(command, layout, [fields])
    assert result == 0
    return statuses[0]


def map_flags(readonly):
    return Gntmap.HOST_MAP | (Gntmap.READONLY if readonly else 0)


def carry_out(guests, model, number, step):
    """One step in both worlds; their answers must agree."""
    name, user, domid, ref, page, readonly = step
    guest, gpa = guests[user], MAPPED + number * 4096
    if name == "grant" and ref in REFS:
        model.grant(user, ref, domid, page, readonly)
        if not model.uses.get((user, ref)):
            guest.grant(FRAMES, ref, domid, PAGES + page * 4096, readonly=readonly)
    elif name == "end" and ref in REFS:
        if not model.uses.get((user, ref)):
            guest.write(FRAMES + ref * 8, bytes(8))
        model.end(user, ref)
    elif name == "map":
        found = status(
            guest, Gnttabop.MAP_GRANT_REF, MapGrantRef, host_addr=gpa, flags=map_flags(readonly), ref=ref, dom=domid
        )
        assert found == model.map(user, domid, ref, readonly, gpa)
    elif name == "unmap":
        there = model.mappings[user]
        handle = sorted(there)[page % len(there)] if there else 7
        at = there[handle][3] if there else gpa
        assert status(guest, Gnttabop.UNMAP_GRANT_REF, UnmapGrantRef, host_addr=at, handle=handle) == model.unmap(
            user, handle
        )
    elif name == "copy":
        guest.write(TARGET, bytes(32))
        found = status(
            guest,
            Gnttabop.COPY,
            GrantCopy,
            source=ref,
            source_domid=domid,
            dest=TARGET >> 12,
            dest_domid=Domid.SELF,
            len=32,
            flags=1,
        )
        refusal = model.refusal(user, domid, ref, readonly=True)
        assert found == (0 if refusal is None else -refusal)
        expected = b"" if refusal is not None else content(domid, model.granted[domid, ref][1])
        assert guest.read(TARGET, 32).rstrip(b"\0") == expected


def agree(machine, guests, model):
    """Flags in every entry, what Xen counts, and what lies at every mapping."""
    for domid in DOMAINS:
        active = xen(machine).domains[domid].grants.active
        for ref in REFS:
            assert guests[domid].number(FRAMES + ref * 8, 2) == model.flags(domid, ref), (domid, ref)
            uses = model.uses.get((domid, ref), [])
            counts = (active[ref].readers, active[ref].writers) if ref in active else (0, 0)
            assert counts == (sum(only for _, only in uses), sum(not only for _, only in uses))
        for owner, ref, _, gpa in model.mappings[domid].values():
            expected = content(owner, model.granted[owner, ref][1])
            assert guests[domid].read(gpa, len(expected)) == expected


STEPS = st.tuples(
    st.sampled_from(("grant", "grant", "map", "map", "copy", "unmap", "end")),
    st.sampled_from(DOMAINS),
    st.sampled_from((1, 2, 3, 1, 2, 3, 9)),
    st.sampled_from((*REFS, *REFS, *REFS, PAST_THE_TABLE)),
    st.integers(0, 1),
    st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(STEPS, max_size=30))
def test_grants_do_what_a_naive_model_does(sequence):
    machine, guests = world()
    machine.reset()
    model = Naive()
    for number, step in enumerate(sequence):
        carry_out(guests, model, number, step)
        agree(machine, guests, model)
