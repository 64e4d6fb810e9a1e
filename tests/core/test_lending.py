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


def marked(memory: Memory, content: bytes = b"before") -> tuple[memoryview, object]:
    """Page 3, lent to an engine under a key and marked."""
    key = memory.install_key(bytes(range(32)), "guest")
    memory.write(0x3000, content, key, guest_tag(0))
    place = room()
    memory.lend(3, key, place, guest_tag(0))
    memory.mark(keep_lent=True)
    return place, key


def test_a_mark_can_leave_pages_lent_and_a_reset_puts_them_back_in_place(memory):
    place, key = marked(memory)
    before = memory.capture()
    for _ in range(2):
        memory.touch(3)
        place[:5] = b"after"
        assert memory.read(0x3000, 6, key) == b"aftere"
        memory.reset()
        assert bytes(place[:6]) == b"before"
        assert memory.capture() == before
    assert memory.lent == {3}
    assert set(memory.written()) == {3}


def test_the_models_own_store_to_a_page_that_stayed_lent_is_taken_back(memory):
    place, key = marked(memory)
    memory.write(0x3002, b"TE", key, TAG_HYPERVISOR)
    assert bytes(place[:6]) == b"beTEre"
    memory.reset()
    assert bytes(place[:6]) == b"before"
    assert memory.tags(0x3000, 6) == bytes((guest_tag(0),)) * 6


def test_a_page_that_changed_hands_comes_back_under_its_key(memory):
    place, key = marked(memory)
    told = []
    memory.recalled = told.append
    memory.touch(3)
    place[:5] = b"after"
    memory.write(0x3000, b"x", None, TAG_HYPERVISOR)
    assert told == [3]
    memory.reset()
    assert memory.read(0x3000, 6, key) == b"before"
    assert not memory.written()
    other = room()
    memory.lend(3, key, other, guest_tag(0))
    memory.touch(3)
    other[0] = 0
    memory.reset()
    assert bytes(other[:6]) == b"before"


def test_a_page_lent_after_the_mark_is_put_back_too(memory):
    _, key = marked(memory)
    memory.write(0x5000, b"fresh", key, guest_tag(0))
    place = room()
    memory.lend(5, key, place, guest_tag(0))
    memory.touch(5)
    memory.reset()
    assert memory.read(0x5000, 5, None) == bytes(5)
    assert 5 not in memory.lent


def test_an_ordinary_mark_takes_pages_back_again(memory):
    place, key = marked(memory)
    memory.mark()
    assert memory.lent == set()
    place[:5] = b"after"
    assert memory.read(0x3000, 6, key) == b"before"
