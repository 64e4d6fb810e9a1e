"""Which blocks of a guest's code ran, and stops at places in it: native code that Unicorn calls at each block.

The code is a few instructions of the host without Python. A block in the traced range is noted once a run for each pair
(block before, block): what libFuzzer calls an edge, but not for a block behind itself. A block that begins in the stop
range or at a mark ends the run before it.

Source: unicorn 2.1.4, uc.c (helper_uc_tracecode), include/unicorn/unicorn.h (uc_cb_hookcode_t); System V ABI for
x86-64, 3.2.3 (arguments: rdi engine, rsi address, edx size, rcx what the hook was given).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from typing import TYPE_CHECKING

from sevlab.core.errors import ConfigError

if TYPE_CHECKING:
    from sevlab.plugins.engines.unicorn_engine import UnicornCpu

EDGES = 1 << 16
WORDS_AT, SEEN_AT = 0x800, 0x1000
LOG_AT = SEEN_AT + 4 * EDGES
MARKS_AT = LOG_AT + 8 * EDGES
ROOM_BYTES = MARKS_AT + EDGES
LOW, SPAN, STOP_LOW, STOP_SPAN, STOPPED, STOP, COUNT, BEFORE, RUN, LAST = range(10)
"""Words: the traced range, the stop range, whether a block stopped the run, uc_emu_stop, how many edges are noted, a
hash of the block before, the number of the run, the block that ran last: with several hooks Unicorn calls each several
times a block."""

CODE = bytes.fromhex(
    "483b7148"  # cmp rsi, [rcx+72]       LAST
    "7464"  # je out
    "48897148"  # mov [rcx+72], rsi
    "4989f0"  # mov r8, rsi
    "4c2b4110"  # sub r8, [rcx+16]        STOP_LOW
    "4c3b4118"  # cmp r8, [rcx+24]        STOP_SPAN
    "7254"  # jb stop
    "0fb7c6"  # movzx eax, si
    "80bc0100080c0000"  # cmp byte [rcx+rax+0xc0800], 0
    "7547"  # jne stop
    "482b31"  # sub rsi, [rcx]        LOW
    "483b7108"  # cmp rsi, [rcx+8]        SPAN
    "733d"  # jae out
    "69c6b179379e"  # imul eax, esi, 0x9e3779b1
    "c1e810"  # shr eax, 16
    "8b5138"  # mov edx, [rcx+56]         BEFORE
    "31c2"  # xor edx, eax
    "d1e8"  # shr eax, 1
    "894138"  # mov [rcx+56], eax
    "8b4140"  # mov eax, [rcx+64]         RUN
    "39849100080000"  # cmp [rcx+rdx*4+0x800], eax
    "741e"  # je out
    "89849100080000"  # mov [rcx+rdx*4+0x800], eax
    "48c1e610"  # shl rsi, 16
    "4809d6"  # or rsi, rdx
    "488b4130"  # mov rax, [rcx+48]       COUNT
    "4889b4c100080400"  # mov [rcx+rax*8+0x40800], rsi
    "48ff4130"  # inc qword [rcx+48]
    "c3"  # out: ret
    "48c7412001000000"  # stop: mov qword [rcx+32], 1
    "ff6128"  # jmp [rcx+40]
)


class BlockTrace:
    """Traces the blocks that `engine` executes; one an engine, for good."""

    def __init__(self, engine: UnicornCpu) -> None:
        if platform.machine().lower() not in ("x86_64", "amd64") or os.name != "posix":
            raise ConfigError(
                f"tracing blocks takes x86-64 code and the System V ABI; this host is {platform.machine()} ({os.name})"
            )
        self._room = mmap.mmap(-1, ROOM_BYTES, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._room[: len(CODE)] = CODE
        view = memoryview(self._room)
        self._words = view[WORDS_AT : WORDS_AT + 128].cast("Q")
        self._log = view[LOG_AT:MARKS_AT].cast("Q")
        engine.hook_blocks(self._place)

    def _place(self, stop: int) -> tuple[int, int]:
        self._words[STOP] = stop
        code = ctypes.addressof(ctypes.c_char.from_buffer(self._room))
        return code, code + WORDS_AT

    def trace(self, low: int, end: int) -> None:
        """Note blocks from `low` up to `end`."""
        self._words[LOW], self._words[SPAN] = low, end - low

    def stop_in(self, low: int, end: int) -> None:
        """End a run before a block from `low` up to `end`."""
        self._words[STOP_LOW], self._words[STOP_SPAN] = low, end - low

    def mark(self, address: int) -> None:
        """End a run before a block at `address`, and at times before another whose address ends in the same 16 bits."""
        self._room[MARKS_AT + (address & 0xFFFF)] = 1

    def skip(self, address: int) -> None:
        """Let the block at `address` pass, when the next run begins there."""
        self._words[LAST] = address

    def begin(self) -> None:
        """Nothing has run."""
        words = self._words
        words[COUNT] = words[BEFORE] = words[STOPPED] = words[LAST] = 0
        words[RUN] += 1

    def take_stop(self) -> bool:
        """Whether a block in the stop range or at a mark ended the run that is just over."""
        stopped = self._words[STOPPED]
        self._words[STOPPED] = 0
        return bool(stopped)

    def edges(self) -> list[int]:
        """What ran since `begin`: for each edge the block's offset in the range, times 2^16, and the edge's number."""
        return self._log[: self._words[COUNT]].tolist()

    def address_of(self, edge: int) -> int:
        """Where an edge's block begins."""
        return (edge >> 16) + self._words[LOW]
