"""Two guests, the host, a device and the ASP act at random on a few pages, against a naive model of who owns what.

No page is ever readable or writable in the clear by two owners; no guest reads other than its own last write without a
#VC or a fault, as long as it validates no address twice.
"""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sevlab.core.cpu import FaultUnwind
from sevlab.core.events import AspCommand, AspStatus, MemoryRead, MemoryWrite, NptEdit, Party, Space
from sevlab.plugins.sev import Command
from sevlab.plugins.snp.automata import SnpPlatformState
from sevlab.plugins.snp.rmp_guest import pvalidate, rmp_adjust
from sevlab.plugins.snp.states import snp_state

from tests.plugins.snp.support import rmp_machine, update

GUESTS, PAGES, GPAS = 2, 4, 3
HOST, FIRMWARE, RECLAIM = "host", "firmware", "reclaim"


@cache
def booted():
    """Made once: each example resets it."""
    machine = rmp_machine(GUESTS, memory_bytes=32 << 20)
    snp_state(machine).platform.state = SnpPlatformState.INIT
    machine.mark()
    return machine


guests = st.integers(0, GUESTS - 1)
pages = st.integers(0, PAGES - 1)
gpas = st.integers(0, GPAS - 1).map(lambda number: 0x1000 * (number + 1))
values = st.binary(min_size=16, max_size=16).filter(any)


class Ownership(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.machine = booted()
        self.machine.reset()
        self.base = self.machine.hypervisor.vms[0].memory_spa + 0x10_0000
        self.owner = dict.fromkeys(range(PAGES), HOST)
        self.frozen = dict.fromkeys(range(PAGES), False)
        self.valid = dict.fromkeys(range(PAGES), False)
        self.npt = {}
        self.believed = {guest: {} for guest in range(GUESTS)}
        self.host_data = {}

    def spa(self, page):
        return self.base + page * 4096

    def vcpu(self, guest):
        return self.machine.vcpus[self.machine.hypervisor.vms[guest].vcpu_ids[0]]

    # The host -----------------------------------------------------------------------------------------------------

    @rule(page=pages, guest=guests, gpa=gpas, immutable=st.booleans())
    def assign(self, page, guest, gpa, immutable):
        code = update(self.machine, self.spa(page), gpa=gpa, asid=guest + 1, immutable=int(immutable))
        if self.frozen[page]:
            assert code == 2
            return
        assert code == 0
        if self.owner[page] != (guest, gpa):
            self.valid[page] = False
        self.owner[page], self.frozen[page] = (guest, gpa), immutable
        self.host_data.pop(page, None)

    @rule(page=pages, state=st.sampled_from((HOST, FIRMWARE, RECLAIM)))
    def take(self, page, state):
        wish = {HOST: {"assigned": 0}, FIRMWARE: {"immutable": 1}, RECLAIM: {}}[state]
        code = update(self.machine, self.spa(page), **wish)
        if self.frozen[page]:
            assert code == 2
            return
        assert code == 0
        self.owner[page], self.valid[page] = state, False
        self.frozen[page] = state == FIRMWARE
        self.host_data.pop(page, None)

    @rule(guest=guests, gpa=gpas, page=pages)
    def remap(self, guest, gpa, page):
        self.machine.apply(NptEdit(guest, gpa, self.spa(page), 4096, 3))
        self.npt[guest, gpa] = page

    @rule(page=pages, value=values, party=st.sampled_from((Party.HYPERVISOR, Party.DMA)))
    def host_write(self, page, value, party):
        outcome = self.machine.apply(MemoryWrite(party, 0, Space.SPA, self.spa(page), False, value))
        if self.owner[page] == HOST:
            assert outcome.records == ((),)
            self.host_data[page] = value
        else:
            assert outcome.records[0].vector == 14

    @rule(page=pages)
    def host_read(self, page):
        step = MemoryRead(Party.HYPERVISOR, 0, Space.SPA, self.spa(page), False, 16)
        data = self.machine.apply(step).records[0].data
        if page in self.host_data:
            assert data == self.host_data[page]
        secrets = [value for known in self.believed.values() for value in known.values() if value]
        assert data == self.host_data.get(page, data)
        if self.owner[page] != HOST:
            assert data not in secrets

    # The ASP ------------------------------------------------------------------------------------------------------

    @rule(page=pages)
    def reclaim(self, page):
        command = AspCommand("sev", Command.SNP_PAGE_RECLAIM, 0x2000, self.spa(page).to_bytes(8, "little"))
        status = self.machine.apply(command).first(AspStatus).status
        assert status == 0
        if self.frozen[page] and self.owner[page] == FIRMWARE:
            self.owner[page] = RECLAIM
        self.frozen[page] = False

    @staticmethod
    def refused(fault, expected, vector):
        assert expected
        assert fault.vector == vector

    # The guests ---------------------------------------------------------------------------------------------------

    def mine(self, guest, gpa):
        """The page behind the address when it is this guest's, at this address and mutable; else None."""
        page = self.npt.get((guest, gpa))
        return page if page is not None and self.owner[page] == (guest, gpa) and not self.frozen[page] else None

    @rule(guest=guests, gpa=gpas)
    def validate(self, guest, gpa):
        if gpa in self.believed[guest] or (guest, gpa) not in self.npt:
            return
        page = self.mine(guest, gpa)
        try:
            result = pvalidate(self.machine, self.vcpu(guest), gpa, page_size=0, validate=True)
        except FaultUnwind as unwind:
            self.refused(unwind.fault, page is None, 0x400)
            return
        assert page is not None
        assert result == (0, self.valid[page])
        self.valid[page] = True
        if not result.carry:
            self.believed[guest][gpa] = b""

    @rule(guest=guests, gpa=gpas)
    def rescind(self, guest, gpa):
        if gpa not in self.believed[guest]:
            return
        page = self.mine(guest, gpa)
        try:
            result = pvalidate(self.machine, self.vcpu(guest), gpa, page_size=0, validate=False)
        except FaultUnwind:
            assert page is None
            return
        assert page is not None
        assert result == (0, not self.valid[page])
        self.valid[page] = False
        if not result.carry:
            del self.believed[guest][gpa]

    @rule(guest=guests, gpa=gpas, value=values)
    def private_write(self, guest, gpa, value):
        if (guest, gpa) not in self.npt:
            return
        page = self.mine(guest, gpa)
        try:
            self.machine.access.guest_physical_write(self.vcpu(guest), gpa, value, c_bit=True)
        except FaultUnwind as unwind:
            vector = 29 if page is not None else 0x400
            self.refused(unwind.fault, page is None or not self.valid[page], vector)
            return
        assert page is not None
        assert self.valid[page]
        if gpa in self.believed[guest]:
            self.believed[guest][gpa] = value

    @rule(guest=guests, gpa=gpas)
    def private_read(self, guest, gpa):
        if (guest, gpa) not in self.npt:
            return
        page = self.mine(guest, gpa)
        try:
            data = self.machine.access.guest_physical_read(self.vcpu(guest), gpa, 16, c_bit=True)
        except FaultUnwind as unwind:
            vector = 29 if page is not None else 0x400
            self.refused(unwind.fault, page is None or not self.valid[page], vector)
            return
        assert page is not None
        assert self.valid[page]
        written = self.believed[guest].get(gpa, b"")
        assert not written or data == written

    @rule(guest=guests, gpa=gpas, value=values)
    def shared_write(self, guest, gpa, value):
        page = self.npt.get((guest, gpa))
        if page is None:
            return
        try:
            self.machine.access.guest_physical_write(self.vcpu(guest), gpa, value, c_bit=False)
        except FaultUnwind as unwind:
            self.refused(unwind.fault, self.owner[page] != HOST, 0x400)
            return
        assert self.owner[page] == HOST
        self.host_data[page] = value

    @rule(guest=guests, gpa=gpas, rights=st.integers(0, 15))
    def grant(self, guest, gpa, rights):
        """Rights of VMPL1 change nothing for VMPL0."""
        page = self.mine(guest, gpa)
        if page is not None and self.valid[page]:
            assert rmp_adjust(self.machine, self.vcpu(guest), gpa, page_size=0, rdx=1 | rights << 8) == 0

    @invariant()
    def nobody_shares_a_private_page(self):
        if not hasattr(self, "owner"):
            return
        for page in range(PAGES):
            users = [
                guest
                for guest in range(GUESTS)
                for gpa in range(0x1000, 0x1000 * (GPAS + 1), 0x1000)
                if self.npt.get((guest, gpa)) == page and self.passes(guest, gpa)
            ]
            if self.owner[page] == HOST:
                assert not users
            assert len(set(users)) <= 1

    def passes(self, guest, gpa):
        place = self.spa(self.npt[guest, gpa])
        return self.machine.slots.access_check(self.vcpu(guest), place, gpa, 8) is None


TestOwnership = Ownership.TestCase
TestOwnership.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


class OwnershipAtLength(Ownership):
    """The same, much longer."""


TestOwnershipAtLength = pytest.mark.long(OwnershipAtLength.TestCase)
TestOwnershipAtLength.settings = settings(max_examples=1500, stateful_step_count=80, deadline=None)
