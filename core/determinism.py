"""The only random source and the only clock: same seed, same bytes, same time."""

from __future__ import annotations

from hashlib import sha256

from sevlab.core.errors import ConfigError
from sevlab.core.state import StateDict, Stateful, new

TSC_HZ = 2_000_000_000
"""Ticks of the virtual time-stamp counter per virtual second; a round number of ours, not of any part."""


class Entropy(Stateful):
    """Seeded bytes in named streams.

    Block n of a stream is SHA-256 of (seed, stream name, n); a stream's bytes depend neither on what other streams
    gave nor on the order of the calls, so that a plugin which draws more does not change another plugin's keys.
    """

    seed: bytes = b""
    drawn: StateDict[str, int] = new(StateDict)

    def take(self, stream: str, length_bytes: int) -> bytes:
        """The next `length_bytes` bytes of `stream`; unused bytes of the last block are dropped."""
        if length_bytes < 0:
            raise ConfigError(f"entropy stream {stream!r}: asked for {length_bytes} bytes, expected 0 or more")
        first = self.drawn.get(stream, 0)
        blocks = -(-length_bytes // 32)
        self.drawn[stream] = first + blocks
        prefix = len(self.seed).to_bytes(4, "little") + self.seed + stream.encode() + b"\0"
        out = b"".join(sha256(prefix + (first + n).to_bytes(8, "little")).digest() for n in range(blocks))
        return out[:length_bytes]

    def take_int(self, stream: str, length_bytes: int) -> int:
        """The next `length_bytes` bytes of `stream` as a little-endian number."""
        return int.from_bytes(self.take(stream, length_bytes), "little")


class Clock(Stateful):
    """Virtual time: moves only when somebody advances it."""

    tsc: int = 0

    def advance(self, ticks: int) -> int:
        """Let `ticks` >= 0 pass; returns the new time-stamp counter (64 bit, wraps)."""
        self.tsc = (self.tsc + ticks) & 0xFFFF_FFFF_FFFF_FFFF
        return self.tsc

    @property
    def nanoseconds(self) -> int:
        """Virtual nanoseconds since reset."""
        return self.tsc * 1_000_000_000 // TSC_HZ
