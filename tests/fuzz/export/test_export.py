from __future__ import annotations

import json

import pytest
from sevlab.core.errors import ConfigError, PluginError, TraceFormatError
from sevlab.core.vocabulary import spec_of
from sevlab.fuzz.export import FORMATS, export
from sevlab.fuzz.export.pieces import parts, runs
from sevlab.plugins.sev_es import Ghcb
from sevlab.traces.reader import TraceReader
from sevlab.traces.schema import Source
from sevlab.traces.text import record_from_json
from sevlab.traces.writer import TraceWriter

from tests.fuzz.export.findings import odd_page


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_names_command_versions_seed_and_finding(finding, given, name):
    text = export(finding, name, given=given)
    for said in (f"sevlab replay {finding}", "sevlab", "plugin", "seed", "buffer.bounds"):
        assert said in text or said.title() in text
    assert text.endswith("\n")
    assert text == export(finding, name, given=given)


def test_the_json_document_holds_the_steps_and_the_fields(finding, given):
    document = json.loads(export(finding, "json", given=given))
    with TraceReader(finding) as reader:
        steps = [entry.step for entry in reader]
        back = [record_from_json(entry["step"], reader.vocabulary, "here") for entry in document["entries"]]
    assert back == steps
    message = document["entries"][-2]["message"]
    assert (message["name"], message["layout"]) == ("CPUID", "Ghcb")
    assert message["fields"]["rax"] == 0x8000_001F
    assert document["findings"][0]["rule"] == "buffer.bounds"
    assert document["faults"] == ["faulty"]


def test_parts_build_the_image_again():
    fields, pieces = parts(Ghcb, odd_page())
    image = bytearray(Ghcb.build(**fields))
    for piece in pieces:
        image[piece.offset : piece.offset + len(piece.data)] = piece.data
    assert bytes(image) == odd_page()
    assert fields["rax"] == 0
    assert "rdx" not in fields


def test_runs_join_short_gaps():
    assert runs(b"") == []
    assert runs(b"\0\1" + bytes(7) + b"\1" + bytes(8) + b"\1\0") == [(1, 10), (18, 19)]


def test_what_cannot_be_exported_is_refused_with_its_reason(finding, tmp_path):
    with pytest.raises(ConfigError, match="expected one of pytest, kvm-unit-test, syzkaller, json"):
        export(finding, "perfetto")
    with pytest.raises(PluginError, match="faulty"):
        export(finding, "json")
    broken = bytearray(finding.read_bytes())
    broken[len(broken) // 2] ^= 1
    (tmp_path / "broken.sevtrace").write_bytes(broken)
    with pytest.raises((TraceFormatError, PluginError)):
        export(tmp_path / "broken.sevtrace", "json")
    with pytest.raises(TraceFormatError, match="No such file"):
        export(tmp_path / "absent.sevtrace", "json")


def test_damage_and_imports_are_named(finding, given, tmp_path):
    broken = bytearray(finding.read_bytes())
    broken[len(broken) // 2] ^= 1
    (tmp_path / "broken.sevtrace").write_bytes(broken)
    with pytest.raises(TraceFormatError, match="damaged: bytes"):
        export(tmp_path / "broken.sevtrace", "pytest", given=given)
    with TraceReader(finding) as reader:
        header = reader.header.__class__(config=reader.header.config, source=Source("ftrace", "x", ""))
        with TraceWriter(tmp_path / "imported.sevtrace", header, vocabulary=reader.vocabulary) as writer:
            writer.append(next(entry for entry in reader if spec_of(entry.step).kind == "sev_es.vmgexit"))
    with pytest.raises(TraceFormatError, match="imported from 'ftrace'"):
        export(tmp_path / "imported.sevtrace", "pytest")
