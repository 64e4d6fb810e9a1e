"""From VMMCALL to a handler: mode, privilege, number, registers, result, continuation.

Source: Xen xen/arch/x86/hvm/hypercall.c (hvm_hypercall), xen/arch/x86/include/asm/hvm/hvm.h
(hvm_sanitize_regs_fields), xen/include/hypercall-defs.c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.hypercall import CodeMode, HypercallEnd, HypercallFrame
from sevlab.core.units import MASK32, MASK64
from sevlab.plugins.xen import hyperv
from sevlab.plugins.xen.call import Abi, Call
from sevlab.plugins.xen.numbers import ABI_FLAG, HYPERV_FLAG, Errno
from sevlab.plugins.xen.operations import FAST_REGISTERS
from sevlab.plugins.xen.records import Hypercalled
from sevlab.plugins.xen.settings import AltAbi, Settings
from sevlab.plugins.xen.state import Domain, XenVcpu, domain_of

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

ARGUMENTS_64 = ("rdi", "rsi", "rdx", "r10", "r8")
ARGUMENTS_32 = ("rbx", "rcx", "rdx", "rsi", "rdi")
CLIPPED = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "rip", "rflags")
"""Registers whose upper halves 32-bit code cannot have meant; cleared on entry, R8 to R15 are not."""
POISON = 0xDEAD_BEEF_DEAD_F00D
"""What a debug build leaves in the argument registers."""


class HypercallEntry(NamedTuple):
    """The value of `builder.hypercalls`: one number's handler and how many arguments it takes.

    `widths`: bits of each argument, as declared in C (0: an unsigned long).
    """

    name: str
    run: Callable[[Call], int]
    widths: tuple[int, ...]
    fast: bool = False
    """Whether FastABI describes it."""
    split: bool = False
    """Its 64-bit argument takes two registers of a 32-bit caller."""

    def names(self, abi: Abi, *, narrow: bool) -> tuple[str, ...]:
        """The registers that hold its arguments; FastABI's others are the operations' business."""
        if abi is Abi.FAST:
            return FAST_REGISTERS[1:2]
        if narrow:
            return ARGUMENTS_32[: len(self.widths) + self.split]
        return ARGUMENTS_64[: len(self.widths)]

    def resume(call: Call, names: tuple[str, ...], flag: int) -> None:
    """Put a continuation's number and arguments into the registers, as the caller's ABI has them."""
    assert call.continuation is not None
    number, args = call.continuation
    registers = call.frame.registers
    registers.rax = number | flag
    call.frame.written.add("rax")
    for name, value in zip(names, args, strict=False):
        setattr(registers, name, value & call.mask)
        call.frame.written.add(name)
