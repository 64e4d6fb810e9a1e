"""R10 to R12 of the order checker in an SNP machine: each warns, keeping it is silent, and no answer changes."""

from __future__ import annotations

import pytest
from sevlab.core.events import Done, MemoryWrite, Party, Schedule, Space
from sevlab.plugins.sev_es import Ghcb, GhcbReply, GuestSetup, MsrReply, NaeCode, OrderWarning, Vmgexit
from sevlab.plugins.snp.messages import ReportRequest, seal
from sevlab.plugins.snp.psc import PscEntryValue, PscOperation, build_psc
from sevlab.plugins.snp.records import CreateAp, MessageAnswered, Pvalidate, RmpResult, SendMessage, SetPages

from tests.plugins.snp.support import (
    GHCB_GPA,
    PRIVATE_GPA,
    SECRETS_GPA,
    SHARED_GPA,
    context,
    snp_vmsa,
    talking_machine,
)

FRESH, FREE = 0x18_0000, 0x19_0000


@pytest.fixture(scope="module")
def booted():
    return talking_machine(vcpus=3, options={"sev_es": {"features": 0b11, "order": True}})


@pytest.fixture
def machine(booted):
    booted[0].reset()
    return booted[0]


def rules(outcome):
    return [record.rule for record in outcome.records if isinstance(record, OrderWarning)]


def vmgexit(machine, code, info_1=0, info_2=0, data=b"", **fields):
    if data:
        fields["sw_scratch"] = GHCB_GPA + 0x800
    page = Ghcb.build(sw_exit_code=code, sw_exit_info_1=info_1, sw_exit_info_2=info_2, protocol_version=2, **fields)
    page = page[:0x800] + data.ljust(0x7F0, b"\0") + page[0xFF0:]
    return machine.apply(Vmgexit(0, GHCB_GPA, page))


def psc(machine, gpa, operation, *, large=False):
    data = build_psc((PscEntryValue(gpa >> 12, operation, large),))
    outcome = vmgexit(machine, NaeCode.SNP_PAGE_STATE_CHANGE, data=data)
    assert outcome.first(GhcbReply).info_1 == 0
    return rules(outcome)


def test_the_reference_guest_keeps_every_rule(machine):
    for step in (
        SetPages(0, PRIVATE_GPA, 2, 0, False),
        SetPages(0, PRIVATE_GPA, 2, 0, True),
        CreateAp(0, 1, PRIVATE_GPA, 1, 0, snp_vmsa()),
        Schedule(),
        SetPages(0, PRIVATE_GPA + 0x1000, 1, 0, False),
        GuestSetup(1, PRIVATE_GPA + 0x1000),
    ):
        outcome = machine.apply(step)
        assert rules(outcome) == [], step
        assert step == Schedule() or Done() in outcome.records
    for _ in range(3):
        outcome = machine.apply(SendMessage(0, SECRETS_GPA, SHARED_GPA, 0, 5, ReportRequest.build(), 0))
        assert outcome.first(MessageAnswered)
        assert rules(outcome) == []


def test_r10_sharing_a_page_that_is_validated(machine):
    assert psc(machine, PRIVATE_GPA, PscOperation.SHARED) == ["R10"]
    machine.apply(Pvalidate(0, PRIVATE_GPA + 0x1000, 0, 0))
    assert psc(machine, PRIVATE_GPA + 0x1000, PscOperation.SHARED) == []


def test_r10_asking_for_a_page_that_is_validated(machine):
    assert psc(machine, PRIVATE_GPA, PscOperation.PRIVATE) == ["R10"]
    assert psc(machine, FREE, PscOperation.PRIVATE) == []
    assert psc(machine, PRIVATE_GPA + 0x1000, PscOperation.PSMASH) == []


def test_r10_by_the_msr(machine):
    for gpa, expected in ((PRIVATE_GPA, ["R10"]), (SHARED_GPA, [])):
        outcome = machine.apply(Vmgexit(0, PscOperation.SHARED << 52 | gpa | 0x014, b""))
        assert outcome.first(MsrReply).value == 0x015
        assert rules(outcome) == expected


def test_r10_validating_a_page_before_it_was_asked_for(machine):
    outcome = machine.apply(Pvalidate(0, FREE, 0, 1))
    assert rules(outcome) == ["R10"]
    psc(machine, FREE, PscOperation.PRIVATE)
    outcome = machine.apply(Pvalidate(0, FREE, 0, 1))
    assert rules(outcome) == []
    assert outcome.first(RmpResult) == RmpResult(0, False)


def test_r11_an_ap_that_nobody_created_and_one_that_does_not_register(machine):
    machine.vcpus[2].halted = False
    machine.vcpus[2].vmcb.vmsa_pa = machine.vcpus[0].vmcb.vmsa_pa
    assert rules(machine.apply(Vmgexit(2, 0x080, b""))) == ["R11", "R11"]
    assert Done() in machine.apply(CreateAp(0, 1, PRIVATE_GPA, 1, 0, snp_vmsa())).records
    assert rules(machine.apply(Vmgexit(1, PRIVATE_GPA + 0x1000 | 0x012, b""))) == []


def send(machine, raw):
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, SHARED_GPA, False, raw.ljust(4096, b"\0")))
    return rules(vmgexit(machine, NaeCode.SNP_GUEST_REQUEST, SHARED_GPA, SHARED_GPA + 0x1000))


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [((1, 3, 5), []), ((1, 1), []), ((2,), ["R12"]), ((1, 5), ["R12"]), ((3, 1), ["R12"]), ((1, 3, 2), ["R12"])],
    ids=str,
)
def test_r12_numbers_are_odd_and_two_apart(booted, machine, numbers, expected):
    key = context(machine, booted[1][0]).vmpcks[1]
    found = [send(machine, seal(key, ReportRequest.build(), seqno=n, kind=5, vmpck=1)) for n in numbers]
    assert found[-1] == expected
    assert not any(found[:-1])


def test_r12_the_same_number_for_another_message(booted, machine):
    key = context(machine, booted[1][0]).vmpcks[1]
    assert send(machine, seal(key, ReportRequest.build(), seqno=1, kind=5, vmpck=1)) == []
    assert send(machine, seal(key, ReportRequest.build(report_data=b"x" * 64), seqno=1, kind=5, vmpck=1)) == ["R12"]
    assert send(machine, seal(key, ReportRequest.build(), seqno=1, kind=5, vmpck=0)) == []


def test_a_scratch_area_out_of_reach_is_nothing_to_judge(machine):
    assert rules(vmgexit(machine, NaeCode.SNP_PAGE_STATE_CHANGE)) == []
