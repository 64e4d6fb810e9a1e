"""What the processor contributes: CPUID, the guest's SEV_STATUS, WBINVD of each core, checks of VMRUN."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.builder import Msr
from sevlab.core.cpu import CONTROL_NESTED_PAGING, CONTROL_SEV, CONTROL_SEV_ES, Vcpu
from sevlab.core.events import CacheOp, Done, Fault, Refused
from sevlab.core.svm import ExitCode, Vector
from sevlab.core.vocabulary import Boundary, Input, step
from sevlab.plugins.sev import asids
from sevlab.plugins.sev.context import sev_state

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder, StepHandler
    from sevlab.core.machine import Machine

SEV_STATUS = 0xC001_0131
VM_PAGE_FLUSH = 0xC001_011E
CPUID_ENCRYPTION = 0x8000_001F
CPUID_SEV = 1 << 1
CPUID_PAGE_FLUSH = 1 << 2
ASID_MASK = 0xFFF


@step("sev.wbinvd", Boundary.MEMORY)
class CoreWbinvd(NamedTuple):
    """One core executes WBINVD; the kernel's step `cache` does it on every core."""

    core: Input[int]


def register(builder: PluginBuilder, *, max_asid: int, min_asid: int) -> None:
    """Register CPUID bits, MSRs, the WBINVD steps and the checks of VMRUN."""
    builder.cpuid_bits(CPUID_ENCRYPTION, eax=CPUID_SEV | CPUID_PAGE_FLUSH, ecx=max_asid, edx=min_asid)
    builder.guest_msrs.add(SEV_STATUS, Msr(read_sev_status, None))
    builder.host_msrs.add(VM_PAGE_FLUSH, Msr(None, write_page_flush))
    builder.steps.add(CoreWbinvd, core_wbinvd)
    builder.steps.replace(CacheOp, _note_wbinvd)
    builder.slot("vmrun_enter", vmrun_enter)


def read_sev_status(_machine: Machine, vcpu: Vcpu | None, _msr: int) -> int | Fault:
    """RDMSR of SEV_STATUS in a guest: bit 0 SEV is on. Source: 24593, 15.34.10."""
    return 0 if vcpu is None else int(bool(vcpu.vmcb.encryption_control & CONTROL_SEV))


def write_page_flush(machine: Machine, _vcpu: Vcpu | None, _msr: int, value: int) -> Fault | None:
    """WRMSR of VM_PAGE_FLUSH: all cached views of one page; #GP(0) for ASID 0 or an address that is not mapped.

    The model's host is mapped one to one. Source: 24593, 15.34.9.
    """
    if not value & ASID_MASK or value >= machine.memory.size_bytes:
        return Fault(Vector.GP, 0, 0)
    machine.memory.flush_page(value & ~ASID_MASK)
    return None


def core_wbinvd(machine: Machine, wbinvd: CoreWbinvd) -> None:
    """One core writes back its caches and is noted for DF_FLUSH."""
    sev = sev_state(machine)
    if wbinvd.core >= len(sev.ccxs) * sev.cores_per_ccx:
        machine.emit(Refused(f"there is no core {wbinvd.core}"))
        return
    machine.memory.write_back_all()
    asids.wbinvd(sev, wbinvd.core)
    machine.emit(Done())


def _note_wbinvd(original: StepHandler) -> StepHandler:
    def cache_op(machine: Machine, operation: CacheOp) -> None:
        original(machine, operation)
        if operation.operation == "wbinvd":
            asids.wbinvd(sev_state(machine))

    return cache_op


def vmrun_enter(machine: Machine, vcpu: Vcpu) -> int | None:
    """Refuse a VMRUN whose VMCB asks for SEV as the processor cannot give it.

    SEV needs nested paging and an ASID up to the maximum; SEV-ES needs SEV. The ASID must be valid on the core, which
    the firmware makes it only when the guest has been launched; the model asks for one core complex.
    Source: 24593, 15.34.3 and 15.35.1; AMD-ASPFW sev_uapp/src/sev_guest.h, guest_is_pending.
    """
    control = vcpu.vmcb.encryption_control
    if not control & (CONTROL_SEV | CONTROL_SEV_ES):
        return None
    legal = control & CONTROL_SEV and control & CONTROL_NESTED_PAGING
    return None if legal and asids.runs(sev_state(machine), vcpu.vmcb.guest_asid) else ExitCode.INVALID
