from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.config import GuestConfig, MachineConfig
from sevlab.core.errors import TraceFormatError
from sevlab.core.testing import step_strategy
from sevlab.core.vocabulary import spec_of
from sevlab.traces.reader import TraceReader
from sevlab.traces.records import Reset
from sevlab.traces.schema import (
    Entry,
    Header,
    PluginVersion,
    Source,
    declared,
    pack_header,
    unpack_header,
    vocabulary_of,
)
from sevlab.traces.writer import TraceWriter

VOCABULARY = vocabulary_of(("sme",))
CONFIG = MachineConfig(
    generation="genoa",
    seed=b"\1\0",
    memory_bytes=64 << 20,
    caches=True,
    plugins=("sme",),
    guests=(GuestConfig(name="a", vcpus=2, memory_bytes=8 << 20),),
    options={"sme": {"enabled": True}},
)


def test_a_header_survives_its_bytes():
    header = Header(
        config=CONFIG,
        source=Source("ftrace", "boot.txt", "ab" * 32),
        plugins=(PluginVersion("sme", "0.1.0"),),
        oracles=("single-fetch",),
        kinds=declared(VOCABULARY),
    )
    read = unpack_header(pack_header(header))
    assert read == header
    assert read.schema_version == header.schema_version


def test_the_schema_version_names_the_declarations():
    kinds = declared(VOCABULARY)
    version = Header(config=CONFIG, kinds=kinds).schema_version
    changed = kinds[0]._replace(fields=kinds[0].fields[:-1])
    assert len(version) == 16
    assert Header(config=MachineConfig(), kinds=kinds).schema_version == version
    assert Header(config=CONFIG, kinds=(changed, *kinds[1:])).schema_version != version


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", b"\x90", b"\xdd\xff\xff\xff\xff", b"\x91" * 3000])
def test_what_is_no_header_is_refused(data):
    with pytest.raises(TraceFormatError, match="header"):
        unpack_header(data)


outcomes = st.sampled_from(
    [
        record(
            *(
                {int: 1 << 63, bytes: b"\0x", str: "é", bool: True, tuple: (("a", 1),)}[f.type]
                for f in spec_of(record).fields
            )
        )
        for record in VOCABULARY.kinds.values()
        if not spec_of(record).is_step
    ]
)
entries = st.builds(
    Entry,
    st.integers(0, (1 << 64) - 1),
    st.integers(-1, 512),
    step_strategy(VOCABULARY),
    st.lists(outcomes, max_size=4).map(tuple),
)


@given(st.lists(entries, max_size=12), st.integers(1, 400))
def test_what_is_written_is_read_in_its_order(written, block_bytes):
    file = io.BytesIO()
    with TraceWriter(file, Header(config=CONFIG), vocabulary=VOCABULARY, block_bytes=block_bytes) as writer:
        for entry in written:
            writer.append(entry)
    reader = TraceReader(file, vocabulary=VOCABULARY)
    assert list(reader) == written
    assert [reader[number] for number in range(len(written))] == written
    assert reader.header.config == CONFIG
    assert reader.check() == ()
    kinds = [spec_of(record).kind for entry in written for record in (entry.step, *entry.outcome)]
    assert reader.index.kinds == {kind: kinds.count(kind) for kind in set(kinds)}


def test_records_keep_their_classes():
    file = io.BytesIO()
    with TraceWriter(file, Header(config=CONFIG)) as writer:
        writer.append(Entry(5, -1, Reset(), ()))
    assert type(next(iter(TraceReader(file))).step) is Reset
