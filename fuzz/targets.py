"""Targets: functions from bytes to the end of a sequence, shared by harnesses, tests and replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sevlab.core.config import GuestConfig, MachineConfig
from sevlab.core.machine import Machine
from sevlab.core.vocabulary import FieldSpec, Record, Vocabulary, spec_of

MAX_STEPS = 64
"""Longest sequence that one input decodes to."""


class Reader:
    """Takes values off the front of a byte string; past the end everything is zero."""

    __slots__ = ("_data", "_position")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def left(self) -> bool:
        """Whether any byte is left."""
        return self._position < len(self._data)

    def take(self, length: int) -> bytes:
        """The next `length` bytes, zero-filled past the end."""
        piece = self._data[self._position : self._position + length]
        self._position += length
        return piece.ljust(length, b"\0")

    def number(self) -> int:
        """A number: one byte says how many bytes follow (0 to 8), so that small ones are short."""
        return int.from_bytes(self.take(self.take(1)[0] % 9), "little")


def decode_steps(data: bytes, vocabulary: Vocabulary) -> tuple[Record, ...]:
    """Every byte string is a list of at most 64 steps: a byte for the kind, then the fields in order."""
    kinds = [record for kind, record in sorted(vocabulary.kinds.items()) if spec_of(record).is_step]
    reader = Reader(data)
    steps: list[Record] = []
    while reader.left and len(steps) < MAX_STEPS:
        record = kinds[reader.take(1)[0] % len(kinds)]
        steps.append(record(*(_value(field, reader) for field in spec_of(record).fields)))
    return tuple(steps)


WORDS = ("", "wbinvd", "invd", "clflush", "sev", "tee")
REGISTERS = ("rax", "rcx", "rip", "cpl", "cr0", "cr3", "cr4", "efer", "bogus")


def _value(field: FieldSpec, reader: Reader) -> Any:
    if field.type is bool:
        return bool(reader.take(1)[0] & 1)
    if field.type is bytes:
        return reader.take(reader.take(1)[0])
    if field.type is str:
        return WORDS[reader.take(1)[0] % len(WORDS)]
    if field.type is tuple:
        count = reader.take(1)[0] % 4
        return tuple((REGISTERS[reader.take(1)[0] % len(REGISTERS)], reader.number()) for _ in range(count))
    return reader.number()


def kernel_target(plugins: tuple[str, ...]) -> Callable[[bytes], None]:
    """A function that applies the steps in its bytes to a booted machine with two guests, and resets it."""
    guests = (GuestConfig(name="first"), GuestConfig(name="second"))
    machine = Machine(MachineConfig(plugins=plugins, guests=guests))

    def run(data: bytes) -> None:
        for step in decode_steps(data, machine.vocabulary):
            machine.apply(step)
        machine.reset()

    return run
