from __future__ import annotations

import pytest
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st
from sevlab.core import plugins
from sevlab.core.testing import make_machine, step_strategy
from sevlab.fuzz.export import export, literals
from sevlab.fuzz.messages import Messages
from sevlab.plugins.sev_es import Ghcb, Vmgexit
from sevlab.traces import replay_recorded
from sevlab.traces.reader import TraceReader
from sevlab.traces.records import End

from tests.fuzz.export.findings import CPUID_PAGE, odd_page

NAME = "test_invariant_buffer_bounds"
MACHINE = make_machine("sev_es", "snp", "xen")
MESSAGES = Messages.of_plugins(MACHINE.plugins)


@pytest.fixture(scope="module")
def text(finding, given):
    return export(finding, "pytest", given=given)


@pytest.fixture
def installed(monkeypatch, given):
    """As if the faulty plugin were installed."""
    real = plugins.load
    monkeypatch.setattr(
        replay_recorded, "load", lambda names, **_: real(names, given=given if "faulty" in names else {})
    )


def run(text):
    space = {}
    exec(compile(text, "exported", "exec"), space)
    return space


def test_green_without_the_fault_and_red_with_it(text, installed, monkeypatch):
    run(text)[NAME]()
    monkeypatch.setenv("SEVLAB_WITH_FAULT", "1")
    with pytest.raises(AssertionError, match=r"step \d+: \[Found\(oracle='invariant', rule='buffer.bounds'"):
        run(text)[NAME]()


def test_the_steps_are_those_of_the_trace(text, finding):
    with TraceReader(finding) as reader:
        assert run(text)["STEPS"] == tuple(entry.step for entry in reader)
        assert isinstance(list(reader)[-1].step, End)


def test_it_says_what_was_found_how_to_reproduce_it_and_with_what(text, finding, given):
    head = text[: text.index("\nfrom ")]
    for said in ("rule buffer.bounds", f"Reproduce: sevlab replay {finding}", "sevlab 0.", "Seed:", "faulty"):
        assert said in head
    assert "another command" in export(finding, "pytest", command="another command", given=given)


def test_pages_are_written_by_their_fields(text):
    assert "rax=0x8000001F" in text
    assert "sw_scratch=0x5840" in text
    assert "# in rdx\n" in text


@pytest.mark.parametrize("image", [CPUID_PAGE, odd_page(), bytes(4096), b"\xff" * 4096, odd_page()[:0x3A5], b""])
def test_any_image_is_the_value_of_its_source(image):
    assert evaluate(Vmgexit(0, 0x5000, image)) == Vmgexit(0, 0x5000, image)


@hypothesis_given(step_strategy(MACHINE.vocabulary))
def test_any_record_is_the_value_of_its_source(record):
    assert evaluate(record) == record


@hypothesis_given(st.binary(max_size=4096), st.integers(0, 4096))
def test_any_bytes_are_the_value_of_their_source(data, zeros):
    page = (data + bytes(zeros))[:4096].ljust(4096, b"\0")
    assert evaluate(Vmgexit(0, 0x5000, page)).page == page
    assert evaluate(Vmgexit(0, 0x5001, data)).page == data


def evaluate(record):
    source = literals.Source()
    expression = source.record(record, MESSAGES.of(record), 0)
    space = {}
    exec("\n".join(source.import_lines()), space)
    exec("from base64 import b85decode", space)
    from sevlab.fuzz.export.pytest_file import WITH_BYTES

    exec(WITH_BYTES, space)
    return eval(expression, space)


def test_classes_come_from_where_they_are_published():
    source = literals.Source()
    source.name(Ghcb)
    assert source.import_lines() == ["from sevlab.plugins.sev_es import Ghcb"]
