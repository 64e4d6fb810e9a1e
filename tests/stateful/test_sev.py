"""Random command sequences with several guests against a naive model of who owns what."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from sevlab.core.config import GuestConfig
from sevlab.core.events import CacheOp
from sevlab.core.testing import make_machine
from sevlab.plugins import sev
from sevlab.plugins.sev import Command, GuestState, Policy, Status, driver
from sevlab.plugins.sme import sme_state

ASIDS = st.sampled_from((0, 1, 2, 99, 100, 101, 102, 509, 510))
POLICIES = st.sampled_from((Policy(0), Policy.ES, Policy.NOKS))
PAGE = 4096


class Naive:
    """A guest as somebody would write it on paper."""

    def __init__(self, policy, key):
        self.policy, self.key = policy, key
        self.asid, self.state, self.ran = 0, "launch", False


class Ownership(RuleBasedStateMachine):
    """Every command is predicted by dictionaries of guests and of ASIDs; then the firmware's state is compared."""

    handles = Bundle("handles")

    @initialize()
    def begin(self):
        self.machine = make_machine("sev", guests=(GuestConfig(memory_bytes=1 << 16),))
        self.guests: dict[int, Naive] = {}
        self.power_on()

    def power_on(self):
        sev.initialise(self.machine, es=True)
        self.dirty = dict.fromkeys(range(1, 510), True)
        self.flushable = False
        self.keys = 0

    def status(self, command, **fields):
        return Status(sev.run(self.machine, command, **fields).status)

    @rule(target=handles, policy=POLICIES)
    def start(self, policy):
        handle = sev.need(self.machine, Command.LAUNCH_START, policy=policy).handle
        assert handle not in self.guests
        self.keys += 1
        self.guests[handle] = Naive(policy, self.keys)
        return handle

    @rule(target=handles, policy=POLICIES, other=handles)
    def share(self, policy, other):
        reply = sev.run(self.machine, Command.LAUNCH_START, policy=policy, handle=other)
        friend = self.guests.get(other)
        if friend is None:
            assert reply.status == Status.INVALID_GUEST
        elif policy != friend.policy or policy & Policy.NOKS:
            assert reply.status == Status.POLICY_FAILURE
        else:
            assert reply.status == Status.SUCCESS
            self.guests[reply.buffer.handle] = Naive(policy, friend.key)
            return reply.buffer.handle
        return multiple()

    @rule(handle=handles, asid=ASIDS)
    def activate(self, handle, asid):
        status = self.status(Command.ACTIVATE, handle=handle, asid=asid)
        guest = self.guests.get(handle)
        if not self.guests:
            expected = Status.INVALID_PLATFORM_STATE
        elif guest is None:
            expected = Status.INVALID_GUEST
        elif not 1 <= asid <= 509:
            expected = Status.INVALID_ASID
        elif any(other.asid == asid for other in self.guests.values()):
            expected = Status.ASID_OWNED
        elif guest.asid:
            expected = Status.ACTIVE
        elif self.dirty[asid]:
            expected = Status.DF_FLUSH_REQUIRED
        elif (asid < 100) != bool(guest.policy & Policy.ES):
            expected = Status.INVALID_ASID
        else:
            expected = Status.SUCCESS
            guest.asid = asid
            guest.ran = guest.state == "running"
        assert status == expected

    @rule(handle=handles)
    def deactivate(self, handle):
        status = self.status(Command.DEACTIVATE, handle=handle)
        guest = self.guests.get(handle)
        if not self.guests:
            assert status == Status.INVALID_PLATFORM_STATE
        elif guest is None:
            assert status == Status.INVALID_GUEST
        elif not guest.asid:
            assert status == Status.INACTIVE
        else:
            assert status == Status.SUCCESS
            if guest.ran:
                self.dirty[guest.asid] = True
                self.flushable = False
            guest.asid, guest.ran = 0, False

    @rule(handle=handles)
    def decommission(self, handle):
        status = self.status(Command.DECOMMISSION, handle=handle)
        guest = self.guests.get(handle)
        if not self.guests:
            assert status == Status.INVALID_PLATFORM_STATE
        elif guest is None:
            assert status == Status.INVALID_GUEST
        elif guest.asid:
            assert status == Status.ACTIVE
        else:
            assert status == Status.SUCCESS
            del self.guests[handle]

    @rule(handle=handles)
    def finish(self, handle):
        guest = self.guests.get(handle)
        page = driver.scratch_page(self.machine) + PAGE
        measured = self.status(Command.LAUNCH_MEASURE, handle=handle, spa=page, length=0x30)
        finished = self.status(Command.LAUNCH_FINISH, handle=handle)
        if not self.guests:
            assert measured == finished == Status.INVALID_PLATFORM_STATE
        elif guest is None:
            assert measured == finished == Status.INVALID_GUEST
        elif guest.state == "running":
            assert measured == finished == Status.INVALID_GUEST_STATE
        else:
            assert measured == finished == Status.SUCCESS
            guest.state = "running"
            guest.ran = bool(guest.asid)

    @rule()
    def wbinvd(self):
        self.machine.apply(CacheOp("wbinvd", 0))
        self.flushable = True

    @rule()
    def df_flush(self):
        status = self.status(Command.DF_FLUSH)
        assert status == (Status.SUCCESS if self.flushable else Status.WBINVD_REQUIRED)
        if self.flushable:
            self.dirty = dict.fromkeys(self.dirty, False)

    @rule()
    def power_cycle(self):
        assert self.status(Command.SHUTDOWN) == Status.SUCCESS
        state = sev.sev_state(self.machine)
        assert not state.guests
        assert not state.tmr.checksums
        assert not any(ccx.allocated | ccx.in_use for ccx in state.ccxs.values())
        self.guests.clear()
        self.power_on()

    @invariant()
    def the_firmware_agrees(self):
        if not hasattr(self, "guests"):
            return
        real = sev.sev_state(self.machine).guests
        assert {handle: (guest.asid, guest.policy) for handle, guest in real.items()} == {
            handle: (guest.asid, guest.policy) for handle, guest in self.guests.items()
        }
        for handle, guest in self.guests.items():
            assert (real[handle].state is GuestState.RUNNING) == (guest.state == "running")
        count = sev.need(self.machine, Command.PLATFORM_STATUS).guest_count
        assert count == len(self.guests)

    @invariant()
    def no_key_serves_two_guests_that_do_not_share_it(self):
        if not hasattr(self, "guests"):
            return
        real = sev.sev_state(self.machine).guests
        seeds: dict[bytes, set[int]] = {}
        for handle, guest in self.guests.items():
            seeds.setdefault(real[handle].vek_seed, set()).add(guest.key)
            if guest.asid:
                assert sme_state(self.machine).keys[guest.asid] == real[handle].key_id
        assert all(len(owners) == 1 for owners in seeds.values())
        active = [guest.asid for guest in self.guests.values() if guest.asid]
        assert len(active) == len(set(active))


TestOwnership = pytest.mark.slow(Ownership.TestCase)
