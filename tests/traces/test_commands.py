from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from sevlab.core import events as ev
from sevlab.core.cli import root
from sevlab.core.errors import SevlabError
from sevlab.core.testing import make_machine
from sevlab.traces.record import Recorder


def run(*arguments, code=0):
    result = CliRunner().invoke(root, [str(argument) for argument in arguments])
    if isinstance(result.exception, SevlabError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.fixture
def trace(tmp_path):
    machine = make_machine("sme", guests=1)
    path = tmp_path / "a.sevtrace"
    with Recorder(machine, path):
        machine.apply(ev.AdvanceClock(4000))
        machine.apply(ev.MemoryWrite(1, 0, 0, 0x1000, False, b"hello"))
        machine.apply(ev.MemoryRead(1, 0, 0, 0x1000, False, 5))
    return path


def test_show_gives_header_and_kinds(trace):
    text = run("show", "trace", trace)
    assert "3 entries, schema " in text
    assert "plugins   sme " in text
    document = json.loads(run("show", "trace", trace, "--json"))
    assert document["entries"] == 3
    assert document["closed"] is True
    assert document["kinds"] == {"done": 2, "advance": 1, "data": 1, "read": 1, "write": 1}
    assert document["machine"]["plugins"] == ["sme"]
    assert document["lost"] == []


def test_show_decodes_an_entry_field_by_field(trace):
    text = run("show", "trace", trace, "--entry", 2)
    assert "entry 2, 0.000002000 s, no vCPU" in text
    assert "  address       0x1000  (input)" in text
    assert "  data  68656c6c6f  (checked)" in text
    document = json.loads(run("show", "trace", trace, "--entry", 2, "--json"))
    assert document["outcome"] == [{"kind": "data", "data": "68656c6c6f"}]
    with pytest.raises(SevlabError, match="no entry 3; the last one is 2"):
        run("show", "trace", trace, "--entry", 3)


def test_show_lists_entries_from_a_number_or_a_time(trace):
    assert [item["entry"] for item in json.loads(run("show", "trace", trace, "--from", 1, "--json"))] == [1, 2]
    assert json.loads(run("show", "trace", trace, "--at", 2001, "--json")) == []
    assert len(json.loads(run("show", "trace", trace, "--at", 2000, "--count", 1, "--json"))) == 1
    assert "-> data(data=68656c6c6f)" in run("show", "trace", trace, "--from", 2)


def test_show_says_what_is_lost(trace):
    data = bytearray(trace.read_bytes())
    data[-200] ^= 1
    trace.write_bytes(bytes(data))
    (lost,) = json.loads(run("show", "trace", trace, "--check", "--json", code=1))["lost"]
    assert lost["offset"] < len(data) - 200 < lost["offset"] + lost["length_bytes"]


def test_a_file_of_another_kind_is_refused_with_what_it_starts_with(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"# tracer: nop\n")
    with pytest.raises(SevlabError, match="no .sevtrace header; it starts with b'# tracer'"):
        run("show", "trace", path)
    with pytest.raises(SevlabError, match="No such file"):
        run("show", "trace", tmp_path / "y")


def test_diff_answers_with_its_exit_code(trace, tmp_path):
    assert "no difference in 3 entries" in run("diff", trace, trace)
    other = tmp_path / "b.sevtrace"
    with Recorder(machine := make_machine("sme", guests=1, seed=b"z"), other):
        machine.apply(ev.AdvanceClock(4000))
        machine.apply(ev.MemoryWrite(1, 0, 0, 0x1000, False, b"hallo"))
    text = run("diff", trace, other, code=1)
    assert r"header: seed: b'\x00' and b'z'" in text
    assert "entry 1: step write.data: 68656c6c6f and 68616c6c6f" in text
    document = json.loads(run("diff", trace, other, "--json", code=1))
    assert (document["entry"], document["equal"]) == (1, False)
    assert [entry["entry"] for entry in document["left"]] == [1, 2]


def test_record_takes_a_command_or_a_script(tmp_path, trace):
    output = run("record", "-o", tmp_path / "demo", "--json", "--", "demo", "sme")
    found = json.loads(output[output.rindex("\n[") :])
    assert [item["entries"] > 5 for item in found] == [True] * len(found)
    assert found
    run("export", trace, "--format", "jsonl")
    config = tmp_path / "machine.toml"
    config.write_text('[machine]\nplugins = ["sme"]\n[[guest]]\nname = "guest0"\n')
    again = tmp_path / "again.sevtrace"
    run("record", "-o", again, "--config", config, "--steps", trace.with_suffix(".jsonl"))
    run("diff", trace, again)
    with pytest.raises(SevlabError, match="exists already"):
        run("record", "-o", again, "--config", config, "--steps", trace.with_suffix(".jsonl"))
    with pytest.raises(SevlabError, match="expected a command of sevlab behind --"):
        run("record", "-o", again)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: expected an object with a kind"),
        ('{"kind": "nope"}', "line 2: unknown record kind 'nope'"),
        ('{"kind": "advance"}', "line 2: advance has no 'ticks'; its fields are ticks"),
        ('{"kind": "advance", "ticks": 1, "tocks": 2}', "line 2: advance has a 'tocks'"),
        ('{"kind": "advance", "ticks": -1}', r"line 2: advance.ticks is -1, expected 0 to 2\^64-1"),
        ('{"kind": "done"}', "line 2: done is no step"),
        (
            '{"kind":"write","party":1,"vcpu":0,"space":0,"address":0,"c_bit":false,"data":"x"}',
            "line 2: write.data is 'x', expected hexadecimal digits",
        ),
    ],
)
def test_a_script_that_cannot_be_used_is_named_with_its_line(tmp_path, line, message):
    path = tmp_path / "s.jsonl"
    path.write_text(f"# a comment\n{line}\n")
    with pytest.raises(SevlabError, match=message):
        run("record", "-o", tmp_path / "o", "--steps", path)


def test_export_never_replaces_a_file_unasked(trace):
    assert "3 entries" in run("export", trace)
    with pytest.raises(SevlabError, match="exists already"):
        run("export", trace)
    document = json.loads(run("export", trace, "--overwrite", "--json"))
    assert document["entries"] == 3


def test_minimise_needs_something_to_show(trace, tmp_path):
    with pytest.raises(SevlabError, match="no finding"):
        run("minimise", trace, "-o", tmp_path / "m")
    with pytest.raises(SevlabError, match="its replay does not diverge"):
        run("minimise", trace, "-o", tmp_path / "m", "--divergence")


def test_the_replay_of_a_recording_can_be_limited(trace):
    assert "recording, 2 entries, 0 divergences" in run("replay", trace, "--until", 2)
    assert "recording, 3 entries, 0 divergences" in run("replay", trace, "--only", "read", "--stop-at-first")
    run("replay", trace, "--start", 1, code=2)
