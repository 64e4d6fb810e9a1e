from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.errors import CampaignError
from sevlab.core.events import AspCommand, MemoryWrite, SetRegisters
from sevlab.core.testing import make_machine, step_strategy
from sevlab.core.vocabulary import spec_of
from sevlab.fuzz.codec import MAX_BYTES, MAX_STEPS, Codec, Reader, put_bytes

VOCABULARY = make_machine("xen", "snp").vocabulary
KINDS = [kind for kind, record in sorted(VOCABULARY.kinds.items()) if spec_of(record).is_step]
CODEC = Codec(VOCABULARY, KINDS, words=("virq", "gsi"))


@given(st.binary(max_size=400))
def test_any_bytes_are_steps_and_what_they_encode_to_is_the_same_steps(data):
    steps = CODEC.decode(data)
    assert bool(steps) == bool(data)
    assert len(steps) <= MAX_STEPS
    assert CODEC.decode(CODEC.encode(steps)) == steps


@given(st.lists(step_strategy(VOCABULARY), max_size=8))
def test_any_steps_survive_encoding(steps):
    steps = [step for step in steps if type(step).SPEC.kind in KINDS]
    assert CODEC.decode(CODEC.encode(steps)) == tuple(steps)


@given(st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=40)), max_size=20))
def test_bytes_with_holes_survive(pieces):
    data = b"".join(bytes(gap) + piece for gap, piece in pieces)
    out = bytearray()
    put_bytes(out, data)
    reader = Reader(bytes(out))
    assert reader.sparse() == data
    assert not reader.left


def test_a_page_with_two_words_is_short_and_a_full_page_is_kept():
    page = bytes(0x390) + b"\x72" + bytes(0xC6F)
    step = MemoryWrite(1, 0, 0, 0x1000, False, page)
    assert len(CODEC.encode([step])) < 24
    full = MemoryWrite(1, 0, 0, 0x1000, False, bytes(range(1, 255)) * 100)
    assert CODEC.decode(CODEC.encode([full])) == (full,)


def test_every_kind_of_step_can_be_reached():
    assert {spec_of(CODEC.decode(bytes([kind]))[0]).kind for kind in range(256)} == set(KINDS)


def test_what_no_bytes_decode_to_is_refused():
    step = AspCommand("sev", 1, 0, b"")
    with pytest.raises(CampaignError, match="at most 64"):
        CODEC.encode([step] * (MAX_STEPS + 1))
    with pytest.raises(CampaignError, match=f"at most {MAX_BYTES}"):
        CODEC.encode([step._replace(buffer=bytes(MAX_BYTES + 1))])
    assert not CODEC.accepts(SetRegisters(0, (("rax", 1 << 64),)))
    assert not Codec(VOCABULARY, ["race"]).accepts(step)
    with pytest.raises(CampaignError, match="no step of kind 'frob'"):
        Codec(VOCABULARY, ["frob"])
