from __future__ import annotations

from enum import Enum, IntEnum
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core import layout_tools
from sevlab.core.buffers import CheckedBuffer
from sevlab.core.cpu import VmcbControl
from sevlab.core.errors import InvariantViolation, LayoutError
from sevlab.core.layout import Layout, array, bits, flag, raw_bytes, u8, u16, u32, u64
from sevlab.core.testing import assert_offsets
from sevlab.plugins.sme import SmeCpuid, SysCfg


class Sample(Layout, size=64, valid_bitmap=0x30):
    """One field of each kind."""

    small = u8(0x00)
    word = u16(0x02, values=(1, 2))
    network = u32(0x04, big_endian=True)
    address = u64(0x08, aligned=4096, valid_bit=True)
    version_two = u32(0x10, since=2)
    low = bits(0x14, u32, 3, 0, values=range(8))
    top = flag(0x14, u32, 31)
    numbers = array(0x18, 2, u16)
    name = raw_bytes(0x20, 8)
    quad = u64(0x28, valid_bit=True)


class Ghcb(Layout, size=4096, valid_bitmap=0x3F0):
    """GHCB page, every named field. Source: 56421, GHCB layout."""

    cpl = u8(0x0CB, valid_bit=True, values=range(4))
    xss = u64(0x140, valid_bit=True)
    dr7 = u64(0x160, valid_bit=True)
    rip = u64(0x178, valid_bit=True)
    rsp = u64(0x1D8, valid_bit=True)
    rax = u64(0x1F8, valid_bit=True)
    rcx = u64(0x308, valid_bit=True)
    rdx = u64(0x310, valid_bit=True)
    rbx = u64(0x318, valid_bit=True)
    rbp = u64(0x328, valid_bit=True)
    rsi = u64(0x330, valid_bit=True)
    rdi = u64(0x338, valid_bit=True)
    r8 = u64(0x340, valid_bit=True)
    r9 = u64(0x348, valid_bit=True)
    r10 = u64(0x350, valid_bit=True)
    r11 = u64(0x358, valid_bit=True)
    r12 = u64(0x360, valid_bit=True)
    r13 = u64(0x368, valid_bit=True)
    r14 = u64(0x370, valid_bit=True)
    r15 = u64(0x378, valid_bit=True)
    sw_exit_code = u64(0x390, valid_bit=True)
    sw_exit_info_1 = u64(0x398, valid_bit=True)
    sw_exit_info_2 = u64(0x3A0, valid_bit=True)
    sw_scratch = u64(0x3A8, valid_bit=True)
    xcr0 = u64(0x3E8, valid_bit=True)
    valid_bitmap = raw_bytes(0x3F0, 16)
    x87_state_gpa = u64(0x400)
    shared_buffer = raw_bytes(0x800, 0x7F0)
    protocol_version = u16(0xFFA, since=1)
    ghcb_usage = u32(0xFFC)


LAYOUTS = [Sample, Ghcb, VmcbControl, SysCfg, SmeCpuid]
GHCB_VALID_BITS = {
    "cpl": 25, "xss": 40, "dr7": 44, "rip": 47, "rsp": 59, "rax": 63, "rcx": 97, "rdx": 98, "rbx": 99, "rbp": 101,
    "rsi": 102, "rdi": 103, "r8": 104, "r9": 105, "r10": 106, "r11": 107, "r12": 108, "r13": 109, "r14": 110,
    "r15": 111, "sw_exit_code": 114, "sw_exit_info_1": 115, "sw_exit_info_2": 116, "sw_scratch": 117, "xcr0": 125,
}  # fmt: skip
"""Bit numbers typed from the document, not computed from the offsets. Source: 56421, GHCB layout."""


def images(layout):
    """Any bytes of the layout's size; a large image comes from a seed, since Hypothesis draws no pages."""
    if layout.SIZE <= 0x400:
        return st.binary(min_size=layout.SIZE, max_size=layout.SIZE)
    return st.integers(0, 1 << 64).map(lambda seed: Random(seed).randbytes(layout.SIZE))


def buffer(data: bytes = bytes(64)) -> CheckedBuffer:
    return CheckedBuffer.of(data, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_bytes_survive_a_round_trip(layout):
    @given(images(layout))
    def round_trip(data):
        assert layout.from_bytes(data).to_bytes() == data
        assert layout.snapshot(CheckedBuffer.of(data, 1)).to_bytes() == data

    round_trip()


@given(st.binary(min_size=64, max_size=64))
def test_a_window_and_a_snapshot_read_the_same(data):
    window, snapshot = Sample(buffer(data)), Sample.from_bytes(data)
    for name in Sample.FIELDS:
        assert window.is_valid(name) == snapshot.is_valid(name)
        if window.is_valid(name):
            assert getattr(window, name) == getattr(snapshot, name)
        if name in ("address", "quad"):
            assert window.value_or_zero(name) == snapshot.value_or_zero(name)


def test_offsets_of_the_vmcb_are_those_of_the_manual():
    # 24593, appendix B, table B-1, typed from the document.
    expected = {
        "iopm_base_pa": (0x040, 8),
        "msrpm_base_pa": (0x048, 8),
        "tsc_offset": (0x050, 8),
        "guest_asid": (0x058, 4),
        "exit_code": (0x070, 8),
        "exit_info_1": (0x078, 8),
        "exit_info_2": (0x080, 8),
        "exit_int_info": (0x088, 8),
        "encryption_control": (0x090, 8),
        "ghcb_gpa": (0x0A0, 8),
        "event_inj": (0x0A8, 8),
        "nested_cr3": (0x0B0, 8),
        "next_rip": (0x0C8, 8),
        "insn_length": (0x0D0, 1),
        "insn_bytes": (0x0D1, 15),
        "vmsa_pa": (0x108, 8),
        "allowed_sev_features": (0x138, 8),
    }
    assert_offsets(VmcbControl, expected, 0x400)


def test_values_are_decoded_by_kind():
    data = Sample.build(
        small=7, word=0x1234, network=0x01020304, low=5, top=1, numbers=(1, 0xFFFF), name=b"abcdefgh", quad=9
    )
    item = Sample.from_bytes(data)
    assert (item.small, item.word, item.network, item.low, item.top) == (7, 0x1234, 0x01020304, 5, 1)
    assert (item.numbers, item.name, item.quad) == ((1, 0xFFFF), b"abcdefgh", 9)
    assert data[4:8] == bytes([1, 2, 3, 4])
    assert data[0x14:0x18] == bytes([5, 0, 0, 0x80])


def test_building_a_field_sets_its_valid_bit():
    data = Sample.build(quad=0)
    assert data[0x30] == 1 << 5
    assert Sample.from_bytes(data).is_valid("quad")
    assert not Sample.from_bytes(data).is_valid("address")


def test_reading_without_the_valid_bit_is_a_violation():
    for item in (Sample.from_bytes(bytes(64)), Sample(buffer())):
        with pytest.raises(InvariantViolation, match=r"Sample\.quad is read although"):
            _ = item.quad
        assert item.value_or_zero("quad") == 0


def test_writing_through_a_window_sets_the_valid_bit():
    window = Sample(buffer())
    window.quad = 5
    assert window.is_valid("quad")
    assert window.quad == 5
    window.clear_valid()
    assert not window.is_valid("quad")


def test_writing_bits_keeps_their_neighbours():
    window = Sample(buffer(b"\xff" * 64))
    window.low = 2
    assert (window.low, window.top) == (2, 1)
    window.top = 0
    assert window.buffer.read(0x14, 4) == bytes([0xF2, 0xFF, 0xFF, 0x7F])


def test_a_window_reads_exactly_once_an_access():
    class Counting(CheckedBuffer):
        __slots__ = ("reads",)

        def read_uint(self, offset, width_bytes):
            self.reads = getattr(self, "reads", 0) + 1
            return super().read_uint(offset, width_bytes)

    counting = Counting(64)
    counting.write(0, bytes(64))
    window = Sample(counting)
    _ = window.small
    assert counting.reads == 1
    _ = window.low
    assert counting.reads == 2


@pytest.mark.parametrize(("version", "expected"), [(None, 3), (2, 3), (3, 3), (1, None)])
def test_a_field_that_the_version_does_not_define_is_absent_not_zero(version, expected):
    assert Sample.from_bytes(Sample.build(version_two=3), version=version).version_two == expected


def test_snapshots_are_immutable_values():
    item = Sample.from_bytes(Sample.build(small=1))
    with pytest.raises(AttributeError, match=r"immutable; use replace\(small"):
        item.small = 2
    with pytest.raises(AttributeError, match="immutable"):
        del item.small
    assert item == Sample.from_bytes(Sample.build(small=1))
    assert item != item.replace(small=2)
    assert len({item, item.replace(small=1)}) == 1
    assert repr(item) == "Sample(small=0x1)"


def test_replace_keeps_every_other_byte():
    data = bytes(range(64))
    changed = Sample.from_bytes(data).replace(word=0xAAAA).to_bytes()
    assert changed[:2] + changed[4:] == data[:2] + data[4:]
    assert changed[2:4] == b"\xaa\xaa"


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no field 'nonsense'"):
        _ = Sample.from_bytes(bytes(64)).nonsense


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"small": 256}, "from 0 to 0xff"),
        ({"small": -1}, "from 0 to 0xff"),
        ({"low": 16}, "from 0 to 0xf"),
        ({"name": b"short"}, "expected 8 bytes"),
        ({"numbers": (1,)}, "expected 2 numbers"),
        ({"network": 1 << 32}, "from 0 to 0xffffffff"),
        ({"nonsense": 1}, "has no field 'nonsense'"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(LayoutError, match=message):
        Sample.build(**fields)


@pytest.mark.parametrize("length", [0, 63, 65])
def test_another_length_is_refused(length):
    with pytest.raises(LayoutError, match=f"{length} bytes, expected 64"):
        Sample.from_bytes(bytes(length))


def test_a_buffer_that_is_too_small_is_refused():
    with pytest.raises(LayoutError, match="expected 64"):
        Sample(CheckedBuffer(63))


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({"a": lambda: u64(0), "b": lambda: u8(7)}, 8, "b at 0x7: overlaps a"),
        ({"a": lambda: u64(1)}, 8, "reach past the size"),
        ({"a": lambda: bits(0, u8, 3, 0), "b": lambda: bits(0, u8, 4, 3)}, 8, "overlaps a"),
        ({"a": lambda: bits(0, u8, 8, 0)}, 8, "bits 8:0 of a 1-byte word"),
        ({"a": lambda: u8(0, valid_bit=True)}, 8, "has no valid_bitmap"),
        ({"a": lambda: u8(0, reserved=0x100)}, 8, "wider than the field"),
        ({"a": lambda: raw_bytes(0, 0)}, 8, "must be positive"),
        ({}, None, "give the size"),
    ],
)
def test_a_wrong_declaration_is_refused(fields, size, message):
    keywords = {} if size is None else {"size": size}
    with pytest.raises(LayoutError, match=message):
        type("Wrong", (Layout,), {name: make() for name, make in fields.items()}, **keywords)


def test_the_last_byte_may_be_used_and_neighbouring_bits_too():
    class Tight(Layout, size=8):
        high = bits(0, u8, 7, 4)
        low = bits(0, u8, 3, 0)
        last = u8(7)

    assert Tight.build(high=0xA, low=5, last=1) == bytes([0xA5, 0, 0, 0, 0, 0, 0, 1])


@pytest.mark.parametrize(("name", "number"), GHCB_VALID_BITS.items())
def test_building_a_ghcb_field_sets_the_documents_valid_bit(name, number):
    bitmap = int.from_bytes(Ghcb.build(**{name: 1})[0x3F0:0x400], "little")
    assert bitmap == 1 << number


def test_every_ghcb_field_with_a_valid_bit_is_in_the_documents_list():
    assert {name for name, info in Ghcb.FIELDS.items() if info.valid_bit} == set(GHCB_VALID_BITS)


def test_a_misspelt_field_on_a_window_is_refused_not_lost():
    with pytest.raises(AttributeError, match="smal"):
        Sample(buffer()).smal = 1


class Mode(IntEnum):
    OFF = 0
    ON = 2


class ByEnumeration(Layout, size=2):
    mode = u8(0, values=Mode)
    partial = bits(1, u8, 3, 0, values=Mode)


@pytest.mark.parametrize(("value", "problems"), [(0, 0), (2, 0), (1, 1), (3, 1)])
def test_legal_values_may_be_an_enumeration(value, problems):
    for name in ("mode", "partial"):
        found = layout_tools.validate(ByEnumeration, ByEnumeration.build(**{name: value}))
        assert [(problem.field, problem.rule) for problem in found] == [(name, "values")] * problems


def test_every_tool_takes_an_enumeration():
    data = ByEnumeration.build(mode=Mode.ON)
    assert {(mutation.field, mutation.rule) for mutation in layout_tools.mutations(ByEnumeration, data)} == {
        ("mode", "values"),
        ("partial", "values"),
    }
    assert b"\x02" in layout_tools.dictionary(ByEnumeration)
    assert "one of 0x0, 0x2" in layout_tools.markdown_table(ByEnumeration)


def test_an_enumeration_without_numbers_is_refused():
    words = Enum("Words", {"A": "a"})
    with pytest.raises(LayoutError, match=r"Wrong\.a at 0x0: values=Words, expected an enumeration of numbers"):
        type("Wrong", (Layout,), {"a": u8(0, values=words)}, size=1)


def test_the_bitmap_may_be_named_but_not_overlapped():
    class Named(Layout, size=24, valid_bitmap=8):
        bitmap = raw_bytes(8, 16)

    assert Named.build(bitmap=b"\1" * 16)[8:] == b"\1" * 16
    for field in (u8(7 + 16), u64(8), raw_bytes(8, 15), raw_bytes(7, 16)):
        with pytest.raises(LayoutError, match="overlaps the valid bitmap at 0x8"):
            type("Wrong", (Layout,), {"a": field}, size=24, valid_bitmap=8)


@pytest.mark.parametrize(("bitmap", "legal"), [(-1, False), (0, True), (8, True), (9, False)])
def test_the_bitmap_lies_in_the_structure(bitmap, legal):
    if legal:
        fits = type("Fits", (Layout,), {}, size=24, valid_bitmap=bitmap)
        assert bitmap == fits.VALID_BITMAP
        return
    with pytest.raises(LayoutError, match="valid bitmap at"):
        type("Wrong", (Layout,), {}, size=24, valid_bitmap=bitmap)


@pytest.mark.parametrize(("offset", "legal"), [(0x3F8, True), (0x400, False)])
def test_a_valid_bit_exists_for_the_first_128_qwords_only(offset, legal):
    declare = lambda: type("Page", (Layout,), {"a": u64(offset, valid_bit=True)}, size=4096, valid_bitmap=0x800)
    if legal:
        assert declare().build(a=1)[0x80F] == 0x80
    else:
        with pytest.raises(LayoutError, match="no valid_bitmap that covers it"):
            declare()


@pytest.mark.parametrize(("alignment", "legal"), [(1, True), (4096, True), (0, False), (3, False), (-2, False)])
def test_an_alignment_is_a_power_of_two(alignment, legal):
    declare = lambda: type("Aligned", (Layout,), {"a": u64(0, aligned=alignment)}, size=8)
    if legal:
        assert declare().FIELDS["a"].aligned == alignment
    else:
        with pytest.raises(LayoutError, match=r"a at 0x0: alignment of -?\d bytes, expected a power of two"):
            declare()


@pytest.mark.parametrize("name", ["buffer", "raw", "build", "SIZE"])
def test_a_field_may_not_hide_what_every_layout_has(name):
    with pytest.raises(LayoutError, match=f"every layout has an attribute '{name}'"):
        type("Wrong", (Layout,), {name: u8(0)}, size=1)


@pytest.mark.parametrize(("size", "legal"), [(1, True), (0, False), (-1, False)])
def test_a_layout_has_at_least_one_byte(size, legal):
    if legal:
        assert type("Small", (Layout,), {}, size=size).build() == bytes(1)
        return
    with pytest.raises(LayoutError, match="expected at least 1"):
        type("Wrong", (Layout,), {}, size=size)


def test_fields_are_not_inherited():
    with pytest.raises(LayoutError, match="does not inherit the fields"):
        type("Derived", (Sample,), {}, size=64)


def test_an_overlap_names_the_field_whose_bits_are_taken():
    fields = {"low": bits(0, u8, 3, 0), "high": bits(0, u8, 7, 4), "late": bits(0, u8, 5, 5)}
    with pytest.raises(LayoutError, match="late at 0x0: overlaps high"):
        type("Wrong", (Layout,), fields, size=1)


@pytest.mark.parametrize("value", [None, 5, ("a", "b"), (1,), (1, 2, 3), (1, 0x10000), (-1, 0)])
def test_an_array_takes_exactly_its_numbers(value):
    assert Sample.build(numbers=(0, 0xFFFF))[0x18:0x1C] == b"\0\0\xff\xff"
    with pytest.raises(LayoutError, match=r"Sample\.numbers"):
        Sample.build(numbers=value)


class Wide(Layout, size=0x400, valid_bitmap=0x3F0):
    """Three fields with valid bits."""

    a = u64(0x00, valid_bit=True)
    b = u64(0x08, valid_bit=True)
    c = u64(0x10, valid_bit=True)


def test_a_decoder_reads_only_what_was_asked_for():
    decode = Wide.decoder("a", or_zero=("b",))
    item = decode(Wide.build(a=1, c=3))
    assert (item.a, item.b) == (1, 0)
    with pytest.raises(InvariantViolation, match=r"layout\.undeclared"):
        _ = item.c
    with pytest.raises(InvariantViolation, match=r"layout\.valid-bit"):
        _ = decode(Wide.build(b=2)).a
    assert decode(Wide.build(b=2)).b == 2
    with pytest.raises(LayoutError, match="no field 'd'"):
        Wide.decoder("d")


def test_patch_changes_only_the_named_fields():
    class Pair(Layout, size=8):
        first = u32(0)
        second = u32(4)

    assert Pair.patch(b"\1\2\3\4\5\6\7\x08", second=9) == b"\1\2\3\4\x09\0\0\0"
    with pytest.raises(LayoutError, match="7 bytes, expected 8"):
        Pair.patch(bytes(7), first=1)
