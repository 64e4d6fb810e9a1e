"""Encrypted memory against a naive model: DRAM as ciphertext, each 16-byte block with XTS made from AES-ECB."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from sevlab.core.caches import CachedMemory
from sevlab.core.memory import Memory

PAGES = 3


class NaiveKey:
    def __init__(self, xts_key: bytes) -> None:
        half = len(xts_key) // 2
        self.data = Cipher(algorithms.AES(xts_key[:half]), modes.ECB())
        self.tweak = Cipher(algorithms.AES(xts_key[half:]), modes.ECB())

    def mask(self, block: int) -> bytes:
        pfn, index = divmod(block, 256)
        value = int.from_bytes(self.tweak.encryptor().update((pfn << 12).to_bytes(16, "little")), "little")
        for _ in range(index):
            value = value << 1 ^ (0x87 if value >> 127 else 0)
            value &= (1 << 128) - 1
        return value.to_bytes(16, "little")

    def encrypt(self, block: int, data: bytes) -> bytes:
        mask = self.mask(block)
        return xor(self.data.encryptor().update(xor(data, mask)), mask)

    def decrypt(self, block: int, data: bytes) -> bytes:
        mask = self.mask(block)
        return xor(self.data.decryptor().update(xor(data, mask)), mask)


def xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))


class MemoryAgainstBlocks(RuleBasedStateMachine):
    """Reads, writes, new keys, moves of ciphertext, marks and resets."""

    make = Memory

    @initialize()
    def begin(self):
        self.memory = type(self).make(PAGES * 4096)
        self.dram: dict[int, bytes] = {}
        self.keys: list[tuple[object, NaiveKey | None]] = [(None, None)]
        self.saved = {}
        self.add_key(1)
        self.mark()

    def view(self, block: int, naive: NaiveKey | None) -> bytes:
        cipher = self.dram.get(block, bytes(16))
        return cipher if naive is None else naive.decrypt(block, cipher)

    def synchronise(self):
        """What caches do at once when nobody models them."""

    @rule(number=st.integers(1, 200))
    def add_key(self, number):
        if len(self.keys) < 4:
            xts_key = bytes((number + n) & 0xFF for n in range(32))
            self.keys.append((self.memory.install_key(xts_key, f"key {number}"), NaiveKey(xts_key)))

    @rule(which=st.integers(0, 3), spa=st.integers(0, PAGES * 4096 - 1), data=st.binary(min_size=1, max_size=40))
    def write(self, which, spa, data):
        key, naive = self.keys[which % len(self.keys)]
        data = data[: PAGES * 4096 - spa]
        self.memory.write(spa, data, key, 1)
        self.synchronise()
        for offset, byte in enumerate(data):
            block, inside = divmod(spa + offset, 16)
            plain = bytearray(self.view(block, naive))
            plain[inside] = byte
            self.dram[block] = bytes(plain) if naive is None else naive.encrypt(block, bytes(plain))

    @rule(which=st.integers(0, 3), page=st.integers(0, PAGES - 1), fill=st.integers(0, 255))
    def write_page(self, which, page, fill):
        key, naive = self.keys[which % len(self.keys)]
        self.memory.write(page * 4096, bytes([fill]) * 4096, key, 2)
        self.synchronise()
        for block in range(page * 256, page * 256 + 256):
            plain = bytes([fill]) * 16
            self.dram[block] = plain if naive is None else naive.encrypt(block, plain)

    @rule(which=st.integers(0, 3), spa=st.integers(0, PAGES * 4096 - 1), length=st.integers(1, 48))
    def read(self, which, spa, length):
        key, naive = self.keys[which % len(self.keys)]
        length = min(length, PAGES * 4096 - spa)
        first, last = spa // 16, (spa + length - 1) // 16
        seen = b"".join(self.view(block, naive) for block in range(first, last + 1))
        assert self.memory.read(spa, length, key) == seen[spa - first * 16 :][:length]
        self.synchronise()

    @rule(source=st.integers(0, PAGES - 1), destination=st.integers(0, PAGES - 1))
    def move_ciphertext(self, source, destination):
        self.memory.write(destination * 4096, self.memory.dram(source * 4096, 4096), None, 1)
        self.synchronise()
        moved = [self.dram.get(source * 256 + n, bytes(16)) for n in range(256)]
        self.dram.update({destination * 256 + n: block for n, block in enumerate(moved)})

    @rule()
    def mark(self):
        self.memory.mark()
        self.saved = (dict(self.dram), len(self.keys))

    @rule()
    def reset(self):
        self.memory.reset()
        self.dram = dict(self.saved[0])
        del self.keys[self.saved[1] :]

    @rule()
    def snapshot_round_trip(self):
        image = self.memory.capture()
        self.memory.write(0, b"scratch", None, 1)
        self.memory.restore(image)
        assert self.memory.capture() == image


class CachedMemoryFlushed(MemoryAgainstBlocks):
    """Modelled caches, flushed after every access, are plain memory."""

    make = CachedMemory

    def synchronise(self):
        self.memory.write_back_all()


TestMemoryAgainstBlocks = MemoryAgainstBlocks.TestCase
TestMemoryAgainstBlocks.settings = settings(max_examples=25, stateful_step_count=20)
TestCachedMemoryFlushed = pytest.mark.slow(CachedMemoryFlushed.TestCase)
TestCachedMemoryFlushed.settings = settings(max_examples=8, stateful_step_count=12)
