"""What a #VC handler must know of the instruction that raised it. Decoding is iced-x86's; this names what we read."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.exitinfo import ADDRESS_BITS, IOIO_IN, IOIO_REP, IOIO_STRING, SEGMENT_NUMBERS
from sevlab.core.svm import ExitCode

if TYPE_CHECKING:
    from typing import Any

MNEMONICS: dict[int, tuple[str, ...]] = {
    ExitCode.DR7_READ: ("MOV",),
    ExitCode.DR7_WRITE: ("MOV",),
    ExitCode.RDTSC: ("RDTSC",),
    ExitCode.RDPMC: ("RDPMC",),
    ExitCode.CPUID: ("CPUID",),
    ExitCode.INVD: ("INVD",),
    ExitCode.IOIO: ("IN", "OUT", "INSB", "INSW", "INSD", "OUTSB", "OUTSW", "OUTSD"),
    ExitCode.MSR: ("RDMSR", "WRMSR"),
    ExitCode.VMMCALL: ("VMMCALL",),
    ExitCode.RDTSCP: ("RDTSCP",),
    ExitCode.WBINVD: ("WBINVD",),
    ExitCode.MONITOR: ("MONITOR", "MONITORX"),
    ExitCode.MWAIT: ("MWAIT", "MWAITX"),
}
"""Which instructions raise #VC with which code. Source: Linux arch/x86/coco/sev/vc-shared.c (vc_check_opcode_bytes)."""


def may_raise(insn: VcInsn, code: int) -> bool:
    """Whether this instruction raises #VC with that code. Source: Linux vc-shared.c (vc_check_opcode_bytes)."""
    expected = MNEMONICS.get(code)
    return expected is None or insn.mnemonic in expected


class VcInsn(NamedTuple):
    """A decoded instruction: mnemonic in upper case, length in bytes, and iced-x86's view of it."""

    mnemonic: str
    length: int
    raw: Any
    address_bits: int
    rep: bool


@lru_cache(maxsize=4096)  # the same few instructions raise #VC again and again
def decode(data: bytes, bits: int) -> VcInsn | None:
    """The instruction at the start of `data` in 16, 32 or 64-bit code; None when there is none."""
    import iced_x86

    raw = iced_x86.Decoder(bits, data).decode()
    if raw.is_invalid:
        return None
    names = _mnemonic_names()
    return VcInsn(names[raw.mnemonic], raw.len, raw, _address_bits(data, bits), raw.has_rep_prefix)


@lru_cache(maxsize=1)
def _mnemonic_names() -> dict[int, str]:
    import iced_x86

    return {value: name for name, value in vars(iced_x86.Mnemonic).items() if isinstance(value, int)}


def _address_bits(data: bytes, bits: int) -> int:
    """Address size in bits: that of the code, or the other one with a 67h prefix."""
    for byte in data:
        if byte == 0x67:
            return {64: 32, 32: 16, 16: 32}[bits]
        if byte not in LEGACY_PREFIXES:
            break
    return bits


LEGACY_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))


def ioio_info(insn: VcInsn, dx: int) -> int:
    """EXITINFO1 that a #VC handler makes of an I/O instruction: ES for INS, DS for OUTS whatever the prefix says.

    Source: Linux arch/x86/coco/sev/vc-shared.c (vc_ioio_exitinfo); edk2 OvmfPkg/Library/CcExitLib/CcExitVcHandler.c.
    """
    mnemonic = insn.mnemonic
    info = ADDRESS_BITS[insn.address_bits]
    if insn.rep:
        info |= IOIO_REP
    if mnemonic.startswith("INS"):
        return info | IOIO_IN | IOIO_STRING | SEGMENT_NUMBERS["ES"] << 10 | _STRING_SIZES[mnemonic[-1]] << 4 | dx << 16
    if mnemonic.startswith("OUTS"):
        return info | IOIO_STRING | SEGMENT_NUMBERS["DS"] << 10 | _STRING_SIZES[mnemonic[-1]] << 4 | dx << 16
    import iced_x86

    raw = insn.raw
    is_in = mnemonic == "IN"
    kinds = (raw.op0_kind, raw.op1_kind)
    port = raw.immediate8 if iced_x86.OpKind.IMMEDIATE8 in kinds else dx
    register = raw.op0_register if is_in else raw.op1_register
    size = {iced_x86.Register.AL: 1, iced_x86.Register.AX: 2}.get(register, 4)
    return info | int(is_in) | size << 4 | port << 16


_STRING_SIZES = {"B": 1, "W": 2, "D": 4}
