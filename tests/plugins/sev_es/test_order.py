"""The order checker: each rule, both sides, and that it never changes an answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.svm import ExitCode
from sevlab.plugins.sev_es import (
    CONVERSATION,
    Exchange,
    Ghcb,
    GhcbReply,
    HvFeature,
    MsrInfo,
    NaeCode,
    OrderState,
    OrderWarning,
    Vmgexit,
    check,
    check_vc,
)
from sevlab.plugins.sev_es.order import Message, Stage, message_of

from tests.plugins.sev_es.guests import GHCB_GPA, encrypted_machine, page

INFO = MsrInfo.SEV_INFO_REQUEST


def judge(*exchanges, **more):
    """The rules that the last exchange breaks."""
    state, found = OrderState(), ()
    for number, exchange in enumerate(exchanges):
        if isinstance(exchange, int):
            exchange = Exchange(0, exchange)
        elif isinstance(exchange, bytes):
            exchange = Exchange(0, GHCB_GPA, Ghcb.from_bytes(exchange))
        if number == len(exchanges) - 1 or "vcpu" not in more:
            exchange = exchange._replace(**more)
        found = check(state, exchange)
    return [broken.rule for broken in found]


CPUID = page(ExitCode.CPUID, rax=0, rcx=0)
REGISTER = GHCB_GPA | MsrInfo.REGISTER_GPA_REQUEST

CREATE, DESTROY = (page(NaeCode.SNP_AP_CREATION, 1 << 32 | request, 0x10_1000) for request in (1, 2))

RULES = [
    ("R1", (CPUID,), {}, ["R1", "R2"]),
    ("R1 broken by an unknown request", (INFO, 0xF03), {}, ["R1"]),
    ("R2", (MsrInfo.CPUID_REQUEST, CPUID), {}, ["R2"]),
    ("R2 kept", (INFO, CPUID), {}, []),
    ("R2 by features", (MsrInfo.HV_FEATURES_REQUEST,), {}, ["R2"]),
    ("R3", (INFO, CPUID), {"snp": True}, ["R3"]),
    ("R3 kept", (INFO, REGISTER, CPUID), {"snp": True}, []),
    ("R4", (INFO, CPUID), {"shared": False}, ["R4"]),
    ("R5", (INFO, REGISTER), {}, ["R5"]),
    ("R5 by the page", (INFO, page(NaeCode.SNP_GUEST_REQUEST, 0, 0)), {}, ["R5"]),
    ("R6", (INFO, page(NaeCode.HV_FEATURES, version=1)), {}, ["R6"]),
    ("R6 kept", (INFO, page(NaeCode.HV_FEATURES)), {}, []),
    ("R7 version 0", (INFO, page(ExitCode.WBINVD, version=0)), {}, ["R7"]),
    ("R7 version 3", (INFO, page(ExitCode.WBINVD, version=3)), {}, ["R7"]),
    ("R7 usage", (INFO, page(ExitCode.WBINVD, usage=1)), {}, ["R7"]),
    ("R8", (INFO, page(NaeCode.APIC_ID_LIST)), {"features": HvFeature.APIC_ID_LIST}, ["R8"]),
    ("R8 kept", (INFO, 0x080, page(NaeCode.APIC_ID_LIST)), {"features": HvFeature.APIC_ID_LIST}, []),
    ("R8 not offered", (INFO, 0x080, page(NaeCode.APIC_ID_LIST)), {}, ["R8"]),
    ("R9", (INFO, 0x0030_0000_0000_0014), {"snp": True}, ["R9"]),
    ("R9 kept", (INFO, 0x0020_0000_0000_0014), {"snp": True}, []),
    ("R11", (INFO, REGISTER), {"snp": True, "boot": False, "vcpu": 1, "apic_id": 1}, ["R11"]),
    ("R11 kept", (INFO, CREATE, REGISTER), {"snp": True, "boot": False, "vcpu": 1, "apic_id": 1}, []),
    (
        "R11 by another AP's creation",
        (INFO, CREATE, REGISTER),
        {"snp": True, "boot": False, "vcpu": 2, "apic_id": 2},
        ["R11"],
    ),
    (
        "R11 after its end",
        (INFO, CREATE, DESTROY, REGISTER),
        {"snp": True, "boot": False, "vcpu": 1, "apic_id": 1},
        ["R11"],
    ),
    ("R11 without registration", (INFO, CREATE, 0x080), {"snp": True, "boot": False, "vcpu": 1, "apic_id": 1}, ["R11"]),
    ("R11 not for SEV-ES", (INFO, MsrInfo.CPUID_REQUEST), {"boot": False, "vcpu": 1, "apic_id": 1}, []),
    ("R13", (INFO, 0x100, CPUID), {}, ["R13"]),
    ("R15", (INFO, page(NaeCode.MMIO_READ, 0, 4, sw_scratch=0x9000)), {}, ["R15"]),
    ("R15 kept", (INFO, page(NaeCode.MMIO_READ, 0, 4, sw_scratch=GHCB_GPA + 0x800)), {}, []),
    ("R15 version 1", (INFO, page(NaeCode.MMIO_READ, 0, 4, sw_scratch=0x9000, version=1)), {}, []),
]


@pytest.mark.parametrize(("exchanges", "more", "expected"), [row[1:] for row in RULES], ids=[row[0] for row in RULES])
def test_each_rule_warns_and_its_counterpart_does_not(exchanges, more, expected):
    assert judge(*exchanges, **more) == expected


def test_an_ap_needs_not_negotiate_again_but_the_boot_processor_does():
    state = OrderState()
    check(state, Exchange(0, INFO))
    assert not check(state, Exchange(1, GHCB_GPA, Ghcb.from_bytes(CPUID), boot=False))
    assert [broken.rule for broken in check(state, Exchange(2, GHCB_GPA, Ghcb.from_bytes(CPUID), boot=True))]


@pytest.mark.parametrize(
    ("code", "insn", "sent", "rules"),
    [(0x72, b"\x0f\xa2", 0x72, 0), (0x72, b"\x0f\xa2", 0x7C, 1), (0x72, b"\x0f\x31", 0x72, 1),
     (0x400, b"\x8b\x07", 0x8000_0001, 0),
     (0x400, b"\x8b\x07", 0x400, 1), (0x66, b"\x0f\x01\x0f", 0x8000_FFFF, 0)],
)  # fmt: skip
def test_r14_code_instruction_and_event_agree(code, insn, sent, rules):
    assert [broken.rule for broken in check_vc(code, insn, sent)] == ["R14"] * rules


@pytest.mark.parametrize("pair", list(CONVERSATION.pairs()), ids=lambda pair: f"{pair.state.name}-{pair.message.name}")
def test_every_pair_of_the_table_is_what_the_checker_does(pair):
    values = {
        Message.SEV_INFO: 2, Message.CPUID: 4, Message.FEATURES: 0x80, Message.REGISTER: 0x12, Message.PAGE_STATE: 0x14,
        Message.RUN_VMPL: 0x16, Message.RESET_HOLD: 6, Message.PREFERRED_GPA: 0x10, Message.OTHER_MSR: 3,
        Message.TERMINATE: 0x100,
    }  # fmt: skip
    exchange = Exchange(0, values[pair.message]) if pair.message in values else None
    exchange = exchange or Exchange(0, GHCB_GPA, Ghcb.from_bytes(CPUID))
    assert message_of(exchange) is pair.message
    state = OrderState()
    check(state, Exchange(0, 2))
    state.vcpus[0].stage, state.vcpus[0].exits = pair.state, 1
    rules = {broken.rule for broken in check(state, exchange)}
    assert bool(rules & {"R1", "R2", "R13"}) == (pair.target is None)
    if pair.target is not None:
        assert state.vcpus[0].stage is pair.target


def test_the_ended_conversation_is_reachable_and_nothing_follows_it():
    assert not CONVERSATION.unreachable()
    assert not CONVERSATION.table[Stage.ENDED]


@given(st.lists(st.integers(0, (1 << 64) - 1) | st.sampled_from((2, 4, 6, 0x80, 0x100, 3)), max_size=12))
def test_any_conversation_over_the_msr_is_judged(values):
    state = OrderState()
    for value in values:
        for broken in check(state, Exchange(0, value)):
            assert broken.rule in {f"R{number}" for number in range(1, 16)}


def test_the_machine_warns_and_answers_all_the_same():
    machine = encrypted_machine(order=True)
    silent = encrypted_machine()
    outcome = machine.apply(Vmgexit(0, GHCB_GPA, CPUID))
    assert {record.rule for record in outcome.records if isinstance(record, OrderWarning)} == {"R1", "R2"}
    assert outcome.first(GhcbReply) == silent.apply(Vmgexit(0, GHCB_GPA, CPUID)).first(GhcbReply)
    assert machine.apply(Vmgexit(0, 1 << 50, b"")).records
