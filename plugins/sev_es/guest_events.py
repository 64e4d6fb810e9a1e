"""The reference guest's handlers of each event, as Linux has them; where edk2 differs, `profile` says so.

Source: Linux arch/x86/coco/sev/vc-handle.c and vc-shared.c; edk2 OvmfPkg/Library/CcExitLib/CcExitVcHandler.c.
"""

from __future__ import annotations

from collections.abc import Callable

from sevlab.core.cpu import GPR_NAMES
from sevlab.core.events import Fault
from sevlab.core.exitinfo import IOIO_IN, IOIO_REP, IOIO_STRING
from sevlab.core.svm import ExitCode, Vector
from sevlab.core.units import MASK64
from sevlab.plugins.sev_es.ghcb import SHARED_BUFFER_BYTES, NaeCode
from sevlab.plugins.sev_es.guest import (
    CR4_OSXSAVE,
    DR7_RESET,
    GENERAL_PROTECTION,
    MsrExit,
    Outcome,
    PageExit,
    VcContext,
    VcEnd,
    VcHandler,
    VcResult,
    call,
)
from sevlab.plugins.sev_es.guest_mmio import mmio
from sevlab.plugins.sev_es.insn import VcInsn, ioio_info
from sevlab.plugins.sev_es.msr_layout import INFO_MASK, CpuidRequest, MsrInfo, build

MASK32 = 0xFFFF_FFFF
RFLAGS_DF = 1 << 10
DR7_WRITABLE = 0xFFFF_23FF
INDEXED_LEAVES = frozenset((4, 7, 0xB, 0xD, 0xF, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1D, 0x1E, 0x1F, 0x24, 0x8000_001D))
"""Source: Linux arch/x86/kvm/cpuid.c and coco/sev (cpuid_function_is_indexed)."""
LEAF_MAX_EXTENDED, LEAF_ENCRYPTION = 0x8000_0000, 0x8000_001F
CPUID_SEV = 1 << 1


def done(insn: VcInsn) -> VcResult:
    """The instruction is served."""
    return VcResult(Outcome.DONE, insn.length)


# Without a GHCB ---------------------------------------------------------------------------------------------------


def before_ghcb(context: VcContext) -> VcHandler:
    """Only CPUID, a register at a time over the MSR; anything else ends the guest.

    An answer that denies SEV is a lie, since the guest got #VC. Source: Linux arch/x86/coco/sev (do_vc_no_ghcb).
    """
    regs = context.regs
    leaf, subleaf = regs.rax & MASK32, regs.rcx & MASK32
    if context.code != ExitCode.CPUID or (leaf in INDEXED_LEAVES and subleaf):
        return VcResult(Outcome.TERMINATE, reason=f"#VC {context.code:#x} without a GHCB")
    values = []
    for register in range(4):
        reply = yield MsrExit(build(CpuidRequest, MsrInfo.CPUID_REQUEST, register=register, function=leaf))
        if not isinstance(reply, int) or reply & INFO_MASK != MsrInfo.CPUID_RESPONSE:
            return VcResult(Outcome.TERMINATE, reason="the answer is no CPUID response")
        values.append(reply >> 32)
    regs.rax, regs.rbx, regs.rcx, regs.rdx = values
    if (leaf == LEAF_MAX_EXTENDED and values[0] < LEAF_ENCRYPTION) or (
        leaf == LEAF_ENCRYPTION and not values[0] & CPUID_SEV
    ):
        return VcResult(Outcome.TERMINATE, reason="CPUID denies SEV")
    return VcResult(Outcome.DONE, 2)


# Registers only ---------------------------------------------------------------------------------------------------


def cpuid(context: VcContext, insn: VcInsn) -> VcHandler:
    """CPUID, with XCR0 (1 while the kernel has not switched XSAVE on). Source: Linux vc-shared.c (vc_handle_cpuid)."""
    regs, system = context.regs, context.system
    xcr0 = system.xcr0 if system.cr4 & CR4_OSXSAVE else 1
    request = PageExit(ExitCode.CPUID, fields={"rax": regs.rax, "rcx": regs.rcx, "xcr0": xcr0})
    reply = yield from call(context, request, "rax", "rbx", "rcx", "rdx")
    _take(context, reply.registers, "rax", "rbx", "rcx", "rdx")
    return done(insn)


def _take(context: VcContext, values: object, *names: str) -> None:
    for name in names:
        setattr(context.regs, name, values[name])  # type: ignore[index]  # a mapping


def rdtsc(context: VcContext, insn: VcInsn) -> VcHandler:
    """RDTSC and RDTSCP. Source: Linux vc-shared.c (vc_handle_rdtsc)."""
    names = ("rax", "rdx", "rcx") if context.code == ExitCode.RDTSCP else ("rax", "rdx")
    reply = yield from call(context, PageExit(context.code), *names)
    _take(context, reply.registers, *names)
    return done(insn)


def rdpmc(context: VcContext, insn: VcInsn) -> VcHandler:
    """RDPMC. Source: Linux vc-handle.c (vc_handle_rdpmc)."""
    reply = yield from call(context, PageExit(context.code, fields={"rcx": context.regs.rcx}), "rax", "rdx")
    _take(context, reply.registers, "rax", "rdx")
    return done(insn)


def msr(context: VcContext, insn: VcInsn) -> VcHandler:
    """RDMSR and WRMSR. Source: Linux vc-handle.c (vc_handle_msr)."""
    regs = context.regs
    if insn.mnemonic == "WRMSR":
        fields = {"rcx": regs.rcx, "rax": regs.rax, "rdx": regs.rdx}
        yield from call(context, PageExit(ExitCode.MSR, 1, fields=fields))
        return done(insn)
    reply = yield from call(context, PageExit(ExitCode.MSR, fields={"rcx": regs.rcx}), "rax", "rdx")
    _take(context, reply.registers, "rax", "rdx")
    return done(insn)


def plain(context: VcContext, insn: VcInsn) -> VcHandler:
    """WBINVD: a request without anything. Source: Linux vc-handle.c (vc_handle_wbinvd)."""
    yield from call(context, PageExit(context.code))
    return done(insn)


def invd(context: VcContext, insn: VcInsn) -> VcHandler:
    """INVD: Linux refuses it, edk2 sends it. Source: Linux vc-handle.c; edk2 CcExitVcHandler.c (InvdExit)."""
    if context.profile != "edk2":
        return VcResult(Outcome.UNSUPPORTED, reason="#VC for INVD")
    return (yield from plain(context, insn))


def monitor(context: VcContext, insn: VcInsn) -> VcHandler:
    """MONITOR and MWAIT: nothing for Linux; edk2 tells the hypervisor. Source: Linux vc-handle.c; edk2 MonitorExit."""
    if context.profile == "edk2":
        regs = context.regs
        fields = {"rax": regs.rax, "rcx": regs.rcx}
        if context.code == ExitCode.MONITOR:
            fields["rdx"] = regs.rdx
        yield from call(context, PageExit(context.code, fields=fields))
    return done(insn)


def vmmcall(context: VcContext, insn: VcInsn) -> VcHandler:
    """VMMCALL, with the registers of the hypervisor's ABI if it is known; those that come back valid are its results.

    Source: Linux vc-handle.c (vc_handle_vmmcall), arch/x86/include/asm/x86_init.h (sev_es_hcall_prepare and _finish).
    """
    regs = context.regs
    fields = {"rax": regs.rax, "cpl": 3 if context.user else 0}
    more = context.hypercall_registers
    fields |= {name: getattr(regs, name) for name in more}
    reply = yield from call(context, PageExit(context.code, fields=fields, returns=more), "rax")
    _take(context, reply.registers, "rax", *(name for name in more if name in reply.registers))
    return done(insn)


def dr7_read(context: VcContext, insn: VcInsn) -> VcHandler:
    """DR7 read: the handler's own copy, no exit. Source: Linux vc-handle.c (vc_handle_dr7_read)."""
    setattr(context.regs, _dr7_register(insn, 0), context.dr7)
    return done(insn)
    yield  # a handler is a generator, even one that asks nothing


def dr7_write(context: VcContext, insn: VcInsn) -> VcHandler:
    """DR7 write: #GP for an upper half, reserved bits corrected. Source: Linux vc-handle.c (vc_handle_dr7_write)."""
    value = getattr(context.regs, _dr7_register(insn, 1))
    if value >> 32:
        return VcResult(Outcome.EXCEPTION, fault=GENERAL_PROTECTION)
    value = value & DR7_WRITABLE | DR7_RESET
    yield from call(context, PageExit(context.code, fields={"rax": value}))
    context.dr7 = value
    return done(insn)


def _dr7_register(insn: VcInsn, operand: int) -> str:
    """The register that goes to or comes from DR7; any other MOV cannot raise this #VC.

    Source: Linux vc-shared.c (vc_check_opcode_bytes).
    """
    import iced_x86

    if insn.raw.op_register(1 - operand) != iced_x86.Register.DR7:
        raise VcEnd(VcResult(Outcome.UNSUPPORTED, reason="#VC of DR7 at another MOV"))
    register = insn.raw.op_register(operand)
    first = iced_x86.Register.RAX if register >= iced_x86.Register.RAX else iced_x86.Register.EAX
    return GPR_NAMES[int(register - first)]


# Ports ------------------------------------------------------------------------------------------------------------


def ioio(context: VcContext, insn: VcInsn) -> VcHandler:
    """IN, OUT, INS, OUTS; user space only where its I/O bitmap says so. Source: Linux vc-shared.c (vc_handle_ioio)."""
    regs = context.regs
    info = ioio_info(insn, regs.rdx & 0xFFFF)
    width = info >> 4 & 7
    if context.user and not context.io_allowed(info >> 16 & 0xFFFF, width):
        return VcResult(Outcome.EXCEPTION, fault=GENERAL_PROTECTION)
    if info & IOIO_STRING:
        return (yield from _string(context, insn, info))
    if info & IOIO_IN:
        reply = yield from call(context, PageExit(ExitCode.IOIO, info, fields={"rax": 0}), "rax")
        value = reply.registers["rax"] & (1 << width * 8) - 1
        regs.rax = value if width == 4 else regs.rax & -(1 << width * 8) & MASK64 | value
        return done(insn)
    value = regs.rax & (1 << width * 8) - 1
    yield from call(context, PageExit(ExitCode.IOIO, info, fields={"rax": value}))
    return done(insn)


def _string(context: VcContext, insn: VcInsn, info: int) -> VcHandler:
    """INS and OUTS: at most a shared buffer of elements for each #VC; the rest by executing the instruction again.

    Linux takes the base of ES for OUTS too. Source: Linux vc-shared.c (vc_handle_ioio).
    """
    regs, width = context.regs, info >> 4 & 7
    wanted = regs.rcx if info & IOIO_REP else 1
    count = min(wanted, SHARED_BUFFER_BYTES // width)
    step = -width if regs.rflags & RFLAGS_DF else width
    base = 0 if context.bits == 64 else context.system.es[3]
    pointer = "rdi" if info & IOIO_IN else "rsi"
    start = base + getattr(regs, pointer)
    data = b""
    if not info & IOIO_IN:
        data = b"".join(context.read(start + index * step & MASK64, width) for index in range(count))
    wanted_back = count * width if info & IOIO_IN else 0
    reply = yield from call(
        context, PageExit(ExitCode.IOIO, info, count, data=data, scratch=True, buffer_bytes=wanted_back)
    )
    if info & IOIO_IN:
        for index in range(count):
            context.write(start + index * step & MASK64, reply.data[index * width : (index + 1) * width])
    setattr(regs, pointer, getattr(regs, pointer) + count * step & MASK64)
    if info & IOIO_REP:
        regs.rcx = regs.rcx - count & MASK64
        if regs.rcx:
            return VcResult(Outcome.RETRY)
    return done(insn)


# What is not asked ------------------------------------------------------------------------------------------------


def forward(context: VcContext, insn: VcInsn) -> VcHandler:
    """#DB and #AC that arrive as #VC go to their own handlers. Source: Linux vc-handle.c (vc_handle_exitcode)."""
    return VcResult(Outcome.FORWARD, fault=Fault(context.code - ExitCode.EXCEPTION_0, 0, 0))
    yield  # a handler is a generator, even one that asks nothing


def unsupported(context: VcContext) -> VcHandler:
    """A code that no handler takes: Linux gives up, edk2 tells the hypervisor and raises #GP if that comes back.

    Source: Linux vc-handle.c; edk2 CcExitVcHandler.c (UnsupportedExit).
    """
    if context.profile == "edk2":
        yield from call(context, PageExit(NaeCode.UNSUPPORTED, context.code))
        return VcResult(Outcome.EXCEPTION, fault=GENERAL_PROTECTION)
    return VcResult(Outcome.UNSUPPORTED, reason=f"no handler of #VC {context.code:#x}")


HANDLERS: dict[int, Callable[[VcContext, VcInsn], VcHandler]] = {
    ExitCode.CPUID: cpuid,
    ExitCode.RDTSC: rdtsc,
    ExitCode.RDTSCP: rdtsc,
    ExitCode.RDPMC: rdpmc,
    ExitCode.MSR: msr,
    ExitCode.WBINVD: plain,
    ExitCode.INVD: invd,
    ExitCode.MONITOR: monitor,
    ExitCode.MWAIT: monitor,
    ExitCode.VMMCALL: vmmcall,
    ExitCode.DR7_READ: dr7_read,
    ExitCode.DR7_WRITE: dr7_write,
    ExitCode.IOIO: ioio,
    ExitCode.NPF: mmio,
    ExitCode.EXCEPTION_0 + Vector.DB: forward,
    ExitCode.EXCEPTION_0 + Vector.AC: forward,
}
"""By error code of the #VC."""
