"""Why a step of a kernel towards Xen breaks when its memory and registers are encrypted, and what takes its place."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from sevlab.plugins.xen import SURVIVAL, Fate, Nr, Survival

MEMOP_MASK, GNTTABOP_MASK = 0x3F, 0xFFF


class Break(NamedTuple):
    """A reason and a remedy."""

    why: str
    instead: str


class Reason(Enum):
    """What encryption breaks of a Xen guest."""

    HYPERCALL_PAGE = Break(
        "Xen writes code into a private page, which the guest's key turns into garbage",
        "VMMCALL in the guest's own code, chosen by vendor",
    )
    REGISTERS = Break(
        "the #VC handler passes RAX and CPL only, and Xen misses the arguments",
        "a sev_es_hcall_prepare of Xen's that puts RDI RSI RDX R10 R8 into the GHCB",
    )
    LINEAR = Break("its buffer is at a linear address, which only the guest's own tables lead to", "")
    PRIVATE = Break(
        "Xen's page is mapped with the C-bit: the guest sees garbage, and so does Xen",
        "map it decrypted, and its frame out of the launch",
    )
    OWN_PAGE = Break(
        "a private page of the guest's, in which Xen reads ciphertext and writes garbage",
        "a page made shared (set_memory_decrypted) before it is registered",
    )


def row_of(number: int, command: int) -> Survival | None:
    """What the plugin knows of a call by number and first argument."""
    if number == Nr.MEMORY_OP:
        command &= MEMOP_MASK
    elif number == Nr.GRANT_TABLE_OP:
        command &= GNTTABOP_MASK
    rows = [row for row in SURVIVAL if row.number == number]
    return next((row for row in rows if row.command in (command, -1)), None)


def replacement(row: Survival) -> str:
    """What an encrypted guest does in the place of a call with a linear buffer."""
    if row.fate is Fate.REFUSED:
        return "nothing: no guest has this call"
    found = [*(("FastABI",) if row.fast else ()), *(("the physical-address ABI",) if row.physical else ())]
    found += [row.instead] if row.instead else []
    shared = f"; shared: {row.shared}" if row.shared else ""
    return " or ".join(found) + shared


def breaks_linear(row: Survival) -> bool:
    """Whether the legacy form of a call needs a buffer."""
    return row.fate is Fate.LINEAR
