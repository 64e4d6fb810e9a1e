from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import sevlab_stranger as stranger
from sevlab.core.errors import TraceFormatError
from sevlab.core.events import AspCommand, AspStatus
from sevlab.core.layout import Layout, bits, flag, raw_bytes, u16, u64
from sevlab.core.payload import Message, Payload
from sevlab.core.plugins import load
from sevlab.core.svm import ExitCode
from sevlab.core.testing import make_machine
from sevlab.fuzz.surface import Surface, audit, class_of, classes_of
from sevlab.fuzz.surface_html import page as html_page
from sevlab.fuzz.surface_outcomes import outcome_of
from sevlab.plugins.sev import Command, Status
from sevlab.plugins.sev_es import Vmgexit
from sevlab.plugins.xen.numbers import Nr
from sevlab.plugins.xen.records import Hypercalled, HypercallStep
from sevlab.traces.record import Recorder

from tests.plugins.sev_es.guests import GHCB_GPA, encrypted_machine, page


class Ruled(Layout, size=32, valid_bitmap=16):
    """Fields of every kind."""

    marked = u64(0x00, valid_bit=True)
    few = u16(0x08, values=(0, 3))
    aligned = u16(0x0A, aligned=16)
    on = flag(0x0C, u16, 0)
    rest = bits(0x0C, u16, 15, 1, must_be_zero=True)
    name = raw_bytes(0x0E, 2)


@pytest.mark.parametrize(
    ("field", "classes", "examples"),
    [
        ("marked", ("absent", "zero", "other", "limit"), {0: "zero", 7: "other", (1 << 64) - 1: "limit"}),
        ("few", ("zero", "other", "breaks"), {0: "zero", 3: "other", 4: "breaks", 0xFFFF: "breaks"}),
        ("aligned", ("zero", "other", "breaks"), {0: "zero", 16: "other", 17: "breaks"}),
        ("on", ("zero", "limit"), {0: "zero", 1: "limit"}),
        ("rest", ("zero", "breaks"), {0: "zero", 1: "breaks"}),
        ("name", ("zero", "other"), {b"\0\0": "zero", b"\0a": "other"}),
    ],
)
def test_a_field_has_the_classes_of_its_declaration(field, classes, examples):
    info = Ruled.FIELDS[field]
    assert classes_of(info) == classes
    for value, expected in examples.items():
        assert class_of(info, Ruled.build(**{field: value}), marked=True) == expected
        assert expected in classes
    assert class_of(info, bytes(32), marked=False) == "absent"


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    machine = encrypted_machine()
    path = tmp_path_factory.mktemp("surface") / "cpuid.sevtrace"
    with Recorder(machine, path):
        machine.apply(Vmgexit(0, GHCB_GPA, page(ExitCode.CPUID, rax=0, rcx=7)))
        machine.apply(Vmgexit(0, GHCB_GPA, page(ExitCode.CPUID, rax=0)))
        machine.apply(Vmgexit(0, GHCB_GPA, page(0x777)))
        machine.apply(Vmgexit(0, 0x002, b""))
    return path


@pytest.fixture(scope="module")
def surface(trace):
    return audit([trace])


def row(surface, name, carried_in="page"):
    (found,) = [row for row in surface.rows if row.message.name == name and row.payload.field == carried_in]
    return found


def test_messages_fields_and_outcomes_are_counted(surface):
    cpuid = row(surface, "CPUID")
    assert cpuid.sent == 2
    assert cpuid.outcomes == {"done": 1, "MISSING_INPUT": 1}
    fields = {field.name: field for field in cpuid.fields}
    assert fields["rcx"].reached == {"other": {"done": 1}, "absent": {"MISSING_INPUT": 1}}
    assert fields["rcx"].not_reached == ("zero", "limit")
    assert fields["rax"].not_reached == ("absent", "other", "limit")
    assert cpuid.not_reached == ()
    assert surface.undeclared == {"INVALID_EVENT": 1}
    assert row(surface, "SEV_INFO_REQUEST", "ghcb_msr").outcomes == {"SEV_INFO_RESPONSE": 1}


def test_what_was_never_sent_is_named(surface):
    dr7 = row(surface, "DR7_WRITE")
    assert (dr7.sent, dr7.not_reached) == (0, ("MISSING_INPUT", "done", "exception 13"))
    launch = row(surface, "LAUNCH_MEASURE", "buffer")
    assert set(launch.not_reached) == {"done", "INVALID_PLATFORM_STATE", "INVALID_ADDRESS", "INVALID_LENGTH"}
    assert set(row(surface, "SNP_LAUNCH_START", "buffer").not_reached) >= {"done", "INVALID_PARAM"}
    psc = row(surface, "SNP_PAGE_STATE_CHANGE")
    assert psc.not_reached == ("done", "MISSING_INPUT", "INVALID_SCRATCH")
    assert row(surface, "PAGE_STATE_REQUEST", "ghcb_msr").not_reached == ("PAGE_STATE_RESPONSE",)
    assert row(surface, "multicall", "number").not_reached == ("done",)


def test_every_declared_event_command_and_hypercall_is_a_row(surface):
    names = {(row.payload.kind, row.payload.field) for row in surface.rows}
    assert names == {
        ("asp.command", "buffer"),
        ("sev_es.vmgexit", "page"),
        ("sev_es.vmgexit", "ghcb_msr"),
        ("xen.call", "number"),
        ("exit", "exit_info_1"),
        ("vmcb", "data"),
        ("sev_es.forge", "data"),
    }
    assert len(surface.rows) > 100


def test_a_command_of_the_mailbox_by_its_status():
    surface = Surface(load(["sev"]))
    machine = make_machine("sev")
    step = AspCommand("sev", Command.PLATFORM_STATUS, 0x10_0000, bytes(12))
    surface.add(step, machine.apply(step).records)
    surface.add(step, (AspStatus(4, Status.INVALID_ADDRESS, b""),))
    surface.add(step, (AspStatus(4, 0x7777, b""),))
    found = row(surface, "PLATFORM_STATUS", "buffer")
    assert found.outcomes == {"done": 1, "INVALID_ADDRESS": 1, "0x7777": 1}
    assert found.not_reached == ()


def test_a_hypercall_by_its_result_and_its_registers():
    surface = Surface(load(["xen"]))
    step = HypercallStep(0, Nr.XEN_VERSION, 0, 5, (1 << 64) - 1, 0, 0, 0, 0)
    for result in (0, (1 << 64) - 14):
        surface.add(step, (Hypercalled(0, Nr.XEN_VERSION, "legacy", result, False),))
    found = row(surface, "xen_version", "number")
    assert found.outcomes == {"done": 1, "EFAULT": 1}
    assert [list(field.reached) for field in found.fields[:3]] == [["zero"], ["other"], ["limit"]]


def test_a_plugin_of_somebody_else_has_its_rows(tmp_path):
    surface = Surface(load(["stranger"], given={"stranger": stranger}))
    add = row(surface, "ADD", "buffer")
    assert [field.name for field in add.fields] == ["first", "second"]


def test_a_step_that_carries_nothing_is_not_counted(surface):
    assert sum(row.sent for row in surface.rows) == 3
    assert outcome_of(()) == "nothing"


def test_the_document_and_the_page_say_the_same(surface):
    document = json.loads(json.dumps(surface.document()))
    sent = {item["name"]: item["sent"] for item in document["messages"] if item["sent"]}
    assert sent == {"CPUID": 2, "SEV_INFO_REQUEST": 1}
    assert document["totals"]["messages"] == [2, len(surface.rows)]
    text = html_page(surface)
    assert f"messages sent: 2 of {len(surface.rows)}" in text
    assert len(re.findall(r"<details>", text)) == len(surface.rows)


def test_the_page_is_whole_and_needs_nothing_else(surface):
    text = html_page(surface, "a < b")
    open_tags = []

    class Check(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert not {name for name, _ in attributes} & {"src", "href"}
            if tag != "meta":
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Check().feed(text)
    assert not open_tags
    assert "<script" not in text
    assert "a &lt; b" in text


def test_names_of_plugins_are_escaped():
    surface = Surface(load(["sev"]))
    payload = Payload("asp.command", "buffer", lambda _: 1, (message := Message(1, "<b>"),))
    surface.rows[0].payload, surface.rows[0].message = payload, message
    assert "<b>&lt;b&gt;</b>" in html_page(surface)


def test_a_file_that_is_no_trace_is_refused(tmp_path):
    (tmp_path / "x.sevtrace").write_bytes(b"no")
    with pytest.raises(TraceFormatError, match="no .sevtrace header"):
        audit([tmp_path / "x.sevtrace"])
