"""Which instruction forms each party can serve for MMIO: the coverage matrix, as data.

Rows are forms of an access to memory, columns who emulates. A cell says yes, or why not. `assess` and the
hypervisor's handlers use the same rows. Source: Linux arch/x86/lib/insn-eval.c (insn_decode_mmio), edk2
OvmfPkg/Library/CcExitLib/CcExitVcHandler.c, Xen xen/arch/x86/x86_emulate/ and the SEV series' emulate hooks, KVM
arch/x86/kvm/emulate.c; collected in docs/io.md.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from sevlab.plugins.io.emulate import supported
from sevlab.plugins.io.modes import Mode

if TYPE_CHECKING:
    from sevlab.plugins.io.decode import Insn

YES = ""
NOT_EMULATED = "not emulated"
SECOND_OPERAND = "a second operand lies in encrypted memory"
NOT_DECODED = "the #VC handler does not decode it"
READ_MODIFY_WRITE = "a read-modify-write cannot be one device access"
REPEATED = "a repeated string operation is not taken over"


class Form(Enum):
    """Forms of an MMIO access."""

    MOV = "MOV register or immediate, memory"
    MOV_MOFFS = "MOV accumulator, moffs (A0-A3)"
    MOVX = "MOVZX, MOVSX"
    MOVSXD = "MOVSXD"
    MOVBE = "MOVBE"
    MOVNTI = "MOVNTI"
    STOS_LODS = "STOS, LODS"
    SCAS = "SCAS"
    ALU = "ADD, OR, ADC, SBB, AND, SUB, XOR, INC, DEC, NEG, NOT with memory destination"
    ALU_READ = "ALU operation with memory source; CMP, TEST"
    BIT = "BT, BTS, BTR, BTC"
    EXCHANGE = "XCHG, XADD"
    CMPXCHG = "CMPXCHG, CMPXCHG8B"
    CMPXCHG16B = "CMPXCHG16B"
    SHIFT = "shifts and rotates"
    SIMD = "SSE moves: MOVUPS, MOVAPS, MOVDQU, MOVDQA, MOVNTPS, MOVNTDQ, MOVSS, MOVSD and their PD forms"
    MOVS = "MOVS, CMPS"
    STACK = "PUSH, POP, CALL, JMP with memory operand"
    MOVDIR64B = "MOVDIR64B"
    STRING_IO = "INS, OUTS"
    OTHER = "anything else"


class Row(NamedTuple):
    """Why each party refuses the form; empty: it serves it."""

    plain: str = YES
    sev: str = YES
    linux_vc: str = YES
    edk2_vc: str = YES
    xen: str = YES
    kvm: str = YES


MATRIX: dict[Form, Row] = {
    Form.MOV: Row(),
    Form.MOV_MOFFS: Row(linux_vc=NOT_DECODED),  # edk2 decodes A0 to A3
    Form.MOVX: Row(),
    Form.MOVSXD: Row(linux_vc=NOT_DECODED, edk2_vc=NOT_DECODED),
    Form.MOVBE: Row(linux_vc=NOT_DECODED, edk2_vc=NOT_DECODED),
    Form.MOVNTI: Row(linux_vc=NOT_DECODED, edk2_vc=NOT_DECODED),
    Form.STOS_LODS: Row(linux_vc=NOT_DECODED, edk2_vc=NOT_DECODED),
    Form.SCAS: Row(linux_vc=NOT_DECODED, edk2_vc=NOT_DECODED),
    Form.ALU: Row(linux_vc=NOT_DECODED, edk2_vc=NOT_DECODED),
    Form.ALU_READ: Row(linux_vc=NOT_DECODED, edk2_vc=NOT_DECODED),
    Form.BIT: Row(linux_vc=NOT_DECODED, edk2_vc=NOT_DECODED),
    Form.EXCHANGE: Row(linux_vc=NOT_DECODED, edk2_vc=NOT_DECODED),
    Form.CMPXCHG: Row(sev=READ_MODIFY_WRITE, linux_vc=NOT_DECODED, edk2_vc=NOT_DECODED),
    Form.CMPXCHG16B: Row(sev=READ_MODIFY_WRITE, linux_vc=NOT_DECODED, edk2_vc=NOT_DECODED, kvm=NOT_EMULATED),
    Form.SHIFT: Row(linux_vc=NOT_DECODED, edk2_vc=NOT_DECODED),
    Form.SIMD: Row(linux_vc=NOT_DECODED, edk2_vc=NOT_DECODED),
    Form.MOVS: Row(sev=SECOND_OPERAND, edk2_vc=NOT_DECODED),
    Form.STACK: Row(sev=SECOND_OPERAND, linux_vc=NOT_DECODED, edk2_vc=NOT_DECODED),
    Form.MOVDIR64B: Row(sev=SECOND_OPERAND, linux_vc=NOT_DECODED, edk2_vc=NOT_DECODED, kvm=NOT_EMULATED),
    Form.STRING_IO: Row(sev="the operand is a virtual address", linux_vc=YES),
    Form.OTHER: Row(NOT_EMULATED, NOT_EMULATED, NOT_DECODED, NOT_DECODED, NOT_EMULATED, NOT_EMULATED),
}

COLUMNS = {
    "plain": "plain guest, hypervisor emulates",
    "sev": "SEV guest, hypervisor emulates",
    "linux_vc": "SEV-ES guest, Linux #VC handler",
    "edk2_vc": "SEV-ES guest, edk2 #VC handler",
    "xen": "Xen's emulator, plain guest",
    "kvm": "KVM's emulator, plain guest",
}

_ALU_WRITERS = frozenset(("add", "or", "adc", "sbb", "and", "sub", "xor", "inc", "dec", "neg", "not"))
_SHIFTS = frozenset(("shl", "sal", "shr", "sar", "rol", "ror", "rcl", "rcr", "shld", "shrd"))
_STEMS = {"stos": Form.STOS_LODS, "lods": Form.STOS_LODS, "scas": Form.SCAS, "movs": Form.MOVS, "cmps": Form.MOVS}
_BY_MNEMONIC: dict[str, Form] = {
    "movzx": Form.MOVX,
    "movsx": Form.MOVX,
    "movsxd": Form.MOVSXD,
    "movbe": Form.MOVBE,
    "movnti": Form.MOVNTI,
    "xchg": Form.EXCHANGE,
    "xadd": Form.EXCHANGE,
    "cmpxchg": Form.CMPXCHG,
    "cmpxchg8b": Form.CMPXCHG,
    "cmpxchg16b": Form.CMPXCHG16B,
    "movdir64b": Form.MOVDIR64B,
    "cmp": Form.ALU_READ,
    "test": Form.ALU_READ,
    **dict.fromkeys(("bt", "bts", "btr", "btc"), Form.BIT),
    **dict.fromkeys(_SHIFTS, Form.SHIFT),
    **dict.fromkeys(("push", "pop", "call", "jmp"), Form.STACK),
    **dict.fromkeys(("movups", "movaps", "movupd", "movapd", "movdqu", "movdqa", "movss"), Form.SIMD),
    **dict.fromkeys(("movntps", "movntpd", "movntdq"), Form.SIMD),
    **dict.fromkeys(("insb", "insw", "insd", "outsb", "outsw", "outsd"), Form.STRING_IO),
    **{f"{stem}{suffix}": form for stem, form in _STEMS.items() for suffix in "bwdq"},
}


def form_of(insn: Insn) -> Form:
    """The row of an instruction."""
    if insn.mnemonic == "mov":
        return Form.MOV_MOFFS if "MOFFS" in insn.code else Form.MOV
    if insn.mnemonic in _ALU_WRITERS:
        return Form.ALU if insn.operands and insn.operands[0].kind == "mem" else Form.ALU_READ
    if insn.mnemonic == "movsd" and "XMM" in insn.code:
        return Form.SIMD  # two instructions have this name
    return _BY_MNEMONIC.get(insn.mnemonic, Form.OTHER)


def refusal(insn: Insn, mode: Mode) -> str:
    """Why the hypervisor cannot emulate `insn` for a guest in `mode`; empty when it can."""
    form = form_of(insn)
    row = MATRIX[form]
    reason = {Mode.PLAIN: row.plain, Mode.SEV: row.sev}.get(mode, "the guest's registers are encrypted")
    if not reason and mode is Mode.SEV and insn.prefixes and form in (Form.STOS_LODS, Form.SCAS):
        reason = REPEATED
    return reason or supported(insn)


def markdown_table() -> str:
    """The matrix for documentation."""
    lines = [f"| Form | {' | '.join(COLUMNS.values())} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    for form, row in MATRIX.items():
        cells = " | ".join(reason or "yes" for reason in row)
        lines.append(f"| {form.value} | {cells} |")
    return "\n".join(lines)
