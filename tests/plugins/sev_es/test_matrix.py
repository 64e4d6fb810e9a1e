"""Each NAE event with each input field absent, zero, at the limit, past it, or with reserved bits: the exact reply."""

from __future__ import annotations

import pytest
from sevlab.core.events import Stopped
from sevlab.core.svm import ExitCode
from sevlab.plugins.sev_es import SHARED_BUFFER, SHARED_BUFFER_OFFSET, VALID_BITS, GhcbReply, Vmgexit
from sevlab.plugins.sev_es.matrix import ALL, markdown_table

from tests.plugins.sev_es.guests import GHCB_GPA, encrypted_machine, page

REGISTERS = ("rax", "rbx", "rcx", "rdx")
NOT_CONFIRMED = "two size bits"
"""The note of a case whose answer no source confirms; the register of a DR7 read is another."""


def marked(code, number):
    unsure = code == ExitCode.DR7_READ or ALL[code].cases[number].note == NOT_CONFIRMED
    return pytest.param((code, number), marks=pytest.mark.unverified if unsure else ())


CASES = [marked(code, number) for code, event in sorted(ALL.items()) for number in range(len(event.cases))]


@pytest.fixture(scope="module")
def shared_machine():
    """Without devices: what the events themselves decide."""
    return encrypted_machine(plugins=("sme", "sev", "sev_es"))


def name_of(item):
    code, number = item
    case = ALL[code].cases[number]
    return f"{ALL[code].name}-{case.field}-{case.kind}-{number}".replace(" ", "-")


@pytest.mark.parametrize("item", CASES, ids=name_of)
def test_each_field_of_each_event_is_answered_as_declared(shared_machine, item):
    machine = shared_machine
    machine.reset()
    code, number = item
    event, case = ALL[code], ALL[code].cases[number]
    fields = {"sw_exit_info_1": 0, "sw_exit_info_2": 0, **event.example, **case.given}
    if case.value is None:
        fields.pop(case.field, None)
    else:
        fields[case.field] = case.value
    fields = {
        name: GHCB_GPA + SHARED_BUFFER_OFFSET if value == SHARED_BUFFER else value for name, value in fields.items()
    }
    infos = {name: fields.pop(name) for name in ("sw_exit_info_1", "sw_exit_info_2") if name in fields}
    data = bytearray(page(code, infos.get("sw_exit_info_1", 0), infos.get("sw_exit_info_2", 0), **fields))
    for name in ("sw_exit_info_1", "sw_exit_info_2"):
        if name not in infos:
            bit = VALID_BITS[name].bit_length() - 1
            data[0x3F0 + bit // 8] &= ~(1 << bit % 8)
    vcpu = machine.vcpus[0]
    registers = vcpu.regs._capture(vcpu.regs)
    outcome = machine.apply(Vmgexit(0, GHCB_GPA, bytes(data)))
    reply = outcome.first(GhcbReply)
    assert vcpu.regs._capture(vcpu.regs) == registers
    if case.expect is None:
        assert reply is None
        assert outcome.first(Stopped) is not None or vcpu.halted
        return
    assert (reply.info_1, reply.info_2) == (case.expect.info_1, case.expect.info_2)
    named = tuple(name for name in REGISTERS if getattr(case.expect, name) is not None)
    returns = case.returns
    if returns is None:
        returns = named or (event.outputs if case.expect.info_1 == 0 else ())
    marked = int.from_bytes(reply.valid, "little")
    infos_valid = VALID_BITS["sw_exit_info_1"] | VALID_BITS["sw_exit_info_2"]
    assert marked == infos_valid | sum(VALID_BITS[name] for name in returns)
    for name in named:
        assert getattr(reply, name) == getattr(case.expect, name)


def test_no_field_of_any_event_is_without_a_row():
    for event in ALL.values():
        assert {case.field for case in event.cases} == set(event.inputs), event.name
        for name in ("sw_exit_info_1", "sw_exit_info_2", *event.required):
            assert any(case.field == name and case.kind == "absent" for case in event.cases), (event.name, name)


def test_the_documented_matrix_has_a_row_for_each_case_and_no_empty_cell():
    rows = markdown_table().splitlines()[2:]
    assert len(rows) == len(CASES)
    for row in rows:
        _, event, field, kind, _value, outcome, _remark, _ = (cell.strip() for cell in row.split("|"))
        assert event
        assert field
        assert kind in ("absent", "zero", "limit", "past", "reserved")
        assert outcome
