"""How a device declares its registers: one row a register, for dispatch, documentation and tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from sevlab.core.state import StateDict, Stateful, new


class Register(NamedTuple):
    """One register: its offset in the device's window, width in bytes, and what it is."""

    offset: int
    name: str
    width: int
    access: str
    doc: str


def markdown_table(registers: Iterable[Register]) -> str:
    """The registers for documentation."""
    lines = ["| Offset | Register | Bytes | Access | Meaning |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {row.offset:#x} | {row.name} | {row.width} | {row.access} | {row.doc} |" for row in registers]
    return "\n".join(lines)


def ones(width: int) -> int:
    """What an access to nothing reads: all ones, zero-extended from `width` bytes."""
    return (1 << width * 8) - 1


CHUNK_BYTES = 4096


class Text(Stateful):
    """What a guest wrote, byte by byte: kept in chunks, so that a long log does not cost its length at every byte."""

    chunks: StateDict[int, bytes] = new(StateDict)
    tail: bytes = b""

    def append(self, data: bytes) -> None:
        """Add `data` at the end."""
        self.tail += data
        if len(self.tail) >= CHUNK_BYTES:
            self.chunks[len(self.chunks)] = self.tail
            self.tail = b""

    def __bytes__(self) -> bytes:
        return b"".join(self.chunks.values()) + self.tail
