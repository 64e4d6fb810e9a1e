from __future__ import annotations

from typing import NamedTuple

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core import events as ev
from sevlab.core.errors import PluginError, TraceFormatError
from sevlab.core.testing import step_strategy
from sevlab.core.vocabulary import Boundary, Checked, Derived, Input, Role, Vocabulary, spec_of, step

VOCABULARY = Vocabulary({spec_of(record).kind: record for record in ev.KERNEL_RECORDS})


@given(step_strategy(VOCABULARY))
def test_records_survive_msgpack(record):
    packed = msgpack.packb(VOCABULARY.encode(record))
    assert VOCABULARY.decode(msgpack.unpackb(packed, use_list=False)) == record


@given(st.recursive(st.none() | st.integers() | st.binary() | st.text() | st.booleans(), st.lists, max_leaves=8))
def test_any_decoded_value_is_a_record_or_a_format_error(value):
    try:
        record = VOCABULARY.decode(value)
    except TraceFormatError:
        return
    assert VOCABULARY.decode(VOCABULARY.encode(record)) == record


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ([], "expected an array that starts with a record kind"),
        ([7, 1], "expected an array that starts with a record kind"),
        ("exit", "expected an array"),
        (["no-such", 1], "unknown record kind 'no-such'; is a plugin missing"),
        (["advance"], "advance has 0 fields, expected 1"),
        (["advance", -1], r"advance\.ticks is -1, expected 0 to 2\^64-1"),
        (["advance", 1 << 64], "expected 0 to 2"),
        (["advance", True], "expected 0 to 2"),
        (["advance", "x"], "expected 0 to 2"),
        (["data", "text"], r"data\.data is str, expected bytes"),
        (["msr", 1, 1, 1], r"msr\.write is 1, expected a boolean"),
    ],
)
def test_a_malformed_array_is_named(array, message):
    with pytest.raises(TraceFormatError, match=f"record 7: .*{message}"):
        VOCABULARY.decode(array, where="record 7")


def test_the_largest_number_is_accepted():
    assert VOCABULARY.decode(["advance", (1 << 64) - 1]) == ev.AdvanceClock((1 << 64) - 1)


def test_a_declaration_gives_kind_boundary_and_roles():
    @step("test.kind", Boundary.DEVICE)
    class Kind(NamedTuple):
        first: Input[int]
        second: Checked[bytes]
        third: Derived[str]

    spec = spec_of(Kind)
    assert (spec.kind, spec.boundary, spec.is_step) == ("test.kind", Boundary.DEVICE, True)
    assert [(field.name, field.type, field.role) for field in spec.fields] == [
        ("first", int, Role.INPUT),
        ("second", bytes, Role.CHECKED),
        ("third", str, Role.DERIVED),
    ]


def test_a_field_without_role_or_with_another_type_is_refused():
    with pytest.raises(PluginError, match="field 'bare' has no role"):

        @step("test.bare", Boundary.CPU)
        class Bare(NamedTuple):
            bare: int

    with pytest.raises(PluginError, match="field 'many' is dict, expected"):

        @step("test.many", Boundary.CPU)
        class Many(NamedTuple):
            many: Input[dict]


def test_steps_are_inputs_and_outcomes_are_what_the_model_determines():
    for record in ev.KERNEL_RECORDS:
        spec = spec_of(record)
        roles = {field.role for field in spec.fields}
        assert roles <= ({Role.INPUT} if spec.is_step else {Role.CHECKED, Role.DERIVED})
