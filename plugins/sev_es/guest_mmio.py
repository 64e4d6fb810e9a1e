"""The reference guest's MMIO: decode the instruction at a #VC of a nested page fault, and read or write by the page.

Linux decodes moves of a register or immediate, MOVZX, MOVSX and MOVS; edk2 adds the moves with an absolute address.
Source: Linux arch/x86/lib/insn-eval.c (insn_decode_mmio), arch/x86/coco/sev/vc-handle.c (vc_handle_mmio, vc_do_mmio);
edk2 OvmfPkg/Library/CcExitLib/CcExitVcHandler.c (MmioExit).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from sevlab.core.cpu import GPR_NAMES
from sevlab.core.units import MASK64
from sevlab.plugins.sev_es.ghcb import NaeCode
from sevlab.plugins.sev_es.guest import (
    GuestReply,
    MsrExit,
    Outcome,
    PageExit,
    VcContext,
    VcEnd,
    VcHandler,
    VcResult,
    call,
)

if TYPE_CHECKING:
    from sevlab.plugins.sev_es.insn import VcInsn

Exits = Generator[PageExit | MsrExit, "GuestReply | int", Any]
RFLAGS_DF = 1 << 10
NOT_DECODED = "the #VC handler does not decode this access"


def mmio(context: VcContext, insn: VcInsn) -> VcHandler:
    """One MMIO access; user space has no devices. Source: Linux vc-handle.c (vc_handle_mmio)."""
    if context.user:
        return VcResult(Outcome.UNSUPPORTED, reason="MMIO from user space")
    name = insn.mnemonic
    if name.startswith("MOVS") and name in ("MOVSB", "MOVSW", "MOVSD", "MOVSQ"):
        return (yield from _movs(context, insn))
    if name not in ("MOV", "MOVZX", "MOVSX"):
        return VcResult(Outcome.UNSUPPORTED, reason=NOT_DECODED)
    import iced_x86

    raw = insn.raw
    moffs = "MOFFS" in _code_name(raw)
    if moffs and context.profile != "edk2":
        return VcResult(Outcome.UNSUPPORTED, reason=NOT_DECODED)
    memory = iced_x86.OpKind.MEMORY
    width = iced_x86.MemorySizeExt.size(raw.memory_size)
    if memory not in (raw.op0_kind, raw.op1_kind):
        return VcResult(Outcome.UNSUPPORTED, reason=NOT_DECODED)
    linear = _linear(context, insn)
    if raw.op0_kind == memory:
        if raw.op1_kind == iced_x86.OpKind.REGISTER:
            value = _get(context, raw.op1_register)
        else:
            value = raw.immediate(1) & MASK64
        yield from _write(context, linear, (value & (1 << width * 8) - 1).to_bytes(width, "little"))
        return VcResult(Outcome.DONE, insn.length)
    data = yield from _read(context, linear, width)
    value = int.from_bytes(data, "little", signed=name == "MOVSX")
    _set(context, raw.op0_register, value)
    return VcResult(Outcome.DONE, insn.length)


def _movs(context: VcContext, insn: VcInsn) -> VcHandler:
    """MOVS: one element by ordinary memory on one side and the device on the other; REP goes on by executing again.

    Source: Linux vc-handle.c (vc_handle_mmio_movs).
    """
    regs = context.regs
    width = {"B": 1, "W": 2, "D": 4, "Q": 8}[insn.mnemonic[-1]]
    if insn.rep and not regs.rcx:
        return VcResult(Outcome.DONE, insn.length)
    bits64 = context.bits == 64
    source = regs.rsi + (0 if bits64 else context.system.ds[3]) & MASK64
    target = regs.rdi + (0 if bits64 else context.system.es[3]) & MASK64
    data = context.read(source, width) if _is_memory(context, source) else (yield from _read(context, source, width))
    if _is_memory(context, target, write=True):
        context.write(target, data)
    else:
        yield from _write(context, target, data)
    step = -width if regs.rflags & RFLAGS_DF else width
    regs.rsi, regs.rdi = regs.rsi + step & MASK64, regs.rdi + step & MASK64
    if insn.rep:
        regs.rcx = regs.rcx - 1 & MASK64
        if regs.rcx:
            return VcResult(Outcome.RETRY)
    return VcResult(Outcome.DONE, insn.length)


def _is_memory(context: VcContext, linear: int, *, write: bool = False) -> bool:
    """Whether the page is private: then it is the guest's own memory, not a device."""
    return context.translate(linear, write)[1]


def _device(context: VcContext, linear: int, *, write: bool) -> int:
    gpa, private = context.translate(linear, write)
    if private:
        raise VcEnd(VcResult(Outcome.UNSUPPORTED, reason="emulated MMIO to or from encrypted memory"))
    return gpa


def _read(context: VcContext, linear: int, width: int) -> Exits:
    gpa = _device(context, linear, write=False)
    reply = yield from call(context, PageExit(NaeCode.MMIO_READ, gpa, width, scratch=True, buffer_bytes=width))
    return reply.data


def _write(context: VcContext, linear: int, data: bytes) -> Exits:
    gpa = _device(context, linear, write=True)
    yield from call(context, PageExit(NaeCode.MMIO_WRITE, gpa, len(data), data=data, scratch=True))


# Registers as iced-x86 numbers them -------------------------------------------------------------------------------


def _code_name(raw: Any) -> str:
    import iced_x86

    return next((name for name, value in vars(iced_x86.Code).items() if value == raw.code), "")


def _place(register: Any) -> tuple[str, int, int]:
    """(general register, width in bytes, first bit) of a register operand."""
    import iced_x86

    ext, names = iced_x86.RegisterExt, iced_x86.Register
    if names.AH <= register <= names.BH:
        return GPR_NAMES[register - names.AH], 1, 8
    full = ext.full_register(register)
    return GPR_NAMES[full - names.RAX], ext.size(register), 0


def _get(context: VcContext, register: int) -> int:
    name, width, low = _place(register)
    value: int = getattr(context.regs, name)
    return value >> low & (1 << width * 8) - 1


def _set(context: VcContext, register: int, value: int) -> None:
    """Write a register operand: a 4-byte write clears the upper half, shorter ones keep the rest."""
    name, width, low = _place(register)
    mask = (1 << width * 8) - 1
    if width >= 4:
        setattr(context.regs, name, value & mask)
    else:
        kept = getattr(context.regs, name) & ~(mask << low)
        setattr(context.regs, name, kept | (value & mask) << low)


def _linear(context: VcContext, insn: VcInsn) -> int:
    """The linear address of the memory operand. Source: 24594, 1.7 and 1.2."""
    import iced_x86

    raw, names = insn.raw, iced_x86.Register
    offset = raw.memory_displacement
    if raw.is_ip_rel_memory_operand:
        offset += context.regs.rip  # the bytes were decoded as if they lay at 0
    else:
        if raw.memory_base != names.NONE:
            offset += _get(context, raw.memory_base)
        if raw.memory_index != names.NONE:
            offset += _get(context, raw.memory_index) * raw.memory_index_scale
    offset &= (1 << insn.address_bits) - 1
    name = ("es", "cs", "ss", "ds", "fs", "gs")[raw.memory_segment - names.ES]
    base = 0 if context.bits == 64 and name not in ("fs", "gs") else getattr(context.system, name)[3]
    return int(offset + base) & (MASK64 if context.bits == 64 else 0xFFFF_FFFF)
