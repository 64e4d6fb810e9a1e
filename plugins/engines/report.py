"""Where a guest is: registers, the instruction, the last exits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.cpu import GPR_NAMES, FaultUnwind
from sevlab.core.svm import exit_name

if TYPE_CHECKING:
    from sevlab.plugins.engines.execution import Execution

SHOWN_EXITS = 12


def crash_report(run: Execution) -> str:
    """The state of a guest whose run has ended, in lines."""
    vcpu = run.vcpu
    regs, system = vcpu.regs, vcpu.system
    try:
        code = run.fetch().hex(" ")
    except FaultUnwind as unwind:
        code = f"cannot be fetched ({unwind.fault})"
    lines = [
        f"reason {run.ended.reason if run.ended is not None else 'none: it still runs'}",
        f"rip {regs.rip:016x}  rflags {regs.rflags:08x}  cpl {system.cpl}  code: {code}",
    ]
    for start in range(0, 16, 4):
        names = GPR_NAMES[start : start + 4]
        lines.append("  ".join(f"{name:>3} {getattr(regs, name):016x}" for name in names))
    lines.append(
        f"cr0 {system.cr0:x}  cr2 {system.cr2:x}  cr3 {system.cr3:x}  cr4 {system.cr4:x}  efer {system.efer:x}"
    )
    lines.append("last exits (newest last):")
    lines += [f"  {exit_name(last.code)} {last.info_1:#x} at {last.rip:#x}" for last in list(run.last)[-SHOWN_EXITS:]]
    return "\n".join(lines)
