"""What a hypercall is to the kernel: VMMCALL with the registers that the hypervisor may see.

Two ways lead here: the VMMCALL intercept of a guest whose registers are visible, and the VMMCALL NAE event of one whose
registers are encrypted. Both make a `HypercallFrame` and give it to the slot `hypercall`, whose owner knows the
hypervisor's ABI; numbers, and who handles which, are in the table `hypercalls`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING

from sevlab.core.cpu import CR0_PE, Registers, Vcpu
from sevlab.core.paging import CR0_PG, EFER_LME

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

RFLAGS_VM = 1 << 17
CS_LONG, CS_BIG = 1 << 9, 1 << 10
"""Bits of the code segment's attributes in the VMCB's format."""


class CodeMode(Enum):
    """How the calling code runs."""

    REAL = "real mode"
    VM86 = "virtual-8086 mode"
    BITS_16 = "16-bit protected mode"
    BITS_32 = "32-bit mode"
    BITS_64 = "64-bit mode"


REAL, VM86, BITS_16, BITS_32, BITS_64 = CodeMode
"""By name alone: the look at an enumeration's member costs more than the rest of the question, at every hypercall."""


class HypercallEnd(Enum):
    """What became of a hypercall."""

    COMPLETED = "done"
    """RIP goes behind the instruction."""
    PREEMPTED = "preempted"
    """RIP stays: the guest executes the instruction again, with the registers as the handler left them."""
    MISSING_INPUT = "missing input"
    """A register that the call needs was not given (its GHCB valid bit is clear); nothing happened."""


class HypercallFrame:
    """The registers of one hypercall.

    `registers` are the vCPU's own, or a copy filled from the GHCB; the handler changes them in place and adds the
    names of those it wrote to `written`. `given` names the registers that came through the GHCB (None: all are there).
    """

    __slots__ = ("cpl", "given", "mode", "registers", "written")

    def __init__(self, registers: Registers, cpl: int, mode: CodeMode, given: frozenset[str] | None = None) -> None:
        self.registers = registers
        self.cpl = cpl
        self.mode = mode
        self.given = given
        self.written: set[str] = set()

    def missing(self, *names: str) -> bool:
        """Whether any of these registers was not given."""
        return self.given is not None and not self.given.issuperset(names)


HypercallOwner = Callable[["Machine", Vcpu, HypercallFrame], HypercallEnd]
"""The type of the slot `hypercall`."""


def code_mode(vcpu: Vcpu) -> CodeMode:
    """The mode of a guest whose segments are visible. Source: spec 24593, 1.3 and 14.5."""
    system = vcpu.system
    if not system.cr0 & CR0_PE:
        return REAL
    if vcpu.regs.rflags & RFLAGS_VM:
        return VM86
    attributes = system.cs[1]
    if attributes & CS_LONG and system.efer & EFER_LME and system.cr0 & CR0_PG:
        return BITS_64
    return BITS_32 if attributes & CS_BIG else BITS_16
