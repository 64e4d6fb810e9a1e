from __future__ import annotations

import pytest
from sevlab.core.buffers import CheckedBuffer, Fetch, RaceWrite, SharedBuffer, SharedFetches, Words
from sevlab.core.errors import InvariantViolation
from sevlab.core.memory import TAG_HYPERVISOR, TAG_POISON, Memory, guest_tag


@pytest.fixture
def fetches():
    return SharedFetches(Memory(1 << 20))


@pytest.fixture
def shared(fetches):
    fetches.memory.write(0x3000, bytes(range(256)) * 16, None, 1)
    return SharedBuffer(fetches, 0x3000, 4096, None, TAG_HYPERVISOR)


@pytest.mark.parametrize(
    "access", [lambda b: b.read(8, 8), lambda b: b.read_uint(8, 8), lambda b: b.write(8, bytes(8))]
)
def test_the_last_byte_is_inside(access):
    access(CheckedBuffer.of(bytes(16), 1))


@pytest.mark.parametrize(
    "access",
    [
        lambda b: b.read(9, 8),
        lambda b: b.read(-1, 1),
        lambda b: b.read(0, -1),
        lambda b: b.read_uint(9, 8),
        lambda b: b.write(9, bytes(8)),
        lambda b: b.write_uint(15, 2, 0),
        lambda b: b.tags(16, 1),
        lambda b: b.load(9, Memory(4096), 0, 8, None),
        lambda b: b.store(9, Memory(4096), 0, 8, None),
    ],
)
def test_one_byte_past_the_end_is_a_violation(access):
    with pytest.raises(InvariantViolation, match=r"buffer\.bounds.*of a buffer of 0x10 bytes"):
        access(CheckedBuffer(16))


def test_a_new_buffer_is_poison():
    buffer = CheckedBuffer(16)
    assert buffer.poisoned(0, 16)


@pytest.mark.parametrize(
    "read",
    [lambda b: b.read(3, 2), lambda b: b.read_uint(6, 4), lambda b: b.store(0, Memory(1 << 20), 0x2000, 16, None)],
)
def test_what_was_never_written_is_not_read(read):
    buffer = CheckedBuffer(16)
    buffer.write(4, bytes(4))
    assert buffer.read(4, 4) == bytes(4)
    with pytest.raises(InvariantViolation, match=r"buffer\.poison.*never written"):
        read(buffer)


def test_written_bytes_are_not_poison_and_have_an_owner():
    buffer = CheckedBuffer(16)
    buffer.write(4, b"ab", guest_tag(0))
    assert not buffer.poisoned(4, 2)
    assert buffer.poisoned(3, 2)
    assert buffer.tags(3, 4) == bytes([TAG_POISON, 16, 16, TAG_POISON])


def test_a_copy_carries_the_owner_along():
    memory = Memory(1 << 20)
    memory.write(0x1000, b"secret", None, guest_tag(5))
    buffer = CheckedBuffer(16)
    buffer.load(2, memory, 0x1000, 6, None)
    buffer.store(2, memory, 0x2002, 6, None)
    assert memory.tags(0x2000, 9) == bytes([0, 0] + [21] * 6 + [0])


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_numbers_are_little_endian(width):
    buffer = CheckedBuffer.of(bytes(range(1, 9)), 1)
    assert buffer.read_uint(0, width) == int.from_bytes(bytes(range(1, width + 1)), "little")


def test_each_read_of_shared_memory_is_one_fetch(shared, fetches):
    shared.read_uint(0, 8)
    shared.read(8, 100)
    assert fetches.count == 2


def test_shared_numbers_across_a_page_are_right(fetches):
    fetches.memory.write(0x4FFC, b"12345678", None, 1)
    window = SharedBuffer(fetches, 0x4FFC, 8, None, 1)
    assert window.read_uint(0, 8) == int.from_bytes(b"12345678", "little")


@pytest.mark.parametrize(
    "access", [lambda b: b.read(4089, 8), lambda b: b.read_uint(4089, 8), lambda b: b.write(4095, b"ab")]
)
def test_a_shared_window_is_bounded(shared, access):
    with pytest.raises(InvariantViolation, match=r"buffer\.bounds"):
        access(shared)


def test_a_race_happens_just_before_its_fetch(shared, fetches):
    fetches.arm(RaceWrite(2, 0x3000, b"\xee", TAG_HYPERVISOR, None))
    assert [shared.read_uint(0, 1) for _ in range(3)] == [0, 0xEE, 0xEE]


def test_a_race_that_nobody_reached_is_dropped(shared, fetches):
    fetches.arm(RaceWrite(2, 0x3000, b"\xee", TAG_HYPERVISOR, None))
    shared.read_uint(0, 1)
    fetches.end()
    fetches.begin()
    assert [shared.read_uint(0, 1) for _ in range(3)] == [0, 0, 0]


def test_the_log_names_every_fetch(shared, fetches):
    fetches.keep_log(keep=True)
    shared.read_uint(0x10, 4)
    shared.read(0x20, 3)
    assert fetches.log == [Fetch(1, 0x3010, 4, 0x3000), Fetch(2, 0x3020, 3, 0x3000)]
    fetches.keep_log(keep=False)
    shared.read_uint(0, 1)
    assert fetches.log is None


def test_a_window_shows_ciphertext_of_a_private_page(fetches):
    key = fetches.memory.install_key(bytes(range(32)), "guest")
    fetches.memory.write(0x3000, b"private".ljust(4096, b"\0"), key, 16)
    assert SharedBuffer(fetches, 12288, 4096, None, 1).read(0, 7) != b"private"
    assert SharedBuffer(fetches, 0x3000, 4096, key, 1).read_uint(0, 1) == ord("p")


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("spa", [0x3000, 0x3800])
def test_words_are_written_as_single_writes_are(spa, uniform):
    words = Words((0x20, 0, 8, 0xFF0), ((0x101, b"abc"), (0xFF8, b"z" * 8)))
    numbers = (1, 2**64 - 1, 3, 4)
    singly = [(0x20, 1), (0, 2**64 - 1), (8, 3), (0xFF0, 4)]
    contents = []
    for at_once in (True, False):
        memory = Memory(1 << 20)
        memory.write(0x3000, bytes(8192), None, guest_tag(0))
        if not uniform:
            memory.write(0x3004, b"other", None, guest_tag(1))
        before = memory.read(0x3000, 8192, None), memory.tags(0x3000, 8192)
        memory.mark()
        window = SharedBuffer(SharedFetches(memory), spa, 4096, None, TAG_HYPERVISOR)
        if at_once:
            window.write_words(words, tuple(numbers))
        else:
            for offset, value in singly:
                window.write_uint(offset, 8, value)
            window.write(0x101, b"abc")
            window.write(0xFF8, b"z" * 8)
        contents.append((memory.read(0x3000, 8192, None), memory.tags(0x3000, 8192)))
        memory.reset()
        assert (memory.read(0x3000, 8192, None), memory.tags(0x3000, 8192)) == before
    assert contents[0] == contents[1] != before


@pytest.mark.parametrize("words", [Words((4096,)), Words((4089,)), Words((0,), ((4090, b"seven.."),))])
def test_words_outside_are_a_violation_and_nothing_is_written(shared, words):
    before = shared.read(0, 4096)
    with pytest.raises(InvariantViolation, match="buffer"):
        shared.write_words(words, (7,))
    assert shared.read(0, 4096) == before


def test_words_begin_in_the_window():
    with pytest.raises(ValueError, match="before 0"):
        Words((-8,))
