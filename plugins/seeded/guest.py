"""Bugs of the guest's #VC and interrupt handlers, which a hostile hypervisor or user space makes use of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.access import CPL_USER
from sevlab.core.cpu import CONTROL_SEV_ES
from sevlab.core.exitinfo import IOIO_IN
from sevlab.core.svm import EVENT_VALID, EventType, ExitCode, event
from sevlab.plugins.seeded.planting import Bug
from sevlab.plugins.sev_es import ExitClass, decode_vc, exit_class, may_raise

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from sevlab.core.cpu import Vcpu
    from sevlab.core.events import CpuExit
    from sevlab.core.machine import Machine
    from sevlab.plugins.seeded.planting import Mark, Planter
    from sevlab.plugins.sev_es import VcContext, VcHandler, VcInsn

    VcServe = Callable[[VcContext, VcInsn], VcHandler]

CODE_BITS = 64
"""None of the instructions below reads differently in 16 or 32-bit code."""
SYSCALL_VECTOR = 0x80
RDMSR, WRMSR = b"\x0f\x32", b"\x0f\x30"
INSTRUCTIONS = {
    ExitCode.RDTSC: b"\x0f\x31",
    ExitCode.RDTSCP: b"\x0f\x01\xf9",
    ExitCode.RDPMC: b"\x0f\x33",
    ExitCode.CPUID: b"\x0f\xa2",
    ExitCode.WBINVD: b"\x0f\x09",
    ExitCode.VMMCALL: b"\x0f\x01\xd9",
    ExitCode.MSR: RDMSR,
    ExitCode.IOIO: b"\xee",
}
"""The instruction that a handler believes in when it trusts the exit code. Source: 24594, their pages."""


def user_io_unchecked(plan: Planter, mark: Mark) -> None:
    """User space reaches ports, and with INS and OUTS the kernel's memory, since nobody asks for its permission.

    Source: CVE-2023-46813, Linux 63e44bc52047 and b9cb9c45583b (arch/x86/coco/sev).
    """

    def make(original: VcServe) -> VcServe:
        def ioio(context: VcContext, insn: VcInsn) -> VcHandler:
            if context.user:
                mark.reached()
                allowed = context.io_allowed

                def ask(port: int, size: int) -> bool:
                    return allowed(port, size) or mark.triggers()

                context.io_allowed = ask
            return (yield from original(context, insn))

        return ioio

    plan.replace("vc_handlers", ExitCode.IOIO, make)


def vc_no_opcode(plan: Planter, mark: Mark) -> None:
    """The handler believes the exit code and does not look whether the instruction at RIP can have it.

    Source: CVE-2024-25742 (WeSee), Linux e3ef461af35a (vc_check_opcode_bytes).
    """

    def make(original: Any) -> Any:
        def vmrun_exit(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> CpuExit | None:
            encrypted = vcpu.vmcb.encryption_control & CONTROL_SEV_ES
            claimed = INSTRUCTIONS.get(ExitCode(exit_.exit_code)) if exit_.exit_code in INSTRUCTIONS else None
            if encrypted and claimed is not None and exit_class(exit_.exit_code, exit_.exit_info_1) is ExitClass.NAE:
                mark.reached()
                insn = decode_vc(exit_.insn, CODE_BITS)
                if (insn is None or not may_raise(insn, exit_.exit_code)) and mark.triggers():
                    if exit_.exit_code == ExitCode.MSR and exit_.exit_info_1:
                        claimed = WRMSR
                    if exit_.exit_code == ExitCode.IOIO and exit_.exit_info_1 & IOIO_IN:
                        claimed = b"\xec"
                    exit_ = exit_._replace(insn=claimed)
            return original(machine, vcpu, exit_)  # type: ignore[no-any-return]

        return vmrun_exit

    plan.builder.replace_slot("vmrun_exit", make)


def int80_injected(plan: Planter, mark: Mark) -> None:
    """An external interrupt of vector 80h in user mode is served as the system call of that number.

    The event becomes the software interrupt that the handler takes it for. Source: CVE-2024-25744 (Heckler), Linux
    b82a8dbd3d2f.
    """

    def make(original: Any) -> Any:
        def inject_filter(machine: Machine, vcpu: Vcpu, word: int) -> int:
            encrypted = vcpu.vmcb.encryption_control & CONTROL_SEV_ES
            external = word & EVENT_VALID and word >> 8 & 7 == EventType.INTERRUPT and word & 0xFF == SYSCALL_VECTOR
            if encrypted and external:
                mark.reached()
                if vcpu.system.cpl == CPL_USER and mark.triggers():
                    word = event(SYSCALL_VECTOR, EventType.SOFTWARE)
            return int(original(machine, vcpu, word))

        return inject_filter

    plan.builder.replace_slot("inject_filter", make)


def mmio_private_leak(plan: Planter, mark: Mark) -> None:
    """MMIO at a page that the guest's own tables say is private is served: the hypervisor gets what was written.

    Source: TianoCore BZ 3108, edk2 85b8eac59b; arXiv 2010.07094.
    """

    def make(original: VcServe) -> VcServe:
        def mmio(context: VcContext, insn: VcInsn) -> VcHandler:
            mark.reached()
            translate = context.translate

            def public(linear: int, to_write: bool) -> tuple[int, bool]:  # noqa: FBT001  # a callback
                gpa, private = translate(linear, to_write)
                return gpa, private and not mark.triggers()

            context.translate = public
            return (yield from original(context, insn))

        return mmio

    plan.replace("vc_handlers", ExitCode.NPF, make)


BUGS = (
    Bug("S14", "user-io-unchecked", 31, "sev_es.provenance", user_io_unchecked),
    Bug("S15", "vc-no-opcode", 32, "sev_es.provenance", vc_no_opcode, contexts=True),
    Bug("S16", "int80-injected", 33, "sev_es.event", int80_injected, contexts=True),
    Bug("S17", "mmio-private-leak", 34, "sev_es.private-mmio", mmio_private_leak, stateful=True, contexts=True),
)
"""Those of this file."""
