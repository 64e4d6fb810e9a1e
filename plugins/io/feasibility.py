"""Which event can be intercepted and served in which mode: the table of spec questions, as data.

Source: docs/io.md, collected from Linux arch/x86/kvm/svm/{svm,sev}.c (sev_es_init_vmcb), arch/x86/coco/sev/vc-handle.c
and Xen xen/arch/x86/hvm/svm/svm.c.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from sevlab.core.svm import ExitCode
from sevlab.plugins.io.modes import Mode


class Way(Enum):
    """How an event is served."""

    HYPERVISOR = "handled by the hypervisor"
    GUEST = "handled by the guest through #VC"
    NATIVE = "must not be intercepted: the guest does it alone"
    REFUSED = "cannot be served"


class Feasibility(NamedTuple):
    """The ways by mode, and why."""

    plain: Way
    sev: Way
    sev_es: Way
    why: str = ""

    def way(self, mode: Mode) -> Way:
        """The way in `mode`."""
        return {Mode.PLAIN: self.plain, Mode.SEV: self.sev, Mode.SEV_ES: self.sev_es}[mode]


H, G, N, R = Way.HYPERVISOR, Way.GUEST, Way.NATIVE, Way.REFUSED
X = ExitCode.EXCEPTION_0

EVENTS: dict[int, Feasibility] = {
    X + 1: Feasibility(H, H, N, "#DB: the guest's own without debug swap"),
    X + 3: Feasibility(H, H, N, "#BP needs the next RIP"),
    X + 6: Feasibility(H, N, N, "#UD must not be intercepted: the instruction cannot be decoded"),
    X + 7: Feasibility(H, H, N, "#NM: the host cannot restore an encrypted FPU state"),
    X + 14: Feasibility(H, N, N, "#PF: shadow paging needs readable page tables"),
    X + 17: Feasibility(H, H, G, "#AC: a guest that gets #VC forwards it to its own handler"),
    X + 18: Feasibility(H, H, H, "#MC is an automatic exit"),
    ExitCode.CR0_READ: Feasibility(H, H, N),
    ExitCode.CR0_WRITE: Feasibility(H, H, N, "write traps take its place: the register operand is not visible"),
    ExitCode.CR0_READ + 3: Feasibility(H, H, N),
    ExitCode.CR0_WRITE + 3: Feasibility(H, H, N),
    ExitCode.CR0_READ + 4: Feasibility(H, H, N),
    ExitCode.CR0_WRITE + 4: Feasibility(H, H, N),
    ExitCode.CR0_SEL_WRITE: Feasibility(H, H, N),
    ExitCode.DR0_READ: Feasibility(H, H, N),
    ExitCode.DR7_READ: Feasibility(H, H, G),
    ExitCode.DR7_WRITE: Feasibility(H, H, G),
    ExitCode.INTR: Feasibility(H, H, H),
    ExitCode.NMI: Feasibility(H, H, H),
    ExitCode.SMI: Feasibility(H, H, H),
    ExitCode.INIT: Feasibility(H, H, H),
    ExitCode.VINTR: Feasibility(H, H, H),
    ExitCode.RDTSC: Feasibility(H, H, G),
    ExitCode.RDTSCP: Feasibility(H, H, G),
    ExitCode.RDPMC: Feasibility(H, H, G),
    ExitCode.CPUID: Feasibility(H, H, G),
    ExitCode.IRET: Feasibility(H, H, N, "the NMI window; an encrypted guest says NMI_COMPLETE instead"),
    ExitCode.SWINT: Feasibility(H, H, N, "INT n: decode assist gives the vector, EVENTINJ needs the next RIP"),
    ExitCode.INVD: Feasibility(H, H, G),
    ExitCode.WBINVD: Feasibility(H, H, G),
    ExitCode.PAUSE: Feasibility(H, H, H),
    ExitCode.HLT: Feasibility(H, H, H),
    ExitCode.INVLPG: Feasibility(H, H, N, "decode assist gives the linear address"),
    ExitCode.INVLPGA: Feasibility(H, H, N),
    ExitCode.IOIO: Feasibility(H, H, G),
    ExitCode.MSR: Feasibility(H, H, G),
    ExitCode.TASK_SWITCH: Feasibility(
        R, R, G, "needs the TSS and the instruction, and there is never a next RIP; no #VC handler serves it"
    ),
    ExitCode.SHUTDOWN: Feasibility(H, H, H),
    ExitCode.VMMCALL: Feasibility(H, H, G),
    ExitCode.MONITOR: Feasibility(H, H, G),
    ExitCode.MWAIT: Feasibility(H, H, G),
    ExitCode.XSETBV: Feasibility(H, H, N),
    ExitCode.EFER_WRITE_TRAP: Feasibility(H, H, H),
    ExitCode.CR0_WRITE_TRAP: Feasibility(H, H, H),
    ExitCode.CR0_WRITE_TRAP + 4: Feasibility(H, H, H),
    ExitCode.CR0_WRITE_TRAP + 8: Feasibility(H, H, H),
}


def way(exit_code: int, mode: Mode) -> Way | None:
    """How `exit_code` is served in `mode`; None for an event that the table does not name."""
    row = EVENTS.get(exit_code)
    return None if row is None else row.way(mode)


def markdown_table() -> str:
    """The table for documentation."""
    from sevlab.core.svm import exit_name

    lines = ["| Event | plain | SEV | SEV-ES | Why |", "| --- | --- | --- | --- | --- |"]
    for code, row in EVENTS.items():
        lines.append(f"| {exit_name(code)} | {row.plain.value} | {row.sev.value} | {row.sev_es.value} | {row.why} |")
    return "\n".join(lines)
