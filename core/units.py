"""Address kinds, page sizes and the few sums that everybody does with them."""

from __future__ import annotations

from enum import IntEnum
from typing import NewType

SPA = NewType("SPA", int)
"""System physical address, bytes. Source: 24593 (APM volume 2), 15.34."""
GPA = NewType("GPA", int)
"""Guest physical address, bytes, without the C-bit."""
GVA = NewType("GVA", int)
"""Guest virtual (linear) address, bytes."""
ASID = NewType("ASID", int)
"""Address-space identifier; 0 is the host."""

HOST_ASID = ASID(0)

PAGE_SHIFT = 12
PAGE_BYTES = 4096
PAGE_MASK = PAGE_BYTES - 1
PAGE_2M_BYTES = 2 << 20
PAGE_1G_BYTES = 1 << 30
BLOCK_BYTES = 16
"""Bytes of one AES block: the granularity at which a write through another key's view spoils."""
MASK32 = (1 << 32) - 1
MASK64 = (1 << 64) - 1


class Vmpl(IntEnum):
    """Virtual machine privilege level; lower is more privileged."""

    VMPL0 = 0
    VMPL1 = 1
    VMPL2 = 2
    VMPL3 = 3


def align_down(address: int, alignment_bytes: int) -> int:
    """The largest multiple of `alignment_bytes` (a power of two) that is not above `address`."""
    return address & -alignment_bytes


def is_aligned(address: int, alignment_bytes: int) -> bool:
    """Whether `address` is a multiple of `alignment_bytes` (a power of two)."""
    return not address & (alignment_bytes - 1)
