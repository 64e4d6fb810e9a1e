"""From VMMCALL to a handler: mode, privilege, number, registers, result, continuation.

Source: Xen xen/arch/x86/hvm/hypercall.c (hvm_hypercall), xen/arch/x86/include/asm/hvm/hvm.h
(hvm_sanitize_regs_fields), xen/include/hypercall-defs.c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import and_, attrgetter
from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.hypercall import BITS_64, REAL, VM86, HypercallEnd, HypercallFrame
from sevlab.core.units import MASK32, MASK64
from sevlab.plugins.xen import hyperv
from sevlab.plugins.xen.adapted import AdaptedCall
from sevlab.plugins.xen.call import Abi, Call
from sevlab.plugins.xen.linear import Walks
from sevlab.plugins.xen.numbers import ABI_FLAG, HYPERV_FLAG, Errno
from sevlab.plugins.xen.operations import FAST_REGISTERS
from sevlab.plugins.xen.records import Hypercalled
from sevlab.plugins.xen.settings import AltAbi, Settings
from sevlab.plugins.xen.state import domain_of

if TYPE_CHECKING:
    from sevlab.core.cpu import Registers, Vcpu
    from sevlab.core.machine import Machine

ARGUMENTS_64 = ("rdi", "rsi", "rdx", "r10", "r8")
ARGUMENTS_32 = ("rbx", "rcx", "rdx", "rsi", "rdi")
CLIPPED = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "rip", "rflags")
"""Registers whose upper halves 32-bit code cannot have meant; cleared on entry, R8 to R15 are not."""
FAST, COMPLETED, NO_SUCH_CALL = Abi.FAST, HypercallEnd.COMPLETED, -Errno.ENOSYS
_record = tuple.__new__
"""Makes a record without the keyword machinery, at every hypercall."""
POISON = 0xDEAD_BEEF_DEAD_F00D
"""What a debug build leaves in the argument registers."""


class HypercallEntry(NamedTuple):
    """The value of `builder.hypercalls`: one number's handler and how many arguments it takes.

    `masks`: what each argument is cut to, as declared in C (all ones: an unsigned long).
    """

    name: str
    run: Callable[[Call], int]
    masks: tuple[int, ...]
    fast: bool = False
    """Whether FastABI describes it."""
    split: bool = False
    """Its 64-bit argument takes two registers of a 32-bit caller."""

    def names(self, abi: Abi, *, narrow: bool) -> tuple[str, ...]:
        """The registers that hold its arguments; FastABI's others are the operations' business."""
        if abi is Abi.FAST:
            return FAST_REGISTERS[1:2]
        if narrow:
            return ARGUMENTS_32[: len(self.masks) + self.split]
        return ARGUMENTS_64[: len(self.masks)]

    def cut(self, values: Sequence[int], *, narrow: bool) -> tuple[int, ...]:
        """Arguments from what the registers or a multicall entry hold, each cut to its declared width; those that
        FastABI keeps in other registers are 0.
        """
        if narrow and self.split:
            return (values[0] | values[1] << 32,)
        masks = self.masks
        cut = tuple(map(and_, values, masks))  # as many as there are of both
        return cut if len(cut) == len(masks) else cut + (0,) * (len(masks) - len(cut))


class Compiled(NamedTuple):
    """How a number of one width is served: what `_compile` found out."""

    run: Callable[[Call], int]
    abi: Abi
    abi_name: str
    number: int
    flag: int
    names: tuple[str, ...]
    values_of: Callable[[Registers], tuple[int, ...]]


class Owner:
    """The function in the slot `hypercall`, with the machine's settings at hand."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._call: type[Call] = AdaptedCall if settings.adapt else Call
        self._compiled: dict[tuple[int, bool], Compiled] = {}
        self._walks = Walks()

    def serve(self, machine: Machine, vcpu: Vcpu, frame: HypercallFrame) -> HypercallEnd:
        """The slot `hypercall`: serve one VMMCALL."""
        registers = frame.registers
        given, mode = frame.given, frame.mode
        if given is not None and "rax" not in given:
            return HypercallEnd.MISSING_INPUT
        narrow = mode is not BITS_64
        if narrow:
            for name in CLIPPED:
                value = getattr(registers, name)
                if value >> 32:
                    setattr(registers, name, value & MASK32)
        number = registers.rax
        if (frame.cpl or mode is VM86) and mode is not REAL:
            return answer(frame, -Errno.EPERM, narrow=narrow)
        domain = domain_of(machine, vcpu)
        if domain is None:
            return answer(frame, -Errno.ENOSYS, narrow=narrow)
        if number & HYPERV_FLAG and self._settings.viridian:
            return hyperv.serve(machine, vcpu, domain, frame)
        compiled = self._compiled.get((number, narrow))
        if compiled is None:
            compiled = self._compile(machine, number, narrow=narrow)
            if compiled is None:
                return _refuse(machine, vcpu, frame, number, narrow=narrow)
        run, abi, abi_name, number, flag, names, values_of = compiled
        if given is not None and not given.issuperset(names):
            return HypercallEnd.MISSING_INPUT
        settings = self._settings
        vcpus = domain.vcpus
        me = vcpus[vcpu.vcpu_id - vcpus[0].vcpu_id]
        left, debug = settings.preempt_after, settings.debug_build
        args = values_of(registers)
        call = self._call(machine, vcpu, domain, me, frame, abi, narrow, left, debug, self._walks, number, args)
        result = run(call)
        if call.continuation is not None:
            resume(call, ARGUMENTS_32 if narrow else ARGUMENTS_64, flag)
            machine.emit(Hypercalled(vcpu.vcpu_id, number, abi_name, 0, True))
            return HypercallEnd.PREEMPTED
        if debug and abi is not FAST and result != NO_SUCH_CALL:
            for name in names:
                setattr(registers, name, POISON & call.mask)
                frame.written.add(name)
        machine.emit(_record(Hypercalled, (vcpu.vcpu_id, number, abi_name, result & MASK64, False)))
        return answer(frame, result, narrow=narrow)

    def passed(self, vcpu: Vcpu) -> tuple[str, ...]:
        """The slot `hypercall_registers`: what an encrypted guest's handler passes for the call that is in RAX. It does
        not know how many arguments a number has, and gives all. An encrypted guest's code counts as 64-bit.
        """
        number = vcpu.regs.rax
        if number & HYPERV_FLAG and self._settings.viridian:
            return hyperv.REGISTERS
        return FAST_REGISTERS[1:] if self._abi(number, narrow=False)[0] is Abi.FAST else ARGUMENTS_64

    def _compile(self, machine: Machine, number: int, *, narrow: bool) -> Compiled | None:
        """What serves a number, kept from the first time on; None when nothing does."""
        abi, flag = self._abi(number, narrow=narrow)
        entry = machine.tables.hypercalls.get(number & ~flag)
        if not isinstance(entry, HypercallEntry) or (abi is Abi.FAST and not entry.fast):
            return None
        names = entry.names(abi, narrow=narrow)
        compiled = Compiled(
            entry.run, abi, abi.value, number & ~flag, flag, names, _reader(entry, names, narrow=narrow)
        )
        self._compiled[number, narrow] = compiled
        return compiled

    def _abi(self, number: int, *, narrow: bool) -> tuple[Abi, int]:
        """The ABI that bit 30 asks for, and the bit when it is one; where none is offered it is part of the number."""
        if number & ABI_FLAG:
            if self._settings.alt_abi is AltAbi.PHYSICAL:
                return Abi.PHYSICAL, ABI_FLAG
            if self._settings.alt_abi is AltAbi.FAST and not narrow:
                return FAST, ABI_FLAG
        return Abi.LEGACY, 0


def _reader(entry: HypercallEntry, names: tuple[str, ...], *, narrow: bool) -> Callable[[Registers], tuple[int, ...]]:
    """What takes the arguments out of the registers `names`, each cut to its declared width."""
    if len(names) == len(entry.masks):
        values = "".join(f"registers.{name} & {mask:#x}, " for name, mask in zip(names, entry.masks, strict=True))
        return eval(f"lambda registers: ({values})")  # type: ignore[no-any-return]  # noqa: S307  # register names
    getter = attrgetter(*names, "rax")  # one name more, so that a single argument comes as a tuple too
    return lambda registers: entry.cut(getter(registers)[:-1], narrow=narrow)


def _refuse(machine: Machine, vcpu: Vcpu, frame: HypercallFrame, number: int, *, narrow: bool) -> HypercallEnd:
    """There is no such hypercall, or not in this ABI; the argument registers stay."""
    machine.emit(_record(Hypercalled, (vcpu.vcpu_id, number & MASK64, "", NO_SUCH_CALL & MASK64, False)))
    return answer(frame, NO_SUCH_CALL, narrow=narrow)


def answer(frame: HypercallFrame, result: int, *, narrow: bool) -> HypercallEnd:
    """Put the result into RAX."""
    frame.registers.rax = result & (MASK32 if narrow else MASK64)
    frame.written.add("rax")
    return COMPLETED


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
