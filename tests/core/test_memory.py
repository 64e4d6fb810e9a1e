from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.buffers import SharedBuffer, SharedFetches, Words
from sevlab.core.caches import CachedMemory
from sevlab.core.crypto import MemoryKey
from sevlab.core.errors import ConfigError
from sevlab.core.memory import TAG_POISON, Memory, guest_tag, split_pages

KEY = bytes(range(32))
OTHER = bytes(range(32, 64))
PAGE = bytes(range(256)) * 16


@pytest.fixture
def memory():
    return Memory(1 << 40)


@pytest.fixture
def key(memory):
    return memory.install_key(KEY, "guest")


@pytest.fixture
def other(memory):
    return memory.install_key(OTHER, "other guest")


def blocks(data: bytes) -> list[bytes]:
    return [data[start : start + 16] for start in range(0, len(data), 16)]


def test_the_owner_reads_what_it_wrote(memory, key):
    memory.write(0x5008, b"secret", key, 16)
    assert memory.read(0x5008, 6, key) == b"secret"


def test_dram_holds_real_aes_xts_with_the_address_as_tweak(memory, key):
    memory.write(0x5000, PAGE, key, 16)
    tweak = (0x5000).to_bytes(16, "little")
    expected = Cipher(algorithms.AES(KEY), modes.XTS(tweak)).encryptor().update(PAGE)
    assert memory.dram(0x5000, 4096) == expected


def test_a_wrong_key_reads_garbage_not_an_error(memory, key, other):
    memory.write(0x5000, PAGE, key, 16)
    seen = memory.read(0x5000, 4096, other)
    assert seen not in (PAGE, memory.dram(0x5000, 4096))


def test_eight_bytes_through_the_wrong_view_spoil_exactly_one_block(memory, key):
    memory.write(0x5000, PAGE, key, 16)
    memory.write(0x5028, b"\xff" * 8, None, 1)
    after = blocks(memory.read(0x5000, 4096, key))
    spoiled = [index for index, (old, new) in enumerate(zip(blocks(PAGE), after, strict=True)) if old != new]
    assert spoiled == [2]


def test_a_write_across_two_blocks_spoils_both(memory, key):
    memory.write(0x5000, PAGE, key, 16)
    memory.write(0x502C, b"\xff" * 8, None, 1)
    after = blocks(memory.read(0x5000, 4096, key))
    assert [i for i, (old, new) in enumerate(zip(blocks(PAGE), after, strict=True)) if old != new] == [2, 3]


def test_ciphertext_moved_to_another_page_is_garbage(memory, key):
    memory.write(0x5000, PAGE, key, 16)
    memory.write(0x9000, memory.dram(0x5000, 4096), None, 1)
    assert memory.read(0x9000, 4096, key) != PAGE


def test_old_ciphertext_replayed_at_its_place_is_the_old_plaintext(memory, key):
    memory.write(0x5000, PAGE, key, 16)
    old = memory.dram(0x5000, 4096)
    memory.write(0x5000, b"new".ljust(4096, b"\0"), key, 16)
    memory.write(0x5000, old, None, 1)
    assert memory.read(0x5000, 4096, key) == PAGE


def test_equal_plaintext_at_one_address_gives_equal_ciphertext(memory, key):
    memory.write(0x5000, PAGE, key, 16)
    first = memory.dram(0x5000, 4096)
    memory.write(0x5000, bytes(4096), key, 16)
    memory.write(0x5000, PAGE, key, 16)
    assert memory.dram(0x5000, 4096) == first


def test_equal_plaintext_at_two_addresses_gives_different_ciphertext(memory, key):
    memory.write(0x5000, PAGE, key, 16)
    memory.write(0x6000, PAGE, key, 16)
    assert memory.dram(0x5000, 4096) != memory.dram(0x6000, 4096)


def test_the_same_bytes_installed_twice_are_the_same_cipher_but_two_keys(memory, key):
    again = memory.install_key(KEY, "guest, later")
    memory.write(0x5000, PAGE, key, 16)
    assert memory.read(0x5000, 4096, again) == PAGE
    assert again.key_id != key.key_id


@pytest.mark.parametrize(("bits", "length"), [(128, 32), (256, 64)])
def test_the_generation_decides_the_key_length(bits, length):
    memory = Memory(1 << 20, key_bits=bits)
    assert memory.install_key(bytes(range(length)), "right").key_id == 1
    with pytest.raises(ConfigError, match=f"expected {length}"):
        memory.install_key(bytes(range(96 - length)), "wrong")


def test_owner_write_and_read_of_a_page_need_no_aes(memory, key, monkeypatch):
    def forbidden(*_):
        raise AssertionError("AES was called")

    monkeypatch.setattr(MemoryKey, "encrypt_page", forbidden)
    monkeypatch.setattr(MemoryKey, "decrypt_page", forbidden)
    memory.write(0x5000, PAGE, key, 16)
    assert memory.read(0x5000, 4096, key) == PAGE


def test_repeated_looks_need_one_aes_call(memory, key, monkeypatch):
    calls = []
    real = MemoryKey.encrypt_page
    monkeypatch.setattr(MemoryKey, "encrypt_page", lambda self, pfn, data: calls.append(pfn) or real(self, pfn, data))
    memory.write(0x5000, PAGE, key, 16)
    for offset in range(0, 4096, 512):
        memory.dram(0x5000 + offset, 512)
    assert calls == [5]


def test_sparse_memory_stores_nothing_until_written(memory):
    assert memory.read(0x80_0000_0000, 16, None) == bytes(16)
    assert not memory.pages


def test_accesses_cross_pages(memory, key):
    memory.write(0x5FFC, b"12345678", key, 16)
    assert memory.read(0x5FFC, 8, key) == b"12345678"
    assert memory.read(0x6000, 4, key) == b"5678"


def test_past_the_end_reads_ones_and_drops_writes():
    memory = Memory(0x2000)
    memory.write(0x1FFE, b"abcd", None, 1)
    assert memory.read(0x1FFE, 4, None) == b"ab\xff\xff"
    assert memory.read(1 << 60, 2, None) == b"\xff\xff"


@pytest.mark.parametrize("size", [0, -4096, 4095, (1 << 52) + 4096])
def test_an_impossible_size_is_refused(size):
    with pytest.raises(ConfigError, match="multiple of 4096"):
        Memory(size)


def test_tags_follow_the_writer_byte_by_byte(memory):
    memory.write(0x5000, bytes(16), None, 1)
    memory.write(0x5004, bytes(4), None, guest_tag(3))
    assert memory.tags(0x4FFF, 18) == bytes([TAG_POISON] + [1] * 4 + [19] * 4 + [1] * 8 + [TAG_POISON])


def test_a_full_page_has_one_tag_again(memory):
    memory.write(0x5000, bytes(16), None, 1)
    memory.write(0x5000, bytes(4096), None, 7)
    assert memory.pages[5].tags is None
    assert set(memory.tags(0x5000, 4096)) == {7}


def test_write_tagged_keeps_each_owner(memory):
    memory.write_tagged(0x5FFE, b"abcd", None, bytes([1, 2, 3, 3]))
    assert memory.tags(0x5FFE, 4) == bytes([1, 2, 3, 3])
    assert memory.read(0x5FFE, 4, None) == b"abcd"


def test_guests_far_apart_share_a_tag():
    assert guest_tag(0) == guest_tag(240)
    assert len({guest_tag(n) for n in range(240)}) == 240


def test_reset_takes_back_pages_keys_and_tags(memory, key):
    memory.write(0x5000, PAGE, key, 16)
    memory.mark()
    before = memory.capture()
    memory.write(0x5000, b"x", None, 1)
    memory.write(0x9000, b"y", memory.install_key(OTHER, "late"), 2)
    assert memory.dirty_pages == 2
    memory.reset()
    assert memory.capture() == before
    assert memory.install_key(OTHER, "late").key_id == 2


def test_restore_takes_over_an_image_and_reset_still_returns_to_the_mark(memory, key):
    memory.write(0x5000, PAGE, key, 16)
    image = memory.capture()
    memory.write(0x5000, bytes(4096), None, 1)
    memory.mark()
    marked = memory.capture()
    memory.restore(image)
    assert memory.capture() == image
    assert memory.read(0x5000, 4096, memory.key(1)) == PAGE
    memory.reset()
    assert memory.capture() == marked


def test_a_restored_page_of_several_owners_may_hold_ciphertext(memory, key):
    memory.write(0x5000, PAGE, key, 16)
    memory.write(0x5000, b"over it", None, 1)
    memory.write(0x6000, PAGE, None, 16)
    memory.restore(memory.capture())
    assert [memory.pages[pfn].mixed for pfn in (5, 6)] == [True, False]


def test_the_slot_is_told_when_a_page_changes_its_key(memory, key):
    told = []
    memory.page_owner_changed = lambda *what: told.append(what)
    memory.write(0x5000, b"a", key, 16)
    memory.write(0x5000, b"b", key, 16)
    memory.write(0x5000, b"c", None, 1)
    assert told == [(5, None, key), (5, key, None)]


def test_split_pages_covers_the_range_in_order():
    assert list(split_pages(0xFFE, 0x1004)) == [(0xFFE, 2), (0x1000, 0x1000), (0x2000, 2)]
    assert list(split_pages(0x1000, 0)) == []


def test_a_deferred_page_is_made_when_somebody_looks_and_only_once():
    memory = Memory(1 << 20)
    key = memory.install_key(bytes(range(32)), "k")
    asked = []

    def source():
        asked.append(1)
        return bytes((len(asked),)) * 4096

    memory.defer(0x5000, key, source, 16)
    assert memory.deferred(0x5000)
    assert not asked
    assert memory.read(0x5000, 2, key) == b"\1\1"
    assert memory.read(0x5000, 4096, None) == key.encrypt_page(5, b"\1" * 4096)
    assert memory.tags(0x5000, 1) == b"\x10"
    assert len(asked) == 1
    assert not memory.deferred(0x5000)


def test_a_captured_page_is_in_the_image_and_stays_deferred():
    memory = Memory(1 << 20)
    key = memory.install_key(bytes(range(32)), "k")
    memory.defer(0x5000, key, lambda: b"a" * 4096, 16)
    assert dict(memory.capture().pages)[5].data == b"a" * 4096
    assert memory.deferred(0x5000)


@pytest.mark.parametrize("look", ["write", "other view"])
def test_a_deferred_page_settles_however_it_is_touched_and_a_reset_defers_it_again(look):
    memory = Memory(1 << 20)
    key = memory.install_key(bytes(range(32)), "k")
    memory.defer(0x5000, key, lambda: b"a" * 4096, 16)
    memory.mark()
    if look == "write":
        memory.write(0x5001, b"b", key, 1)
        assert memory.read(0x5000, 3, key) == b"aba"
    else:
        memory.write(0x5000, bytes(16), None, 1)
        assert memory.read(0x5010, 4, key) == b"aaaa"
    assert not memory.deferred(0x5000)
    memory.reset()
    assert memory.deferred(0x5000)
    memory.defer(0x5000, key, lambda: b"c" * 4096, 16)
    assert memory.read(0x5000, 1, key) == b"c"


@pytest.mark.parametrize("caches", [False, True])
@given(st.integers(0, 3 * 4096), st.integers(0, 3 * 4096), st.booleans(), st.booleans())
def test_handing_over_is_reading_with_one_key_and_writing_with_the_other(caches, spa, length, marked, written):
    memory = CachedMemory(4 * 4096) if caches else Memory(4 * 4096)
    old, new = memory.install_key(bytes(range(32)), "old"), memory.install_key(bytes(range(32, 64)), "new")
    if written:
        memory.write(4096, bytes(range(256)) * 16, old, 9)
    if marked:
        memory.mark()
    before = memory.capture()
    expected = memory.read(spa, length, old)
    seen = bytearray()
    memory.hand_over(spa, length, old, new, 7, seen.extend)
    assert bytes(seen) == expected
    assert memory.read(spa, min(length, 4 * 4096 - spa), new) == expected[: 4 * 4096 - spa]
    if not caches:  # a dirty line of the old view keeps its tags until it is written back
        assert set(memory.tags(spa, min(length, 4 * 4096 - spa))) <= {7}
    if marked:
        memory.reset()
        assert memory.capture() == before


def store(memory: Memory, spa: int, data: bytearray, tag: int, *, by_words: bool) -> None:
    if by_words and len(data) >= 8 and spa + len(data) <= memory.size_bytes:
        page = spa & -4096
        words = Words((None, spa & 4095), ((min(4095, (spa & 4095) + 8), b""),))
        if (spa & 4095) + 8 <= 4096:
            del data[8:]
            window = SharedBuffer(SharedFetches(memory), page, 4096, None, tag)
            window.write_words(words, (None, int.from_bytes(data, "little")))
            return
    memory.write(spa, data, None, tag)


@given(
    st.lists(
        st.tuples(
            st.one_of(st.sampled_from((0, 4096)), st.integers(0, 2 * 4096)),
            st.one_of(st.just(4096), st.integers(0, 4096)),
            st.integers(0, 255),
            st.integers(1, 3),
            st.booleans(),
        ),
        max_size=8,
    ),
    st.integers(0, 8),
)
def test_whole_pages_and_parts_are_stored_as_in_a_plain_array(writes, marked_after):
    """A page given whole is not copied until a part of it changes; neither bytes nor tags may show it."""
    memory = Memory(2 * 4096)
    content, owners, images = bytearray(2 * 4096), bytearray(2 * 4096), []
    marked = (bytes(content), bytes(owners))
    for number, (spa, length, fill, tag, by_words) in enumerate(writes):
        data = bytearray((fill,)) * length
        store(memory, spa, data, tag, by_words=by_words)
        inside = min(len(data), max(0, 2 * 4096 - spa))
        content[spa : spa + inside] = data[:inside]
        owners[spa : spa + inside] = bytes((tag,)) * inside
        data[:] = bytes(len(data))  # the giver goes on with his buffer
        images.append((memory.read(0, 4096, None), bytes(content[:4096])))
        assert (memory.read(0, 2 * 4096, None), memory.tags(0, 2 * 4096)) == (content, owners)
        if number == marked_after:
            memory.mark()
            marked = (bytes(content), bytes(owners))
    assert all(read == then for read, then in images)  # what was read whole does not change later
    memory.reset()
    assert (memory.read(0, 2 * 4096, None), memory.tags(0, 2 * 4096)) == marked


def test_a_token_stays_as_long_as_the_bytes(memory, key):
    assert memory.token(1) is None  # nothing there
    memory.write(0x1000, PAGE, None, 1)
    token = memory.token(1)
    memory.read(0x1000, 8, key)
    assert token is not None
    assert memory.token(1) is token
    memory.mark()
    memory.write(0x1FFF, b"\0", None, 1)
    changed = memory.token(1)
    assert changed is not token
    memory.hand_over(0x1000, 4096, None, key, 9, len)
    assert memory.token(1) not in (token, changed)
    memory.reset()
    assert memory.token(1) is token
    memory.defer(0x1000, key, lambda: PAGE, 1)
    assert memory.token(1) is None
    memory.write(0x2000, PAGE, None, 1)
    memory.lend(2, None, memoryview(bytearray(4096)), 1)
    assert memory.token(2) is None  # the engine's guest writes without saying so
    assert CachedMemory(4096).token(0) is None
