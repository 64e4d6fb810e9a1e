from __future__ import annotations

import io
import json
from typing import NamedTuple

import pytest
from sevlab.core import events as ev
from sevlab.core.config import MachineConfig
from sevlab.core.errors import ConfigError
from sevlab.core.vocabulary import Boundary, Derived, Vocabulary, outcome
from sevlab.traces.export import FORMATS, SUFFIXES, exporter
from sevlab.traces.reader import TraceReader
from sevlab.traces.schema import NO_VCPU, Entry, Header, Source, vocabulary_of
from sevlab.traces.script import read_script
from sevlab.traces.text import record_from_json, record_json
from sevlab.traces.writer import TraceWriter


@outcome("test.over", Boundary.CPU)
class Over(NamedTuple):
    after_ns: Derived[int]


VOCABULARY = Vocabulary(vocabulary_of(("sme",)).kinds | {"test.over": Over})
IO_EXIT = ev.CpuExit(0, 0x7B, 0x3F8_0210, 0xFFFF_FFFF_8160_A3F3, b"\xee", 0)
ENTRIES = [
    Entry(1000, 0, IO_EXIT, (ev.Resumed(0, 0x1001), Over(700))),
    Entry(1200, 1, ev.CpuExit(1, 0x72, 0, 0, b"", 0), (Over(300),)),
    Entry(2000, NO_VCPU, ev.AspCommand("sev", 4, 0x1000, b"\1\2"), (ev.AspStatus(4, 0, b"\1\2"),)),
    Entry(2000, NO_VCPU, ev.MemoryRead(1, 0, 0, 0x1000, True, 4), (ev.Data(b"abcd"),)),
    Entry(2000, NO_VCPU, ev.AdvanceClock(1), (ev.Done(),)),
]


@pytest.fixture
def reader():
    file = io.BytesIO()
    header = Header(config=MachineConfig(plugins=("sme",)), source=Source("ftrace", "boot.txt", "0" * 64))
    with TraceWriter(file, header, vocabulary=VOCABULARY) as writer:
        for entry in ENTRIES:
            writer.append(entry)
    return TraceReader(file, vocabulary=VOCABULARY)


def test_perfetto_reads_back_with_its_own_library(reader, tmp_path):
    pb2 = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
    path = tmp_path / "x"
    assert exporter("perfetto")(reader, path) == len(ENTRIES)
    trace = pb2.Trace()
    trace.ParseFromString(path.read_bytes())
    names = {p.track_descriptor.uuid: p.track_descriptor for p in trace.packet if p.HasField("track_descriptor")}
    assert [track.name for track in names.values()] == ["boot.txt", "vCPU 0", "vCPU 1", "ASP", "hypervisor"]
    assert all(track.parent_uuid == 1 for uuid, track in names.items() if uuid != 1)
    assert all(packet.trusted_packet_sequence_id == 1 for packet in trace.packet)
    events = [packet for packet in trace.packet if packet.HasField("track_event")]
    begins = [p for p in events if p.track_event.type == pb2.TrackEvent.TYPE_SLICE_BEGIN]
    ends = [p for p in events if p.track_event.type == pb2.TrackEvent.TYPE_SLICE_END]
    assert len(begins) == len(ends) == len(ENTRIES)
    drawn = [
        (names[begin.track_event.track_uuid].name, begin.track_event.name, begin.timestamp, end.timestamp)
        for begin, end in zip(begins, ends, strict=True)
    ]
    assert drawn == [
        ("vCPU 0", "IOIO", 1000, 1700),
        ("vCPU 1", "CPUID", 1200, 1500),
        ("ASP", "asp.command", 2000, 3000),
        ("hypervisor", "read", 2000, 3000),
        ("hypervisor", "advance", 3000, 4000),  # no time passed: drawn behind the one before
    ]
    arguments = {item.name: item for item in begins[0].track_event.debug_annotations}
    assert list(arguments) == ["entry", *IO_EXIT._fields, "outcome[0]", "outcome[1]"]
    assert arguments["exit_info_2"].pointer_value == 0xFFFF_FFFF_8160_A3F3
    assert arguments["exit_code"].uint_value == 0x7B
    assert arguments["insn"].string_value == "ee"
    assert arguments["outcome[0]"].string_value == "resumed(vcpu=0, rip=0x1001)"
    c_bit = {item.name: item for item in begins[3].track_event.debug_annotations}["c_bit"]
    assert c_bit.bool_value is True


def test_json_lines_are_the_entries(reader, tmp_path):
    path = tmp_path / "x"
    assert exporter("jsonl")(reader, path) == len(ENTRIES)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["entry"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["vcpu"] for line in lines] == [0, 1, None, None, None]
    read = [record_from_json(record, reader.vocabulary, "x") for line in lines for record in line["outcome"]]
    assert read == [record for entry in ENTRIES for record in entry.outcome]
    assert list(read_script(path, reader.vocabulary)) == [entry.step for entry in ENTRIES]


def test_parquet_has_a_row_for_each_record(reader, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x"
    assert exporter("parquet")(reader, path) == len(ENTRIES)
    rows = parquet.read_table(path).to_pylist()
    records = [(number, record) for number, entry in enumerate(ENTRIES) for record in (entry.step, *entry.outcome)]
    assert [(row["entry"], row["kind"]) for row in rows] == [
        (number, record_json(record)["kind"]) for number, record in records
    ]
    assert [row["step"] for row in rows][:4] == [True, False, False, True]
    assert rows[0]["exit_info_2"] == 0xFFFF_FFFF_8160_A3F3
    assert rows[1]["exit_code"] is None
    assert rows[1]["rip"] == 0x1001
    assert json.loads(rows[0]["fields"])["insn"] == "ee"
    assert rows[-1]["vcpu"] is None


def test_an_empty_trace_exports_to_every_format(tmp_path):
    file = io.BytesIO()
    TraceWriter(file, Header(config=MachineConfig(plugins=("sme",)))).close()
    for name in FORMATS:
        if name == "parquet":
            pytest.importorskip("pyarrow")
        assert exporter(name)(TraceReader(file), tmp_path / name) == 0
        assert (tmp_path / name).exists()
    assert list(SUFFIXES) == list(FORMATS)


def test_an_unknown_format_names_the_known():
    with pytest.raises(ConfigError, match="'csv': expected one of perfetto, jsonl, parquet"):
        exporter("csv")
