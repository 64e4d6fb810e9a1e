"""Several domains call at random: event channels and grants against a naive model.

The model knows nothing of Xen's tables: channels are a dictionary from (domain, port) to what they are, grants are
counted by who maps them, and memory is bytes by (domain, page).
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sevlab.core.oracle import OracleSink
from sevlab.plugins.xen import Errno, Evtchnop, Gnttabop, HypercallStep, Nr, xen
from sevlab.plugins.xen.arguments import GrantCopy, MapGrantRef, UnmapGrantRef
from sevlab.plugins.xen.fuzzing import ORACLES
from sevlab.plugins.xen.numbers import Domid, MapSpace

from tests.plugins.xen.world import FRAMES, guest_of, machine_of

DOMAINS = (1, 2, 3)
GRANTED, COPIED, MAPPED = 0x30000, 0x40000, 0x50000
REFS = (8, 9)
FIRST_PORT = 3
"""Ports 1 and 2 are those of the rings."""
domains = st.sampled_from(DOMAINS)
picks = st.integers(0, 999)
numbers = st.one_of(
    st.integers(0, 40), st.sampled_from((0x10000, 0x20000, 1 << 31, (1 << 64) - 1)), st.integers(0, (1 << 64) - 1)
)


CHANNEL_ACTIONS = ("alloc", "bind", "bind", "bind_ipi", "close", "send", "send")
GRANT_ACTIONS = ("grant", "copy_from", "copy_to", "map", "map", "unmap")


class Domains(RuleBasedStateMachine):
    """The machine under test beside the model."""

    @initialize()
    def begin(self):
        self.machine = machine_of(guests=3, memory_bytes=4 << 20, preempt_after=4)
        self.machine.sink = OracleSink(ORACLES)
        self.guests = {domid: guest_of(self.machine, domid - 1) for domid in DOMAINS}
        self.channels: dict[tuple[int, int], tuple] = {}
        self.grants: dict[tuple[int, int], tuple[int, bool]] = {}
        self.mappings: dict[tuple[int, int], tuple[int, int, bool, int]] = {}
        self.bytes = {domid: bytes((domid,)) * 16 for domid in DOMAINS}
        for domid, guest in self.guests.items():
            guest.map_page(MapSpace.GRANT_TABLE, 0, FRAMES)
            guest.share(GRANTED)
            guest.write(GRANTED, self.bytes[domid])

    # Event channels -----------------------------------------------------------------------------------------------

    def op(self, domid, command, **fields):
        return self.guests[domid].invoke(Nr.EVENT_CHANNEL_OP, command, **fields)

    def free(self, domid):
        return next(port for port in range(FIRST_PORT, 4096) if (domid, port) not in self.channels)

    def alloc(self, domid, remote):
        port = self.free(domid)
        answer = self.op(domid, Evtchnop.ALLOC_UNBOUND, dom=Domid.SELF, remote_dom=remote)
        assert (answer.result, answer.fields["port"]) == (0, port)
        self.channels[domid, port] = ("unbound", remote)

    def pick(self, number, *states, domid=None):
        """A port in one of these states more often than not, any port of a domain otherwise."""
        good = [
            place
            for place, what in sorted(self.channels.items())
            if what[0] in states and (domid is None or what[1:2] == (domid,))
        ]
        return good[number % len(good)] if good and number % 5 else (DOMAINS[number % 3], number % 9 + FIRST_PORT)

    def bind(self, domid, number):
        remote, port = self.pick(number, "unbound", domid=domid)
        answer = self.op(domid, Evtchnop.BIND_INTERDOMAIN, remote_dom=remote, remote_port=port)
        if self.channels.get((remote, port)) != ("unbound", domid):
            assert answer.result == -Errno.EINVAL
            return
        near = self.free(domid)
        assert (answer.result, answer.fields["local_port"]) == (0, near)
        self.channels[domid, near] = ("connected", remote, port)
        self.channels[remote, port] = ("connected", domid, near)

    def bind_ipi(self, domid):
        port = self.free(domid)
        assert self.op(domid, Evtchnop.BIND_IPI, vcpu=0).fields["port"] == port
        self.channels[domid, port] = ("ipi",)

    def close(self, number):
        domid, port = self.pick(number, "connected", "unbound", "ipi")
        what = self.channels.pop((domid, port), None)
        assert self.op(domid, Evtchnop.CLOSE, port=port).result == (0 if what else -Errno.EINVAL)
        if what and what[0] == "connected":
            self.channels[what[1], what[2]] = ("unbound", domid)

    def send(self, number):
        domid, port = self.pick(number, "connected", "ipi")
        what = self.channels.get((domid, port))
        assert self.op(domid, Evtchnop.SEND, port=port).result == (0 if what else -Errno.EINVAL)
        if what and what[0] != "unbound":
            target = (what[1], what[2]) if what[0] == "connected" else (domid, port)
            page = xen(self.machine).domains[target[0]].shared_info_spa
            assert self.machine.memory.read(page + 2048 + target[1] // 8, 1, None)[0] >> target[1] % 8 & 1

    @rule(
        actions=st.lists(st.tuples(st.sampled_from(CHANNEL_ACTIONS), domains, domains, picks), min_size=1, max_size=8)
    )
    def work_on_channels(self, actions):
        """Several at once, so that connections come about."""
        for action, domid, remote, number in actions:
            if action == "alloc":
                self.alloc(domid, remote)
            elif action == "bind":
                self.bind(domid, number)
            elif action == "bind_ipi":
                self.bind_ipi(domid)
            elif action == "close":
                self.close(number)
            else:
                self.send(number)
            self.channels_agree()

    # Grants -------------------------------------------------------------------------------------------------------

    def uses(self, owner, ref):
        return [mapping for mapping in self.mappings.values() if mapping[:2] == (owner, ref)]

    def grant(self, owner, ref, user, *, readonly):
        if not self.uses(owner, ref):  # a guest that changes a grant in use breaks its own protocol
            self.guests[owner].grant(FRAMES, ref, user, GRANTED, readonly=readonly)
            self.grants[owner, ref] = (user, readonly)

    def allowed(self, owner, ref, user, *, write):
        granted = self.grants.get((owner, ref))
        return granted is not None and granted[0] == user and not (write and granted[1])

    def granted(self, number):
        """(user, owner, reference): of a grant more often than not."""
        good = sorted(self.grants.items())
        if good and number % 5:
            (owner, ref), (user, _) = good[number % len(good)]
            return user, owner, ref
        return DOMAINS[number % 3], DOMAINS[number // 3 % 3], REFS[number % 2]

    def copy_from(self, number):
        user, owner, ref = self.granted(number)
        fields = {"source": ref, "source_domid": owner, "dest": COPIED >> 12, "dest_domid": Domid.SELF}
        statuses = self.guests[user].batch(Gnttabop.COPY, GrantCopy, [fields | {"len": 16, "flags": 1}])[1]
        assert statuses == [0 if self.allowed(owner, ref, user, write=False) else -1]
        if statuses == [0]:
            assert self.guests[user].read(COPIED, 16) == self.bytes[owner]

    def copy_to(self, number, fill):
        user, owner, ref = self.granted(number)
        self.guests[user].write(COPIED, bytes((fill,)) * 16)
        fields = {"source": COPIED >> 12, "source_domid": Domid.SELF, "dest": ref, "dest_domid": owner}
        statuses = self.guests[user].batch(Gnttabop.COPY, GrantCopy, [fields | {"len": 16, "flags": 2}])[1]
        assert statuses == [0 if self.allowed(owner, ref, user, write=True) else -1]
        if statuses == [0]:
            self.bytes[owner] = bytes((fill,)) * 16

    def map(self, number, slot, *, readonly):
        user, owner, ref = self.granted(number)
        taken = {mapping[3] for (who, _), mapping in self.mappings.items() if who == user}
        fields = {"host_addr": MAPPED + slot * 4096, "flags": 2 | 4 * readonly, "ref": ref, "dom": owner}
        guest = self.guests[user]
        statuses = guest.batch(Gnttabop.MAP_GRANT_REF, MapGrantRef, [fields])[1]
        works = self.allowed(owner, ref, user, write=not readonly) and slot not in taken
        assert statuses == [0 if works else -1]
        if works:
            handle = MapGrantRef.from_bytes(guest.read(guest.bounce_gpa, 32)).handle
            assert (user, handle) not in self.mappings
            self.mappings[user, handle] = (owner, ref, readonly, slot)
            assert guest.read(MAPPED + slot * 4096, 16) == self.bytes[owner]

    def unmap(self, user, handle):
        mapping = self.mappings.pop((user, handle), None)
        gpa = MAPPED + (mapping[3] if mapping else 0) * 4096
        fields = {"host_addr": gpa, "handle": handle}
        statuses = self.guests[user].batch(Gnttabop.UNMAP_GRANT_REF, UnmapGrantRef, [fields])[1]
        assert statuses == [0 if mapping else -4]

    @rule(actions=st.lists(st.tuples(st.sampled_from(GRANT_ACTIONS), domains, domains, picks), min_size=1, max_size=8))
    def work_on_grants(self, actions):
        """Several at once, so that grants are in use."""
        for action, one, other, number in actions:
            if action == "grant":
                self.grant(one, REFS[number % 2], other, readonly=number % 4 > 1)
            elif action == "copy_from":
                self.copy_from(number)
            elif action == "copy_to":
                self.copy_to(number, number & 0xFF)
            elif action == "map":
                self.map(number, number % 4, readonly=number % 3 == 0)
            else:
                self.unmap(one, number % 5)
            self.grants_agree()

    # Anything -----------------------------------------------------------------------------------------------------

    @rule(domid=domains, number=st.sampled_from((17, 18, 20, 32, 33, 34, 41, 43, 99)), args=st.tuples(*[numbers] * 5))
    def anything(self, domid, number, args):
        """Calls whose arguments are nonsense are refused, and change nothing that the model sees."""
        if number in (20, 32):
            args = (args[0] | 0x40, *args[1:])  # no operation of these tables
        if number == 34:
            args = (args[0] | 0x100, *args[1:])
        self.machine.apply(HypercallStep(domid - 1, number, *args, 0, 0))

    # Agreement ----------------------------------------------------------------------------------------------------

    @invariant()
    def nobody_found_anything(self):
        if hasattr(self, "machine"):
            assert not self.machine.sink.findings

    @invariant()
    def channels_agree(self):
        if not hasattr(self, "machine"):
            return
        found = {}
        for domid in DOMAINS:
            for port, channel in xen(self.machine).domains[domid].channels.items():
                if port >= FIRST_PORT:
                    kind = {1: "unbound", 2: "connected", 5: "ipi"}[channel.state]
                    rest = {"unbound": (channel.remote_domid,), "ipi": ()}.get(
                        kind, (channel.remote_domid, channel.remote_port)
                    )
                    found[domid, port] = (kind, *rest)
        assert found == self.channels

    @invariant()
    def grants_agree(self):
        if not hasattr(self, "machine"):
            return
        for owner in DOMAINS:
            table = xen(self.machine).domains[owner].grants
            for ref in REFS:
                uses = self.uses(owner, ref)
                active = table.active.get(ref)
                counted = (0, 0) if active is None else (active.readers, active.writers)
                assert counted == (sum(use[2] for use in uses), sum(not use[2] for use in uses))
                flags = self.guests[owner].number(FRAMES + ref * 8, 2)
                assert bool(flags & 8) == bool(uses)
                assert bool(flags & 16) == any(not use[2] for use in uses)
            assert self.guests[owner].read(GRANTED, 16) == self.bytes[owner]


TestDomains = Domains.TestCase
TestDomains.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
TestDomains = pytest.mark.slow(TestDomains)
