"""What becomes of a captured exit when its guest is encrypted.

Source: 24593, 15.35.4 (automatic and non-automatic exits); 56421, table of NAE events; Linux arch/x86/kvm/svm/sev.c
(sev_es_init_vmcb: which intercepts are removed, which write traps take their place), arch/x86/coco/sev/vc-handle.c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sevlab.core.cpu import GPR_NAMES, Registers
from sevlab.core.porting import Judgement, Path
from sevlab.core.svm import ExitCode, Vector, exit_name
from sevlab.core.units import MASK32, MASK64, PAGE_BYTES
from sevlab.plugins.io import MATRIX, Form, Insn, decode, form_of, write_register

if TYPE_CHECKING:
    from sevlab.core.events import GuestExit

EFER, PAT = 0xC000_0080, 0x277
STAYS = frozenset(
    (
        ExitCode.INTR,
        ExitCode.NMI,
        ExitCode.SMI,
        ExitCode.INIT,
        ExitCode.VINTR,
        ExitCode.PAUSE,
        ExitCode.HLT,
        ExitCode.SHUTDOWN,
        ExitCode.EXCEPTION_0 + Vector.MC,
    )
)
"""Automatic exits. Source: 24593, table 15-35."""

NAE = frozenset(
    (
        ExitCode.CPUID,
        ExitCode.RDTSC,
        ExitCode.RDTSCP,
        ExitCode.RDPMC,
        ExitCode.INVD,
        ExitCode.WBINVD,
        ExitCode.IOIO,
        ExitCode.MSR,
        ExitCode.VMMCALL,
        ExitCode.MONITOR,
        ExitCode.MWAIT,
        ExitCode.DR7_READ,
        ExitCode.DR7_WRITE,
    )
)
"""Exits with an NAE event. Source: 56421, table of NAE events."""

INSTRUCTIONS: dict[int, bytes] = {
    ExitCode.CPUID: b"\x0f\xa2",
    ExitCode.RDTSC: b"\x0f\x31",
    ExitCode.RDTSCP: b"\x0f\x01\xf9",
    ExitCode.RDPMC: b"\x0f\x33",
    ExitCode.INVD: b"\x0f\x08",
    ExitCode.WBINVD: b"\x0f\x09",
    ExitCode.VMMCALL: b"\x0f\x01\xd9",
    ExitCode.MONITOR: b"\x0f\x01\xc8",
    ExitCode.MWAIT: b"\x0f\x01\xc9",
    ExitCode.DR7_READ: b"\x0f\x21\xf8",
    ExitCode.DR7_WRITE: b"\x0f\x23\xf8",
}
"""What the guest executed where the log has no bytes: the exit has one instruction, up to the register."""

RDMSR, WRMSR, INSB, OUTSB = b"\x0f\x32", b"\x0f\x30", b"\xf3\x6c", b"\xf3\x6e"
MOV_TO_RBX, MOV_FROM_RBX = b"\x89\x03", b"\x8b\x03"

NO_INTERCEPT = {
    **dict.fromkeys(range(0x20), "write traps and the guest's own registers take its place"),
    ExitCode.CR0_SEL_WRITE: "the CR0 write trap takes its place",
    **dict.fromkeys(range(0x20, 0x40), "debug registers other than DR7 are the guest's own"),
    **dict.fromkeys(range(0x40, 0x60), "exceptions are not intercepted: nobody can read the instruction"),
    ExitCode.INVLPG: "not intercepted with nested paging",
    ExitCode.INVLPGA: "not intercepted",
    ExitCode.SWINT: "not intercepted",
    ExitCode.IRET: "an encrypted guest says NMI_COMPLETE instead",
    ExitCode.XSETBV: "XCR0 is part of the save area",
}
"""Exits whose intercept goes away."""

NO_SERVICE = {
    ExitCode.RSM: "there is no system management mode",
    ExitCode.TASK_SWITCH: "a task switch needs the TSS and the instruction",
    **dict.fromkeys(range(ExitCode.VMRUN, ExitCode.SKINIT + 1), "no NAE event for SVM instructions"),
}
NO_SERVICE.pop(ExitCode.VMMCALL, None)
STRING = 1 << 2
OPERAND_GPA = 0x8000
"""Where the operand of a string instruction lies in the guest that executes it again."""

CROSSES = "the access crosses a page: each part would need its own request"


def sev_es(step: GuestExit, is_device: bool) -> Judgement:  # noqa: FBT001  # one of the type `Porting.judge`
    """Under SEV-ES."""
    code = step.exit_code
    if code == ExitCode.NPF:
        return _device(step) if is_device else Judgement(Path.STAYS, "RAM fault")
    if code in STAYS:
        return Judgement(Path.STAYS, exit_name(code))
    if code == ExitCode.MSR and dict(step.registers).get("rcx") in (EFER, PAT):
        number = dict(step.registers)["rcx"]
        why = "the EFER write trap takes its place" if number == EFER else "the PAT is part of the save area"
        return Judgement(Path.AUTOMATIC, "MSR EFER" if number == EFER else "MSR PAT", why)
    if code in NAE:
        if code == ExitCode.IOIO:
            return _port(step)
        value = step.stored[0] if step.stored else 0
        data = (("rax", value & MASK32), ("rdx", value >> 32)) if code == ExitCode.MSR else ()
        insn = step.insn or INSTRUCTIONS.get(code, WRMSR if step.exit_info_1 & 1 else RDMSR)
        return Judgement(Path.NAE, exit_name(code), insn=insn, registers=(*data, *step.registers))
    if code in NO_INTERCEPT:
        return Judgement(Path.AUTOMATIC, exit_name(code), NO_INTERCEPT[code])
    return Judgement(Path.CANNOT, exit_name(code), NO_SERVICE.get(code, "no NAE event"))


def _device(step: GuestExit) -> Judgement:
    """A nested fault on a device: what the guest's #VC handler can decode."""
    if not step.insn:
        # Xen's log has no instruction bytes; what was stored tells the direction.
        data = (("rbx", step.exit_info_2), ("rax", step.stored[0] if step.stored else 0))
        kind, move = ("MMIO write", MOV_TO_RBX) if step.stored else ("MMIO read", MOV_FROM_RBX)
        return Judgement(Path.NAE, kind, "instruction not in the log: a MOV stands for it", insn=move, registers=data)
    insn = decode(step.insn, step.mode or 64, step.rip)
    if not isinstance(insn, Insn):
        return Judgement(Path.CANNOT, "MMIO", "the instruction cannot be decoded")
    form = form_of(insn)
    row = MATRIX[form]
    writes = any("write" in operand.access for operand in insn.memory)
    kind = "MMIO string" if form is Form.MOVS else "MMIO write" if writes else "MMIO read"
    if row.linux_vc:
        return Judgement(Path.CANNOT, kind, f"{insn.mnemonic}: {row.linux_vc}", row.linux_vc, row.xen)
    size = insn.memory[0].size
    if (step.exit_info_2 & PAGE_BYTES - 1) + size > PAGE_BYTES or len(step.stored) > 1:
        return Judgement(Path.CANNOT, kind, f"{insn.mnemonic}: {CROSSES}", CROSSES, row.xen)
    registers = Registers(rcx=1)
    for operand in insn.operands:
        if operand.kind == "reg" and step.stored and "read" in operand.access:
            write_register(registers, operand.register, step.stored[0] & (1 << operand.size * 8) - 1)
    memory = insn.memory[0]
    if form is Form.MOVS:
        registers.rsi, registers.rdi = (OPERAND_GPA, step.exit_info_2)[:: 1 if step.stored else -1]
    elif memory.base:
        write_register(registers, memory.base, step.exit_info_2 - memory.displacement & MASK64)
    values = tuple((name, getattr(registers, name)) for name in GPR_NAMES)
    if memory.rip_relative:
        values = (("rip", step.rip + step.exit_info_2 - memory.displacement & MASK64), *values)
    if step.mode in (16, 32) and form is Form.MOV:
        value = step.stored[0] if step.stored else 0
        values = (("rbx", step.exit_info_2), ("rax", value))
        return Judgement(Path.NAE, kind, STANDS_FOR, "", row.xen, _move(size, writes=writes), values)
    return Judgement(Path.NAE, kind, "", "", row.xen, step.insn, values)


STANDS_FOR = "32-bit code: the same access in 64-bit code stands for it"


def _move(size: int, *, writes: bool) -> bytes:
    """MOV between [RBX] and the accumulator, `size` bytes wide."""
    opcode = (0x88 if writes else 0x8A) | (size > 1)
    return {2: b"\x66", 8: b"\x48"}.get(size, b"") + bytes((opcode, 0x03))


def _port(step: GuestExit) -> Judgement:
    """IN, OUT, INS, OUTS: EXITINFO1 and the length that EXITINFO2 gives determine the instruction."""
    info = step.exit_info_1
    size, port, value = info >> 4 & 7, info >> 16 & 0xFFFF, step.stored[0] if step.stored else 0
    if info & STRING:
        values = (("rdx", port), ("rsi", OPERAND_GPA), ("rdi", OPERAND_GPA), ("rcx", 1))
        return Judgement(Path.NAE, "IOIO string", insn=step.insn or (INSB if info & 1 else OUTSB), registers=values)
    direction = 0 if info & 1 else 2
    prefix, wide = (b"\x66" if size == 2 else b""), int(size > 1)
    if step.exit_info_2 - step.rip == len(prefix) + 2 and port < 0x100:
        insn = prefix + bytes((0xE4 + direction + wide, port))
    else:
        insn = prefix + bytes((0xEC + direction + wide,))
    return Judgement(Path.NAE, "IOIO", insn=insn, registers=(("rax", value), ("rdx", port)))


def sev(step: GuestExit, is_device: bool) -> Judgement:  # noqa: FBT001
    """Under SEV: registers are visible, memory is not."""
    code = step.exit_code
    if code == ExitCode.IOIO and step.exit_info_1 & STRING:
        return Judgement(Path.CANNOT, "IOIO string", MATRIX[Form.STRING_IO].sev)
    if code == ExitCode.EXCEPTION_0 + Vector.UD:
        return Judgement(Path.AUTOMATIC, exit_name(code), NO_INTERCEPT[code])
    if code == ExitCode.NPF and is_device and step.insn:
        insn = decode(step.insn, step.mode or 64, step.rip)
        row = MATRIX[form_of(insn)] if isinstance(insn, Insn) else MATRIX[Form.OTHER]
        kind = "MMIO write" if step.stored else "MMIO read"
        path = Path.CANNOT if row.sev else Path.STAYS
        return Judgement(path, kind, row.sev or "needs decode assist", row.linux_vc, row.xen)
    return Judgement(Path.STAYS, "RAM fault" if code == ExitCode.NPF and not is_device else exit_name(code))


JUDGES: dict[str, Callable[[GuestExit, bool], Judgement]] = {"sev": sev, "sev-es": sev_es, "snp": sev_es}
"""By feature. The exits of an SNP guest are those of SEV-ES; what it has to do for its memory comes on top."""
