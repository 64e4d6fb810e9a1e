"""A hypervisor that lies once in each reply: the guest ends with the right reason or goes on, and never leaks."""

from __future__ import annotations

from types import ModuleType

import pytest
from sevlab.core.access import GPA_NONE
from sevlab.core.events import Done, MemoryWrite, Party, Resumed, Schedule, Space
from sevlab.core.hookspecs import hookimpl
from sevlab.plugins.sev_es import DONE, ForgeReply, GuestFailed, GuestSetup, NaeCode, Reply, Terminated
from sevlab.plugins.snp.hypervisor import host_guest, make_private, read_guest, write_guest
from sevlab.plugins.snp.messages import MessageHeader, MessageType, ReportRequest, ReportResponse
from sevlab.plugins.snp.psc import build_psc, parse_psc
from sevlab.plugins.snp.records import CreateAp, MessageAnswered, MessageFailed, SendMessage, SetPages
from sevlab.plugins.snp.rmp import state_of
from sevlab.plugins.snp.states import PageState

from tests.plugins.snp.support import GHCB_GPA, PRIVATE_GPA, SECRETS_GPA, SHARED_GPA, snp_vmsa, talking_machine

REQUEST, RESPONSE = SHARED_GPA, SHARED_GPA + 0x1000
ASK = SendMessage(0, SECRETS_GPA, SHARED_GPA, 0, MessageType.REPORT_REQ, ReportRequest.build(report_data=b"d" * 64), 0)


def plugin_of(register):
    module = ModuleType("liar", "Stands before a handler of the hypervisor.")
    module.REQUIRES = ("snp",)
    module.sevlab_register = register
    return module


class Liar:
    """A plugin that stands before one event of the hypervisor; `lie(original, machine, vcpu, ghcb, scratch)`."""

    def __init__(self, code):
        self.code = int(code)
        self.lie = None
        self.seen = []

    def plugin(self):
        @hookimpl
        def sevlab_register(builder):
            builder.nae_events.replace(self.code, self.wrap)

        return plugin_of(sevlab_register)

    def wrap(self, original):
        def handler(machine, vcpu, ghcb, scratch):
            if self.code == NaeCode.SNP_GUEST_REQUEST:
                self.seen.append(read_guest(machine, vcpu, REQUEST, 4096))
            lie, self.lie = self.lie, None
            if lie is None:
                return original.handler(machine, vcpu, ghcb, scratch)
            return lie(original.handler, machine, vcpu, ghcb, scratch)

        return original._replace(handler=handler)


def lying_machine(code, **settings):
    liar = Liar(code)
    machine, _ = talking_machine(given={"liar": liar.plugin()}, **settings)
    return machine, liar


# Guest requests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def requests():
    return lying_machine(NaeCode.SNP_GUEST_REQUEST)


def flip(offset):
    def lie(honest, machine, vcpu, ghcb, scratch):
        reply = honest(machine, vcpu, ghcb, scratch)
        byte = read_guest(machine, vcpu, RESPONSE + offset, 1)[0]
        assert write_guest(machine, vcpu, RESPONSE + offset, bytes((byte ^ 1,)))
        return reply

    return lie


def drop(_honest, _machine, _vcpu, _ghcb, _scratch):
    return DONE


def twice(honest, machine, vcpu, ghcb, scratch):
    honest(machine, vcpu, ghcb, scratch)
    return honest(machine, vcpu, ghcb, scratch)


def answer(reply):
    return lambda _honest, _machine, _vcpu, _ghcb, _scratch: reply


LIES = {
    "the tag": flip(0x00),
    "the sequence number": flip(0x20),
    "the message type": flip(0x34),
    "the length": flip(0x36),
    "the VMPCK": flip(0x3C),
    "the payload": flip(0x60),
    "the last byte": flip(0x60 + ReportResponse.SIZE - 1),
    "nothing was done": drop,
    "the message was used twice": twice,
    "a firmware error": answer(Reply(info_2=0x16)),
    "a VMM error": answer(Reply(info_2=7 << 32)),
    "refused": answer(Reply(info_1=2, info_2=5)),
    "an exception": answer(Reply(info_1=1, info_2=0x8000_030D)),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_lie_about_a_message_costs_the_guest_its_key_and_nothing_else(requests, lie):
    machine, liar = requests
    machine.reset()
    liar.seen.clear()
    liar.lie = lie
    key = machine.access.guest_physical_read(machine.vcpus[0], SECRETS_GPA + 0x20, 32, c_bit=True)
    failed = machine.apply(ASK).first(MessageFailed)
    assert failed.key_gone
    assert machine.apply(ASK).first(MessageFailed).reason == "the VMPCK is gone"
    assert no_nonce_twice(liar.seen)
    assert not leaks(machine, key)


def no_nonce_twice(messages):
    """One number, one message."""
    by_number = {}
    for raw in messages:
        number = MessageHeader.from_bytes(raw[:96]).msg_seqno
        if by_number.setdefault(number, raw) != raw:
            return False
    return True


def leaks(machine, secret):
    """Whether the host finds the secret in any page that it may read."""
    return any(secret in machine.memory.dram(pfn << 12, 4096) for pfn in list(machine.memory.pages))


def test_an_old_response_is_not_taken_for_a_new_one(requests):
    machine, liar = requests
    machine.reset()
    assert machine.apply(ASK).first(MessageAnswered)
    old = read_guest(machine, machine.vcpus[0], RESPONSE, 4096)

    def replay(honest, machine, vcpu, ghcb, scratch):
        honest(machine, vcpu, ghcb, scratch)
        assert write_guest(machine, vcpu, RESPONSE, old)
        return DONE

    liar.lie = replay
    assert machine.apply(ASK).first(MessageFailed).key_gone


def test_busy_means_the_same_bytes_again(requests):
    machine, liar = requests
    machine.reset()
    liar.seen.clear()
    liar.lie = answer(Reply(info_2=2 << 32))
    assert machine.apply(ASK).first(MessageAnswered)
    assert len(liar.seen) == 2
    assert liar.seen[0] == liar.seen[1]


# Page states ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def states():
    return lying_machine(NaeCode.SNP_PAGE_STATE_CHANGE)


def claim_done(_honest, _machine, _vcpu, _ghcb, scratch):
    header, entries = parse_psc(scratch.rest)
    scratch.write(build_psc(tuple(entry._replace(cur_page=1) for entry in entries), cur_entry=header.end_entry + 1))
    return DONE


def test_done_without_doing_is_found_out_by_pvalidate(states):
    """The page is still the hypervisor's: PVALIDATE exits until it is the guest's, and only then the guest goes on."""
    machine, liar = states
    machine.reset()
    liar.lie = claim_done
    outcome = machine.apply(SetPages(0, 0x18_0000, 1, 0, True))
    assert Done() in outcome.records
    assert state_of(machine, machine.hypervisor.vms[0].memory_spa + 0x18_0000) is PageState.GUEST_VALID


def test_done_without_sharing_leaves_the_page_the_guest_s(states):
    """The guest rescinded it: its next use faults; the host cannot write to it."""
    machine, liar = states
    machine.reset()
    liar.lie = claim_done
    assert Done() in machine.apply(SetPages(0, PRIVATE_GPA, 1, 0, False)).records
    spa = machine.hypervisor.vms[0].memory_spa + PRIVATE_GPA
    assert state_of(machine, spa) is PageState.GUEST_INVALID
    step = MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, spa, False, b"x")
    assert machine.apply(step).records[0].vector == 14


def steal(honest, machine, vcpu, ghcb, scratch):
    """Do it, then give the same guest page another home."""
    reply = honest(machine, vcpu, ghcb, scratch)
    other = machine.hypervisor.allocate_pages(1)
    tables = machine.access.nested_tables(machine.hypervisor.vms[0])
    tables.map(parse_psc(scratch.rest)[1][0].gfn << 12, other, 4096)
    machine.access.forget()
    return reply


def test_another_page_in_its_place_is_not_the_guest_s(states):
    machine, liar = states
    machine.reset()
    liar.lie = steal
    machine.apply(SetPages(0, 0x18_0000, 1, 0, True))
    assert machine.slots.access_check(machine.vcpus[0], machine.hypervisor.next_free_spa - 4096, 0x18_0000, 8)


def test_two_pages_for_one_address_end_the_guest_when_it_validates_twice(states):
    """The guest knows what it validated: a second PVALIDATE of the address is refused or shows itself by CF."""
    machine, _ = states
    machine.reset()
    outcome = machine.apply(SetPages(0, PRIVATE_GPA, 1, 0, True))
    assert (outcome.first(Terminated).reason_set, outcome.first(Terminated).reason_code) == (1, 2)


# AP creation, registration --------------------------------------------------------------------------------------------


def test_an_ap_that_is_refused_or_never_comes_costs_only_the_ap():
    machine, liar = lying_machine(NaeCode.SNP_AP_CREATION, vcpus=2)
    step = CreateAp(0, 1, PRIVATE_GPA, 1, 0, snp_vmsa())
    liar.lie = answer(Reply(info_1=2, info_2=5))
    assert "AP creation" in machine.apply(step).first(GuestFailed).reason
    liar.lie = drop
    assert Done() in machine.apply(step._replace(vmsa=b"")).records
    assert machine.vcpus[1].halted


def test_an_ap_with_another_save_area_does_not_run():
    machine, liar = lying_machine(NaeCode.SNP_AP_CREATION, vcpus=2)

    def forge(honest, machine, vcpu, ghcb, scratch):
        reply = honest(machine, vcpu, ghcb, scratch)
        own = machine.hypervisor.allocate_pages(1)
        machine.access.hypervisor_write(own, snp_vmsa(rip=0x666))
        machine.vcpus[1].vmcb.vmsa_pa = own
        return reply

    liar.lie = forge
    assert Done() in machine.apply(CreateAp(0, 1, PRIVATE_GPA, 1, 0, snp_vmsa())).records
    assert machine.apply(Schedule()).first(Resumed) is None


@pytest.mark.parametrize("value", [(1 << 64) - 0x1000 | 0x13, GHCB_GPA + 0x1000 | 0x13, GHCB_GPA | 0x12], ids=hex)
def test_a_registration_that_is_not_echoed_ends_the_guest(value):
    answers = []
    plugin = msr_liar(0x12, lambda honest, *arguments: answers.pop() if answers else honest(*arguments))
    machine, _ = talking_machine(given={"liar": plugin})
    assert Done() in machine.apply(GuestSetup(0, GHCB_GPA)).records
    answers.append(value)
    ended = machine.apply(GuestSetup(0, GHCB_GPA)).first(Terminated)
    assert (ended.reason_set, ended.reason_code) == (1, 0)


def msr_liar(info, lie):
    @hookimpl
    def sevlab_register(builder):
        def wrap(original):
            return original._replace(handler=lambda *arguments: lie(original.handler, *arguments))

        builder.msr_protocol.replace(info, wrap)

    return plugin_of(sevlab_register)


# Memory ---------------------------------------------------------------------------------------------------------------


def test_every_forged_word_of_a_reply_leaves_the_guest_safe(states):
    """One flipped byte anywhere in what the guest reads of a reply."""
    machine, _ = states
    for offset in (*range(0x390, 0x3B0), *range(0x3F0, 0x400), *range(0x800, 0x818)):
        machine.reset()
        machine.apply(ForgeReply(0, offset, b"\xff"))
        outcome = machine.apply(SetPages(0, PRIVATE_GPA, 2, 0, False))
        assert outcome.first(Terminated) or Done() in outcome.records or outcome.first(GuestFailed), hex(offset)
        for gpa in (PRIVATE_GPA, PRIVATE_GPA + 0x1000):
            state = state_of(machine, machine.hypervisor.vms[0].memory_spa + gpa)
            assert state in (PageState.GUEST_INVALID, PageState.HYPERVISOR)


def test_the_host_reaches_no_private_page_by_any_path(states):
    machine, _ = states
    machine.reset()
    vm = machine.hypervisor.vms[0]
    machine.access.guest_physical_write(machine.vcpus[0], PRIVATE_GPA, b"secret of the guest", c_bit=True)
    spa = vm.memory_spa + PRIVATE_GPA
    for party in (Party.HYPERVISOR, Party.DMA):
        assert machine.apply(MemoryWrite(party, 0, Space.SPA, spa, False, b"x")).records[0].vector == 14
    assert not write_guest(machine, machine.vcpus[0], PRIVATE_GPA, b"x")
    assert not leaks(machine, b"secret of the guest")
    assert machine.slots.access_check(machine.vcpus[0], spa, GPA_NONE, 0) is None  # reading ciphertext is allowed
    assert host_guest(machine, 0).asid
    assert make_private(machine, 0, PRIVATE_GPA, large=False)  # it is already: nothing happens
    assert machine.access.guest_physical_read(machine.vcpus[0], PRIVATE_GPA, 6, c_bit=True) == b"secret"
