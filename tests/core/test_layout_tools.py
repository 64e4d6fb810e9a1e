from __future__ import annotations

import pytest
from hypothesis import given
from sevlab.core import layout_tools as tools
from sevlab.core.cpu import VmcbControl
from sevlab.core.layout import Layout, bits, raw_bytes, u8, u32, u64
from sevlab.plugins.sme import SysCfg


class Ruled(Layout, size=40, valid_bitmap=0x10):
    """Every rule once."""

    mode = u8(0, values=(1, 2, 3), doc="how", source="here, 1")
    low = bits(4, u32, 3, 0, values=range(8))
    high = bits(4, u32, 31, 4, must_be_zero=True)
    base = u64(8, aligned=0x1000, reserved=1 << 63, valid_bit=True)
    zero = raw_bytes(1, 3, must_be_zero=True)


GOOD = Ruled.build(mode=1, low=7, base=0x1000)
LAYOUTS = [Ruled, VmcbControl, SysCfg]


def test_a_valid_image_has_no_problems():
    assert tools.validate(Ruled, GOOD) == ()


@pytest.mark.parametrize(
    ("fields", "field", "rule"),
    [
        ({"mode": 4}, "mode", "values"),
        ({"low": 8}, "low", "values"),
        ({"high": 1}, "high", "reserved"),
        ({"base": 0x1001}, "base", "aligned"),
        ({"base": 1 << 63}, "base", "reserved"),
        ({"zero": b"\0\0\1"}, "zero", "reserved"),
    ],
)
def test_each_broken_rule_is_named(fields, field, rule):
    problems = tools.validate(Ruled, Ruled.from_bytes(GOOD).replace(**fields).to_bytes())
    assert [(problem.field, problem.rule) for problem in problems] == [(field, rule)]


def test_a_field_without_its_valid_bit_is_not_judged():
    image = bytearray(Ruled.build(mode=1, base=0x1001))
    assert tools.validate(Ruled, bytes(image))
    image[0x10] = 0
    assert tools.validate(Ruled, bytes(image)) == ()


def test_each_mutation_breaks_exactly_one_rule():
    found = list(tools.mutations(Ruled, GOOD))
    assert {(mutation.field, mutation.rule) for mutation in found} == {
        ("mode", "values"),
        ("low", "values"),
        ("high", "reserved"),
        ("base", "valid"),
        ("base", "aligned"),
        ("base", "reserved"),
        ("zero", "reserved"),
    }
    for mutation in found:
        problems = tools.validate(Ruled, mutation.data)
        expected = [] if mutation.rule == "valid" else [(mutation.field, mutation.rule)]
        assert [(problem.field, problem.rule) for problem in problems] == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_strategy_gives_valid_images(layout):
    @given(tools.strategy(layout))
    def valid(data):
        assert len(data) == layout.SIZE
        assert tools.validate(layout, data) == ()

    valid()


def test_differences_are_named_reserved_bytes_too():
    other = bytearray(GOOD)
    other[0] = 2
    other[0x27] = 9
    other[0x10] ^= 1
    found = tools.diff(Ruled, GOOD, bytes(other))
    assert [(difference.field, difference.offset) for difference in found] == [
        ("mode", 0),
        ("valid_bitmap", 0x10),
        ("reserved_20", 0x20),
    ]
    assert (found[0].before, found[0].after) == (1, 2)
    assert tools.diff(Ruled, GOOD, GOOD) == ()


def test_reserved_ranges_are_the_unnamed_bytes():
    assert tools.reserved_ranges(Ruled) == ((0x20, 8),)
    assert tools.reserved_ranges(SysCfg) == ()


def test_json_says_absent_for_a_clear_valid_bit():
    assert tools.to_json(Ruled, bytes(40))["base"] is None
    assert tools.to_json(Ruled, GOOD) == {"mode": 1, "zero": "000000", "low": 7, "high": 0, "base": 0x1000}


def test_the_table_shows_fields_rules_and_sources():
    table = tools.markdown_table(Ruled)
    assert "| 0x000 | 1 | `mode` | how; one of 0x1, 0x2, 0x3 | here, 1 |" in table
    assert "| 0x008 | 8 | `base` | valid bit 1; multiple of 0x1000 |  |" in table
    assert "| 0x018 | [23] | `mem_encryption_mod_en`" not in table
    assert "| [23] | `mem_encryption_mod_en`" in tools.markdown_table(SysCfg)


def test_the_dictionary_holds_legal_values_and_edges():
    tokens = tools.dictionary(Ruled)
    assert b"\x03" in tokens
    assert b"\xff" in tokens
    assert (0x1000).to_bytes(8, "little") in tokens
    assert (0xFFF).to_bytes(8, "little") in tokens
    assert all(tokens.count(token) == 1 for token in tokens)
