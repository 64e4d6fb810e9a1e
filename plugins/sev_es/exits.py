"""Which exits leave an encrypted guest by themselves, and which become #VC.

An automatic exit (AE) goes to the hypervisor; any other intercepted event (NAE) is reflected to the guest as exception
29 with the exit code as error code.
Source: 24593, 15.35.4 and table 15-35; coconut-svsm cpuarch/src/vmsa.rs; Linux arch/x86/include/uapi/asm/svm.h.
"""

from __future__ import annotations

from enum import Enum

from sevlab.core.svm import EXIT_NAMES, ExitCode, NpfError, Vector


class ExitClass(Enum):
    """How an intercepted event leaves an encrypted guest."""

    AE = "automatic exit"
    NAE = "#VC"
    VC_ONLY = "#VC, and never an intercept"


AUTOMATIC = frozenset(
    (
        ExitCode.EXCEPTION_0 + Vector.MC,
        ExitCode.INTR,
        ExitCode.NMI,
        ExitCode.SMI,
        ExitCode.INIT,
        ExitCode.VINTR,
        ExitCode.PAUSE,
        ExitCode.HLT,
        ExitCode.SHUTDOWN,
        ExitCode.EFER_WRITE_TRAP,
        *range(ExitCode.CR0_WRITE_TRAP, ExitCode.CR0_WRITE_TRAP + 16),
        ExitCode.BUS_LOCK,
        ExitCode.IDLE_HLT,
        ExitCode.AVIC_INCOMPLETE_IPI,
        ExitCode.AVIC_NOACCEL,
        ExitCode.VMGEXIT,
        ExitCode.INVALID,
        ExitCode.BUSY,
    )
)
"""Automatic exits apart from nested page faults. UNVERIFIED: bus lock, idle HLT, and the two of AVIC."""

NPF, NPF_MMIO, NOT_VALIDATED = int(ExitCode.NPF), int(NpfError.RSVD), int(ExitCode.PAGE_NOT_VALIDATED)
_AE, _NAE, _VC_ONLY = ExitClass
"""A look at an enumeration's member costs more than the rest of the question, at every exit."""


def exit_class(exit_code: int, exit_info_1: int = 0) -> ExitClass:
    """The class of an exit; a nested page fault is reflected only when a reserved bit made it: that is MMIO."""
    if exit_code in AUTOMATIC:
        return _AE
    if exit_code == NPF:
        return _NAE if exit_info_1 & NPF_MMIO else _AE
    return _VC_ONLY if exit_code == NOT_VALIDATED else _NAE


def markdown_table() -> str:
    """The classes for documentation, runs of codes together."""
    lines = ["| Exit | Class |", "| --- | --- |"]
    for code in sorted(EXIT_NAMES):
        name = EXIT_NAMES[code]
        if code == ExitCode.NPF:
            lines.append(f"| {code:#x} {name} | automatic exit, or #VC where a reserved bit made it (MMIO) |")
        else:
            lines.append(f"| {code:#x} {name} | {exit_class(code).value} |")
    return "\n".join(lines)
