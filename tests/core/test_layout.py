from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
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


LAYOUTS = [Sample, VmcbControl, SysCfg, SmeCpuid]


def buffer(data: bytes = bytes(64)) -> CheckedBuffer:
    return CheckedBuffer.of(data, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_bytes_survive_a_round_trip(layout):
    @given(st.binary(min_size=layout.SIZE, max_size=layout.SIZE))
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
