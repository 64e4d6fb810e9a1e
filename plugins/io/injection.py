"""Event injection: what the hypervisor writes into EVENTINJ, and why.

Exceptions that meet an event whose delivery was interrupted combine by the architecture's table: contributory ones to
#DF, anything on top of #DF to a triple fault. Source: spec 24593, 8.2.9 (table 8-5), 15.7.2, 15.20; Xen svm.c
svm_inject_event; Linux arch/x86/kvm/svm/svm.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.cpu import CONTROL_SEV_ES, leave_guest
from sevlab.core.events import CpuExit
from sevlab.core.exceptions import WITH_ERROR_CODE, Combined, combine
from sevlab.core.svm import EVENT_ERROR_VALID, EVENT_VALID, EventType, ExitCode, Vector, event

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine


SOFTWARE_EXCEPTIONS = frozenset((Vector.BP, Vector.OF))


class Injection(NamedTuple):
    """What became of a request to inject; `word` is what EVENTINJ holds, `reason` why nothing was injected."""

    word: int
    reason: str = ""


def inject_exception(machine: Machine, vcpu: Vcpu, vector: int, error_code: int | None = None) -> Injection:
    """Let the guest take exception `vector` at its next entry.

    An exception that EVENTINJ or EXITINTINFO holds already combines with it; a triple fault is a SHUTDOWN exit.
    The host of an SEV-ES guest cannot set CR2, so it cannot inject #PF there.
    """
    vmcb = vcpu.vmcb
    if vector == Vector.PF and vmcb.encryption_control & CONTROL_SEV_ES:
        return Injection(0, "CR2 of an encrypted guest cannot be written")
    if error_code is None and vector in WITH_ERROR_CODE:
        error_code = 0
    before = vmcb.event_inj if vmcb.event_inj & EVENT_VALID else vmcb.exit_int_info
    if before & EVENT_VALID and before >> 8 & 7 == EventType.EXCEPTION:
        combined = combine(before & 0xFF, vector)
        if combined is Combined.TRIPLE_FAULT:
            vmcb.event_inj = vmcb.exit_int_info = 0
            leave_guest(machine, vcpu, CpuExit(vcpu.vcpu_id, ExitCode.SHUTDOWN, 0, 0, b"", 0))
            return Injection(0, "triple fault")
        if combined is Combined.DOUBLE_FAULT:
            vector, error_code = Vector.DF, 0
    vmcb.exit_int_info = 0
    vmcb.event_inj = event(vector, EventType.EXCEPTION, error_code)
    return Injection(vmcb.event_inj)


def inject_software(vcpu: Vcpu, vector: int, length: int, *, nrips: bool) -> Injection:
    """Let the guest take INT n of `length` bytes at RIP.

    With NRIP save the processor pushes the next RIP that the VMCB holds. Without it the hypervisor must advance RIP
    itself before the injection - which it cannot when the registers are encrypted: the documented failure.
    """
    next_rip = vcpu.regs.rip + length & 0xFFFF_FFFF_FFFF_FFFF
    if nrips:
        vcpu.vmcb.next_rip = next_rip
    elif vcpu.vmcb.encryption_control & CONTROL_SEV_ES:
        return Injection(0, "without NRIP save RIP must be advanced, and it is encrypted")
    else:
        vcpu.regs.rip = next_rip
    kind = EventType.EXCEPTION if vector in SOFTWARE_EXCEPTIONS else EventType.SOFTWARE
    vcpu.vmcb.event_inj = event(vector, kind)
    return Injection(vcpu.vmcb.event_inj)


def reinjection(exit_int_info: int) -> int:
    """The EVENTINJ word for an event whose delivery an exit interrupted; 0 when it must not be injected again.

    Interrupts, NMIs and hardware exceptions come back as they were. INT n, INT3 and INTO are executed again instead,
    and #VC is never injected by the hypervisor.
    """
    if not exit_int_info & EVENT_VALID:
        return 0
    kind, vector = exit_int_info >> 8 & 7, exit_int_info & 0xFF
    if kind == EventType.SOFTWARE:
        return 0
    if kind == EventType.EXCEPTION and (vector in SOFTWARE_EXCEPTIONS or vector == Vector.VC):
        return 0
    keep = exit_int_info & 0xFFFF_FFFF
    return exit_int_info if exit_int_info & EVENT_ERROR_VALID else keep
