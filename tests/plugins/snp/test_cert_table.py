"""Certificate tables: any entries come back, and any bytes are a table or a precise refusal."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.errors import FormatError
from sevlab.plugins.snp.cert_table import GUIDS, build_cert_table, page_count, parse_cert_table

ENTRIES = st.lists(
    st.tuples(st.uuids().filter(lambda guid: guid.int), st.binary(max_size=40)), max_size=5, unique_by=lambda e: e[0]
)


@given(ENTRIES)
def test_any_entries_come_back(entries):
    table = build_cert_table((str(guid), data) for guid, data in entries)
    assert [(uuid.UUID(entry.guid), entry.data) for entry in parse_cert_table(table)] == entries


@given(st.binary(max_size=120))
def test_any_bytes_are_a_table_or_a_precise_refusal(data):
    refusal = None
    try:
        parse_cert_table(data, "f")
    except FormatError as error:
        refusal = error
    assert refusal is None or (str(refusal).startswith("f: offset 0x") and refusal.offset <= len(data))


def test_a_table_cut_at_any_byte_is_refused():
    table = build_cert_table([(GUIDS["vcek"], b"v" * 30), (GUIDS["ask"], b"a" * 30)])
    for length in range(len(table)):
        with pytest.raises(FormatError):
            parse_cert_table(table[:length])
    assert [entry.kind for entry in parse_cert_table(table)] == ["vcek", "ask"]


def test_a_guid_may_stand_once_only():
    with pytest.raises(FormatError, match=r"row 63da758d.*: expected once, found a second time"):
        parse_cert_table(build_cert_table([(GUIDS["vcek"], b"v")] * 2))


@pytest.mark.parametrize(("length", "pages"), [(0, 0), (1, 1), (4096, 1), (4097, 2)])
def test_pages_are_counted_up(length, pages):
    assert page_count(bytes(length)) == pages
