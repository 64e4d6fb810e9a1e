"""SVM exit codes and the formats around them, as numbers.

Source: spec 24593 (APM volume 2), appendix C; the same numbers in Linux arch/x86/include/uapi/asm/svm.h and Xen
xen/arch/x86/hvm/svm/vmcb.h.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag


class ExitCode(IntEnum):
    """SVM exit codes that have one meaning each; CR, DR and exception codes are ranges (`CR0_READ` + n, ...)."""

    CR0_READ = 0x00
    CR0_WRITE = 0x10
    DR0_READ = 0x20
    DR7_READ = 0x27
    DR0_WRITE = 0x30
    DR7_WRITE = 0x37
    EXCEPTION_0 = 0x40
    INTR = 0x60
    NMI = 0x61
    SMI = 0x62
    INIT = 0x63
    VINTR = 0x64
    CR0_SEL_WRITE = 0x65
    IDTR_READ = 0x66
    GDTR_READ = 0x67
    LDTR_READ = 0x68
    TR_READ = 0x69
    IDTR_WRITE = 0x6A
    GDTR_WRITE = 0x6B
    LDTR_WRITE = 0x6C
    TR_WRITE = 0x6D
    RDTSC = 0x6E
    RDPMC = 0x6F
    PUSHF = 0x70
    POPF = 0x71
    CPUID = 0x72
    RSM = 0x73
    IRET = 0x74
    SWINT = 0x75
    INVD = 0x76
    PAUSE = 0x77
    HLT = 0x78
    INVLPG = 0x79
    INVLPGA = 0x7A
    IOIO = 0x7B
    MSR = 0x7C
    TASK_SWITCH = 0x7D
    FERR_FREEZE = 0x7E
    SHUTDOWN = 0x7F
    VMRUN = 0x80
    VMMCALL = 0x81
    VMLOAD = 0x82
    VMSAVE = 0x83
    STGI = 0x84
    CLGI = 0x85
    SKINIT = 0x86
    RDTSCP = 0x87
    ICEBP = 0x88
    WBINVD = 0x89
    MONITOR = 0x8A
    MWAIT = 0x8B
    MWAIT_CONDITIONAL = 0x8C
    XSETBV = 0x8D
    RDPRU = 0x8E
    EFER_WRITE_TRAP = 0x8F
    CR0_WRITE_TRAP = 0x90
    INVLPGB = 0xA0
    ILLEGAL_INVLPGB = 0xA1
    INVPCID = 0xA2
    MCOMMIT = 0xA3
    TLBSYNC = 0xA4
    BUS_LOCK = 0xA5
    IDLE_HLT = 0xA6
    NPF = 0x400
    AVIC_INCOMPLETE_IPI = 0x401
    AVIC_NOACCEL = 0x402
    VMGEXIT = 0x403
    PAGE_NOT_VALIDATED = 0x404
    INVALID = 0xFFFF_FFFF_FFFF_FFFF
    BUSY = 0xFFFF_FFFF_FFFF_FFFE


EXIT_NAMES: dict[int, str] = {
    **{0x00 + n: f"CR{n}_READ" for n in range(16)},
    **{0x10 + n: f"CR{n}_WRITE" for n in range(16)},
    **{0x20 + n: f"DR{n}_READ" for n in range(16)},
    **{0x30 + n: f"DR{n}_WRITE" for n in range(16)},
    **{0x40 + n: f"EXCEPTION_{n}" for n in range(32)},
    **{0x90 + n: f"CR{n}_WRITE_TRAP" for n in range(16)},
    **{code.value: code.name for code in ExitCode if code.name not in ("EXCEPTION_0", "CR0_READ", "CR0_WRITE")},
}
"""Names by exit code, ranges spelled out."""

ALWAYS_EXITS = 0x400
"""From this code on there is no intercept bit: the hardware always leaves the guest."""


def exit_name(exit_code: int) -> str:
    """The name of an exit code, or its number where it has none."""
    return EXIT_NAMES.get(exit_code, f"{exit_code:#x}")


class NpfError(IntFlag):
    """EXITINFO1 of a nested page fault. Source: spec 24593, 15.25.6 and 15.36.10."""

    P = 1 << 0
    W = 1 << 1
    U = 1 << 2
    RSVD = 1 << 3
    ID = 1 << 4
    RMP = 1 << 31
    FINAL = 1 << 32
    TABLE_WALK = 1 << 33
    ENC = 1 << 34
    SIZEM = 1 << 35
    VMPL = 1 << 36
    SSS = 1 << 37


class Vector(IntEnum):
    """Exception vectors."""

    DE = 0
    DB = 1
    NMI = 2
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    MF = 16
    AC = 17
    MC = 18
    XF = 19
    CP = 21
    HV = 28
    VC = 29
    SX = 30


class EventType(IntEnum):
    """Bits 10:8 of EVENTINJ and EXITINTINFO. Source: spec 24593, 15.20."""

    INTERRUPT = 0
    NMI = 2
    EXCEPTION = 3
    SOFTWARE = 4


EVENT_VALID = 1 << 31
EVENT_ERROR_VALID = 1 << 11


def event(vector: int, kind: EventType, error_code: int | None = None) -> int:
    """An EVENTINJ word: `vector` 0-255, its type, and a 32-bit error code where the exception has one."""
    word = EVENT_VALID | kind << 8 | vector & 0xFF
    return word if error_code is None else word | EVENT_ERROR_VALID | (error_code & 0xFFFF_FFFF) << 32
