"""Time of a guest by the code that it executes: a counter that Unicorn's blocks decrement, without Python.

Unicorn's own limit on instructions calls back before each of them and computes the flags each time, which takes more
than half of all time (and leaves them where PUSHF then finds them). A hook of blocks costs little, if what it calls is
native: a few instructions of the host, which subtract the block's bytes and, when none are left, end the run before the
block. The unit is therefore the byte of code; four are taken for an instruction.

Source: unicorn 2.1.4, uc.c (uc_emu_start, helper_uc_tracecode) and qemu/accel/tcg/translator.c (block size);
System V ABI for x86-64, 3.2.3 (arguments).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform

from sevlab.core.errors import ConfigError
from sevlab.core.units import MASK64

CODE = bytes.fromhex(
    "488b01"  # mov rax, [rcx]      the bytes that are left; rcx is what the hook was given
    "4885c0"  # test rax, rax
    "7e0e"  # jle stop
    "89d2"  # mov edx, edx          size of the block
    "482911"  # sub [rcx], rdx
    "48897110"  # mov [rcx + 16], rsi   where it begins
    "48895118"  # mov [rcx + 24], rdx
    "c3"  # ret
    "48c7411800000000"  # stop: mov qword [rcx + 24], 0
    "ff6108"  # jmp [rcx + 8]       uc_emu_stop, with the engine still in rdi
)
BYTES_PER_TICK = 4
COUNTER_AT = 64
"""The counter, a signed number of 8 bytes, the address of uc_emu_stop, start and size of the block that is executed;
the code is at 0."""
LEFT, STOP, BLOCK, SIZE = range(4)


class BlockClock:
    """A hook for Unicorn's blocks."""

    def __init__(self) -> None:
        if platform.machine().lower() not in ("x86_64", "amd64") or os.name != "posix":
            raise ConfigError(
                f"the engine unicorn counts time with x86-64 code and the System V ABI; this host is"
                f" {platform.machine()} ({os.name})"
            )
        self._room = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._room[: len(CODE)] = CODE
        self._words = memoryview(self._room)[COUNTER_AT : COUNTER_AT + 32].cast("q")
        self._seen = 0

    def place(self, stop: int) -> tuple[int, int]:
        """The addresses of the code and of what it is given; `stop` is that of uc_emu_stop."""
        self._words[STOP] = stop
        code = ctypes.addressof(ctypes.c_char.from_buffer(self._room))
        return code, code + COUNTER_AT

    def start(self, ticks: int) -> None:
        """Let the next run end after about `ticks`."""
        change = max(ticks, 1) * BYTES_PER_TICK - self.remainder - self._words[LEFT]
        self._words[LEFT] += change
        self._seen += change

    def limit(self, ticks: int) -> None:
        """Let this run end after about `ticks` if it would end later."""
        if ticks * BYTES_PER_TICK < self._words[LEFT]:
            self.start(ticks)

    def leave(self, linear: int) -> None:
        """The block that is executed is left at the instruction at `linear`: it and the rest are not executed yet.

        So it does not matter for time how often, and why, a guest is left.
        """
        words = self._words
        done = linear - (words[BLOCK] & MASK64)
        if 0 <= done < words[SIZE]:
            words[LEFT] += words[SIZE] - done
        words[SIZE] = 0

    def charge(self, code_bytes: int) -> None:
        """Somebody else executed so many bytes."""
        self._words[LEFT] -= code_bytes

    def elapsed(self) -> int:
        """Ticks that passed since this was asked last."""
        ticks = (self._seen - self._words[LEFT]) // BYTES_PER_TICK
        self._seen -= ticks * BYTES_PER_TICK
        return ticks

    @property
    def remainder(self) -> int:
        """Right behind `elapsed`: bytes that make no tick yet."""
        return self._seen - self._words[LEFT]

    @remainder.setter
    def remainder(self, code_bytes: int) -> None:
        self._seen = self._words[LEFT] + code_bytes
