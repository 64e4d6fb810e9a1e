from __future__ import annotations

import pytest
from sevlab.core.caches import CachedMemory
from sevlab.core.memory import Memory

KEY = bytes(range(32))


def cached(*, coherent=False):
    memory = CachedMemory(1 << 20, coherent=coherent)
    return memory, memory.install_key(KEY, "guest")


def test_without_a_flush_the_other_view_reads_the_stale_line():
    memory, key = cached()
    memory.write(0x5000, b"old".ljust(64, b"\0"), None, 1)
    memory.write_back_all()
    assert memory.read(0x5000, 3, None) == b"old"
    memory.write(0x5000, b"new".ljust(64, b"\0"), key, 16)
    assert memory.read(0x5000, 3, None) == b"old"
    memory.write_back_all()
    assert memory.read(0x5000, 3, None) != b"old"
    assert memory.read(0x5000, 3, key) == b"new"


def test_a_late_write_back_destroys_what_the_new_owner_wrote():
    # CVE-2022-0171: dirty encrypted lines written back over the page's next owner.
    memory, key = cached()
    memory.write(0x5000, b"guest".ljust(64, b"\0"), key, 16)
    memory.write(0x5000, b"host".ljust(64, b"\0"), None, 1)
    memory.flush_page(0x5000)
    memory.write(0x5000, b"guest again".ljust(64, b"\0"), key, 16)
    memory.write(0x5000, b"host".ljust(64, b"\0"), None, 1)
    memory.write_back_all()
    assert memory.read(0x5000, 11, key) != b"guest again"


def test_flushing_before_the_switch_is_what_software_must_do():
    memory, key = cached()
    memory.write(0x5000, b"old".ljust(64, b"\0"), None, 1)
    memory.flush_page(0x5FFF)
    memory.write(0x5000, b"new".ljust(64, b"\0"), key, 16)
    memory.flush_page(0x5000)
    assert memory.dirty_lines == 0
    assert memory.read(0x5000, 3, key) == b"new"


def test_invd_loses_what_was_not_written_back():
    # CVE-2023-20592 (CacheWarp): the guest reads an older value than its last write.
    memory, key = cached()
    memory.write(0x5000, b"first".ljust(64, b"\0"), key, 16)
    memory.write_back_all()
    memory.write(0x5000, b"second".ljust(64, b"\0"), key, 16)
    memory.drop_all()
    assert memory.read(0x5000, 5, key) == b"first"


def test_a_coherent_part_needs_no_flush():
    memory, key = cached(coherent=True)
    memory.write(0x5000, b"old".ljust(64, b"\0"), None, 1)
    memory.write(0x5000, b"new".ljust(64, b"\0"), key, 16)
    assert memory.read(0x5000, 3, key) == b"new"
    assert memory.read(0x5000, 3, None) not in (b"old", b"new")
    plain = Memory(1 << 20)
    same = plain.install_key(KEY, "guest")
    plain.write(0x5000, b"new".ljust(64, b"\0"), same, 16)
    assert memory.read(0x5000, 64, None) == plain.read(0x5000, 64, None)


def test_flushing_one_page_leaves_the_others_cached():
    memory, _ = cached()
    memory.write(0x5000, b"a", None, 1)
    memory.write(0x6000, b"b", None, 1)
    memory.flush_page(0x5000)
    assert memory.dirty_lines == 1


def test_tags_travel_with_the_line():
    memory, _ = cached()
    memory.write(0x5004, b"ab", None, 7)
    assert memory.tags(0x5003, 4) == bytes([0, 7, 7, 0])
    memory.write_back_all()
    assert memory.tags(0x5003, 4) == bytes([0, 7, 7, 0])


def test_reset_and_snapshot_include_the_lines():
    memory, key = cached()
    memory.write(0x5000, b"marked", key, 16)
    memory.mark()
    image = memory.capture()
    memory.write(0x5000, b"later!", key, 16)
    memory.reset()
    assert memory.capture() == image
    memory.write_back_all()
    memory.restore(image)
    assert memory.capture() == image
    assert memory.read(0x5000, 6, memory.key(1)) == b"marked"


@pytest.mark.parametrize("spa", [0xF_FFFE, 1 << 40])
def test_past_the_end_reads_ones_and_drops_writes(spa):
    memory, _ = cached()
    memory.write(spa, b"abcd", None, 1)
    assert memory.read(spa, 4, None)[2:] == b"\xff\xff"
