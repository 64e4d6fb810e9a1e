"""One whole conversation against a hypervisor that lies in each of its replies once.

The guest ends with the reason that Linux has for it, gives up what it asked for, or goes on with the rest as if nothing
had been said; and no byte that is its own is ever in memory in the open (owner tags, and canaries in its registers).
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
from sevlab.core.cpu import GPR_NAMES
from sevlab.core.events import CpuExit, Done, SetRegisters
from sevlab.core.hookspecs import hookimpl
from sevlab.core.memory import TAG_HYPERVISOR, guest_tag
from sevlab.core.svm import ExitCode
from sevlab.plugins.oracles import OwnerTaint
from sevlab.plugins.sev_es import GhcbReply, GuestFailed, GuestSetup, MsrReply, Terminated
from sevlab.plugins.snp.cpuid_table import build_table
from sevlab.plugins.snp.driver import LaunchPage
from sevlab.plugins.snp.hypervisor import snp_hypervisor
from sevlab.plugins.snp.launch_digest import PageType
from sevlab.plugins.snp.messages import KeyRequest, MessageType, ReportRequest
from sevlab.plugins.snp.records import (
    CreateAp,
    HvTaken,
    MessageAnswered,
    MessageFailed,
    SendHvIpi,
    SendMessage,
    SetDoorbell,
    SetPages,
    TakeHv,
    UseCpuidPage,
)
from sevlab.plugins.snp.rmp import state_of
from sevlab.plugins.snp.states import PageState, snp_state

from tests.plugins.snp.support import (
    GHCB_GPA,
    PRIVATE_GPA,
    SECRETS_GPA,
    SHARED_GPA,
    launched_machine,
    snp_vmsa,
)
from tests.plugins.snp.test_hostile import leaks, plugin_of

CPUID_GPA = 0x4000
DOORBELL = SHARED_GPA + 0x5000
RESTRICTED = 1 | 1 << 3
REPORT = ReportRequest.build(report_data=b"nonce".ljust(64))
KEY = KeyRequest.build(guest_field_select=1)
CPUID = CpuExit(0, ExitCode.CPUID, 0, 0, b"\x0f\xa2", 0)
SECRET = b"what only the guest may know ..."
CANARIES = {name: 0x5EC2_E700_0000_0000 | number << 8 | 0x5A for number, name in enumerate(GPR_NAMES)}


class Turn(NamedTuple):
    """One thing that the guest does: how it ends when it notices a lie, and what it says when all is well."""

    step: object
    done: type
    reason: tuple[int, int] | None = None
    gives_up: str = ""


CONVERSATION = {
    "GHCB page by MSR": Turn(SetPages(0, GHCB_GPA, 1, 0, False), Done, (1, 1)),
    "set-up": Turn(GuestSetup(0, GHCB_GPA), Done),
    "CPUID page": Turn(UseCpuidPage(0, CPUID_GPA), Done),
    "CPUID 1": Turn(CPUID, Done, (1, 5)),
    "shared pages": Turn(SetPages(0, SHARED_GPA, 6, 0, False), Done, (1, 1)),
    "private pages": Turn(SetPages(0, PRIVATE_GPA, 4, 0, True), Done, (1, 1)),
    "report": Turn(SendMessage(0, SECRETS_GPA, SHARED_GPA, 0, MessageType.REPORT_REQ, REPORT, 0), MessageAnswered),
    "key": Turn(SendMessage(0, SECRETS_GPA, SHARED_GPA, 1, MessageType.KEY_REQ, KEY, 0), MessageAnswered),
    "certificates": Turn(
        SendMessage(0, SECRETS_GPA, SHARED_GPA, 2, MessageType.REPORT_REQ, REPORT, 2), MessageAnswered
    ),
    "AP": Turn(CreateAp(0, 1, PRIVATE_GPA, 1, 0, snp_vmsa(sev_features=RESTRICTED)), Done, gives_up="AP creation"),
    "doorbell": Turn(SetDoorbell(0, DOORBELL), Done, (0, 0)),
    "IPI": Turn(SendHvIpi(0, 1 << 18 | 0x40), Done, gives_up="#HV IPI"),
    "#HV": Turn(TakeHv(0, 0), HvTaken),
}


class Liar:
    """Stands behind the hypervisor's exit handler: after (or instead of) the `at`-th answer comes the lie."""

    def __init__(self):
        self.at, self.lie, self.drops, self.count = -1, None, False, 0

    def plugin(self):
        @hookimpl
        def sevlab_register(builder):
            builder.exits.replace(ExitCode.VMGEXIT, self.wrap)

        return plugin_of(sevlab_register)

    def wrap(self, original):
        def vmgexit(machine, vcpu, exit_):
            mine, self.count = self.count == self.at, self.count + 1
            if not (mine and self.drops):
                original(machine, vcpu, exit_)
            if mine and self.lie is not None and not vcpu.stopped:
                self.lie(machine, vcpu)

        return vmgexit


def put(machine, vcpu, offset, data):
    """The hypervisor writes to the GHCB in use."""
    spa = machine.hypervisor.vms[0].memory_spa + vcpu.vmcb.ghcb_gpa + offset
    machine.memory.write(spa, data, None, TAG_HYPERVISOR)


def says(info_1, info_2=0):
    return lambda machine, vcpu: put(machine, vcpu, 0x398, info_1.to_bytes(8, "little") + info_2.to_bytes(8, "little"))


def msr(value):
    def lie(_machine, vcpu):
        vcpu.vmcb.ghcb_gpa = value

    return lie


ONES = (1 << 64) - 1
PAGE_LIES = {
    "refused": says(2, 5),
    "#GP": says(1, 0x8000_030D),
    "an exception that is none": says(1, 0x8000_031D),
    "an undefined result": says(3),
    "all ones as result": says(ONES, ONES),
    "a result that means nothing": says(0, ONES),
    "a number too many in info 1": says(1 << 32),
    "nothing valid": lambda machine, vcpu: put(machine, vcpu, 0x3F0, bytes(16)),
    "everything valid": lambda machine, vcpu: put(machine, vcpu, 0x3F0, b"\xff" * 16),
    "registers of ones": lambda machine, vcpu: [put(machine, vcpu, at, b"\xff" * 8) for at in (0x1F8, 0x308, 0x318)],
    "a buffer of ones": lambda machine, vcpu: put(machine, vcpu, 0x800, b"\xff" * 2032),
    "a buffer of zeros": lambda machine, vcpu: put(machine, vcpu, 0x800, bytes(2032)),
    "another code": lambda machine, vcpu: put(machine, vcpu, 0x390, b"\x7c" + bytes(7)),
    "a message of ones": lambda machine, _vcpu: machine.memory.write(
        machine.hypervisor.vms[0].memory_spa + SHARED_GPA, b"\xff" * 8192, None, TAG_HYPERVISOR
    ),
}
MSR_LIES = {
    "zero": msr(0),
    "all ones": msr(ONES),
    "an answer to something else": msr(0x7F00_0013),
    "an error": lambda _machine, vcpu: msr(vcpu.vmcb.ghcb_gpa | 1 << 63)(_machine, vcpu),
}
NOTICED = frozenset(("refused", "#GP", "an exception that is none", "an undefined result", "all ones as result"))
"""Lies that no event admits: the guest must say so."""
SETUP_REASONS = {0x002: (0, 1), 0x080: (0, 2), 0x012: (1, 0)}


def booted():
    liar = Liar()
    page = build_table(((0, 0, (1, 2, 3, 4)), (1, 0, (0x80_0F12, 0x123, 5, 6))), 4096)
    machine, _ = launched_machine(
        vcpus=2,
        vmsa=snp_vmsa(sev_features=RESTRICTED),
        pages=(LaunchPage(CPUID_GPA, PageType.UNMEASURED, page),),
        options={"sev_es": {"features": 0b111111, "guest": "linux"}},
        given={"liar": liar.plugin()},
    )
    snp_hypervisor(machine).certificates = b"c" * 5000
    machine.access.guest_physical_write(machine.vcpus[0], CPUID_GPA + 0x800, SECRET, c_bit=True)
    machine.apply(SetRegisters(0, (*CANARIES.items(), ("rax", 1), ("rcx", 0), ("rsp", 0x2000), ("rip", 0x1000))))
    machine.mark()
    return machine, liar


def replies(outcome):
    """What the hypervisor answered to vCPU 0, in order."""
    return [record for record in outcome.records if isinstance(record, (GhcbReply, MsrReply)) and record.vcpu == 0]


def went_well(turn, outcome):
    return any(type(record) is turn.done for record in outcome.records) or (
        turn.step is CPUID and not outcome.first(GuestFailed) and not outcome.first(Terminated)
    )


def shows_nothing(machine):
    """No page in the open holds the guest's own: by tags, by its text, by its keys, by its registers."""
    findings = OwnerTaint().sequence_end(machine)
    assert not findings, findings
    keys = [machine.access.guest_physical_read(machine.vcpus[0], SECRETS_GPA + at, 32, c_bit=True) for at in (32, 64)]
    for secret in (SECRET, *filter(any, keys), *(value.to_bytes(8, "little") for value in CANARIES.values())):
        assert not leaks(machine, secret)


def say(machine, turn):
    """One turn. The host clears what became shared, so that tags there are those of later writers."""
    outcome = machine.apply(turn.step)
    if isinstance(turn.step, SetPages) and not turn.step.private:
        for number in range(turn.step.page_count):
            spa = machine.hypervisor.vms[0].memory_spa + turn.step.gpa + number * 4096
            if state_of(machine, spa) is PageState.HYPERVISOR:
                machine.memory.write(spa, bytes(4096), None, TAG_HYPERVISOR)
    return outcome


def until(machine, name):
    """The honest conversation up to the turn of this name."""
    for other, turn in CONVERSATION.items():
        if other == name:
            return
        outcome = say(machine, turn)
        assert went_well(turn, outcome), (other, outcome)


def rest(name):
    names = list(CONVERSATION)
    return [CONVERSATION[other] for other in names[names.index(name) + 1 :]]


def judge(name, lie, answer, outcome):
    """Whether the guest's reaction to this lie is one of the right ones."""
    turn, ended, failed = CONVERSATION[name], outcome.first(Terminated), outcome.first(GuestFailed)
    if isinstance(answer, MsrReply):
        reason = turn.reason or SETUP_REASONS[answer.request & 0xFFF]
        if ended is not None:
            assert (ended.reason_set, ended.reason_code) == reason
        else:
            assert went_well(turn, outcome)
            assert (lie, answer.request & 0xFFF) in {("an error", 0x002), ("an error", 0x080)}
        return
    if ended is not None:
        assert (ended.reason_set, ended.reason_code) == turn.reason
    elif isinstance(turn.step, SendMessage):
        gone = outcome.first(MessageFailed)
        assert went_well(turn, outcome) or (gone is not None and gone.key_gone)
        assert lie not in NOTICED or gone is not None
    elif failed is not None:
        assert turn.gives_up
        assert failed.reason.startswith(turn.gives_up)
    else:
        assert went_well(turn, outcome)
        assert lie not in NOTICED


@pytest.fixture(scope="module")
def guest():
    return booted()


def test_the_honest_conversation_goes_to_its_end(guest):
    machine, liar = guest
    machine.reset()
    liar.at = -1
    answers = 0
    for name, turn in CONVERSATION.items():
        outcome = say(machine, turn)
        assert went_well(turn, outcome), (name, outcome)
        answers += len(replies(outcome))
    assert answers > 12
    assert snp_state(machine).vcpus[0].sev_features == RESTRICTED
    shows_nothing(machine)


@pytest.mark.parametrize("name", [name for name in CONVERSATION if name not in ("CPUID page", "#HV")])
def test_a_lie_in_each_reply_ends_the_guest_rightly_or_changes_nothing(name):
    machine, liar = booted()
    until(machine, name)
    machine.mark()
    turn = CONVERSATION[name]
    liar.count = 0
    honest = replies(machine.apply(turn.step))
    assert honest
    told = 0
    for at, answer in enumerate(honest):
        lies = MSR_LIES if isinstance(answer, MsrReply) else PAGE_LIES
        for lie, forge in (*lies.items(), ("no answer", None)):
            machine.reset()
            liar.at, liar.lie, liar.drops, liar.count = at, forge, forge is None, 0
            outcome = say(machine, turn)
            liar.at = -1
            judge(name, lie, answer, outcome)
            shows_nothing(machine)
            if machine.vcpus[0].stopped:
                told += 1
            else:
                for later in rest(name):
                    say(machine, later)
                shows_nothing(machine)
    assert told or turn.reason is None


def test_a_leak_would_be_found(guest):
    """The checks above are no decoration: each of the three finds what it looks for."""
    machine, liar = guest
    machine.reset()
    liar.at = -1
    shows_nothing(machine)
    spa = machine.hypervisor.vms[0].memory_spa + GHCB_GPA
    say(machine, CONVERSATION["GHCB page by MSR"])
    shows_nothing(machine)
    machine.memory.write(spa, b"x", None, guest_tag(0))
    with pytest.raises(AssertionError):
        shows_nothing(machine)
    machine.memory.write(spa, b"x", None, TAG_HYPERVISOR)
    shows_nothing(machine)
    machine.memory.write(spa, CANARIES["r9"].to_bytes(8, "little"), None, TAG_HYPERVISOR)
    with pytest.raises(AssertionError):
        shows_nothing(machine)
