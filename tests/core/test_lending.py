"""Pages that an engine executes on: one copy of the bytes, in the engine's room, until somebody takes it back."""

from __future__ import annotations

import pytest
from sevlab.core.memory import TAG_HYPERVISOR, TAG_PUBLIC, Memory, guest_tag

PAGE = 4096


@pytest.fixture
def memory() -> Memory:
    return Memory(1 << 20)


def room() -> memoryview:
    return memoryview(bytearray(PAGE))


def test_what_the_engine_stores_is_what_the_model_reads_and_the_other_way_round(memory):
    key = memory.install_key(bytes(range(32)), "guest")
    memory.write(0x3000, b"before", key, guest_tag(0))
    place = room()
    assert not memory.lend(3, key, place, guest_tag(0))
    assert bytes(place[:6]) == b"before"
    place[:5] = b"after"
    assert memory.read(0x3000, 6, key) == b"aftere"
    memory.write(0x3002, b"TE", key, guest_tag(0))
    assert bytes(place[:6]) == b"afTEre"


def test_another_keys_reader_sees_the_present_ciphertext_each_time(memory):
    key = memory.install_key(bytes(range(32)), "guest")
    place = room()
    memory.lend(3, key, place, guest_tag(0))
    first = memory.dram(0x3000, 16)
    place[0] ^= 1
    assert memory.dram(0x3000, 16) != first
    assert memory.lent == {3}


def test_a_store_with_another_key_takes_the_page_back_and_says_so_first(memory):
    key = memory.install_key(bytes(range(32)), "guest")
    place, told = room(), []
    memory.lend(3, key, place, guest_tag(0))
    place[64:70] = b"secret"
    memory.recalled = told.append
    memory.write(0x3000, b"x", None, TAG_HYPERVISOR)
    assert told == [3]
    assert memory.lent == set()
    assert memory.read(0x3040, 6, key) == b"secret"


def test_lending_under_another_key_changes_hands_and_tags(memory):
    key = memory.install_key(bytes(range(32)), "guest")
    memory.write(0x3000, b"plain", key, guest_tag(0))
    assert memory.lend(3, None, room(), TAG_PUBLIC)
    assert memory.tags(0x3000, 5) == bytes((TAG_PUBLIC,)) * 5
    assert memory.lend(3, key, room(), guest_tag(0))
    assert memory.read(0x3000, 5, key) == b"plain"


@pytest.mark.parametrize("back", ["mark", "reset", "restore"])
def test_marks_resets_and_snapshots_have_no_lent_pages(memory, back):
    place = room()
    memory.write(0x3000, b"old", None, TAG_PUBLIC)
    image = memory.capture()
    memory.mark()
    memory.lend(3, None, place, TAG_PUBLIC)
    place[:3] = b"new"
    if back == "restore":
        memory.restore(image)
    else:
        getattr(memory, back)()
    assert memory.lent == set()
    assert memory.read(0x3000, 3, None) == (b"new" if back == "mark" else b"old")
    place[:3] = b"xxx"
    assert memory.read(0x3000, 3, None) == (b"new" if back == "mark" else b"old")
