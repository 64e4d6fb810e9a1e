"""VMRUN of an SNP guest: the save area must be the guest's by the RMP; the nested page fault's mend.

Source: 24593, 15.36.12 (checks of VMRUN).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sevlab.core.events import Injected
from sevlab.core.svm import ExitCode, NpfError
from sevlab.core.units import PAGE_BYTES, PAGE_MASK
from sevlab.plugins.sev_es import Vmsa, enter_encrypted, sev_es_state, vm_protocol
from sevlab.plugins.snp.hypervisor import NO_PAGE, handle_rmp_fault, host_vcpu
from sevlab.plugins.snp.injection import (
    ALTERNATE_INJECTION,
    RESTRICTED_INJECTION,
    check_injection,
    make_inject_filter,
    take_event,
)
from sevlab.plugins.snp.layout import ASID, ASID_SHIFT, ASSIGNED, IMMUTABLE, PAGE_SIZE, VMSA
from sevlab.plugins.snp.rmp import read_entry
from sevlab.plugins.snp.rmp_host import snp_enabled
from sevlab.plugins.snp.states import SnpVcpu, snp_state
from sevlab.plugins.snp.vtom import TOP

if TYPE_CHECKING:
    from sevlab.core.builder import ExitHandler, PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.events import CpuExit
    from sevlab.core.machine import Machine

    VmrunEnter = Callable[[Machine, Vcpu], int | None]
    StartVcpu = Callable[[Machine, Vcpu, int], bool]

SNP_ACTIVE = 1 << 0
BOTH_INJECTIONS = RESTRICTED_INJECTION | ALTERNATE_INJECTION
ALLOWED_ENABLE = 1 << 63


def save_area_is_the_guest_s(machine: Machine, vcpu: Vcpu) -> bool:
    """The RMP's checks of the page at VMSA_PA: covered, owned, mutable, a VMSA, of 4 KiB.

    Reverse-Map compares with the GPA that the entry itself holds: the VMCB names the page by SPA, so that it always
    passes. UNVERIFIED. Source: 24593, 15.36.12.
    """
    spa = vcpu.vmcb.vmsa_pa
    entry = None if spa & PAGE_MASK or not spa else read_entry(machine, spa)
    if entry is None:
        return False
    wanted = ASSIGNED | VMSA | vcpu.asid << ASID_SHIFT
    return entry.low & (ASSIGNED | VMSA | ASID | IMMUTABLE | PAGE_SIZE) == wanted


def make_vmrun_enter(before: VmrunEnter) -> VmrunEnter:
    """The slot `vmrun_enter` behind those of SEV and SEV-ES."""

    def vmrun_enter(machine: Machine, vcpu: Vcpu) -> int | None:
        failure = before(machine, vcpu)
        if failure is not None or not vm_protocol(machine, vcpu).snp:
            return failure
        if not snp_enabled(machine) or not save_area_is_the_guest_s(machine, vcpu):
            return ExitCode.INVALID
        spa = vcpu.vmcb.vmsa_pa
        known = snp_state(machine).vcpus.get(vcpu.vcpu_id)
        same = sev_es_state(machine).loaded.get(vcpu.vcpu_id) == (spa, vcpu.asid)
        if known is None or known.vmsa_spa != spa or not same:
            area = Vmsa.from_bytes(machine.memory.read(spa, PAGE_BYTES, machine.access.key_of(vcpu.asid, c_bit=True)))
            if not features_are_legal(vcpu, area.sev_features):
                return ExitCode.INVALID
            known = SnpVcpu(sev_features=area.sev_features, vmsa_spa=spa, virtual_tom=area.virtual_tom & TOP)
            snp_state(machine).vcpus[vcpu.vcpu_id] = known
            vcpu.vmpl = area.vmpl & 3
        looked_at = not same or not machine.memory.deferred(spa)  # else nobody has since the last entry
        event = 0
        if known.sev_features & ALTERNATE_INJECTION and (looked_at or known.event_waits):
            taken = take_event(machine, vcpu, known)
            if taken is None:
                return ExitCode.INVALID
            event, looked_at = taken, True
        if looked_at:
            failure = enter_encrypted(machine, vcpu, lambda _page: True)
        failure = failure if failure is not None else check_injection(vcpu, known.sev_features)
        if event and failure is None:
            machine.emit(Injected(vcpu.vcpu_id, event))
        return failure

    return vmrun_enter


def features_are_legal(vcpu: Vcpu, features: int) -> bool:
    """SNPActive, not both kinds of injection, nothing beyond what the VMCB allows. Source: 24593, 15.36.12."""
    allowed = vcpu.vmcb.allowed_sev_features
    if allowed & ALLOWED_ENABLE and features & ~allowed:
        return False
    return bool(features & SNP_ACTIVE) and features & BOTH_INJECTIONS != BOTH_INJECTIONS


def make_start_vcpu(before: StartVcpu) -> StartVcpu:
    """A start-up IPI to a vCPU whose save area waits for it: "create on INIT". Source: 56421, SNP AP creation."""

    def start_vcpu(machine: Machine, vcpu: Vcpu, vector: int) -> bool:
        host = host_vcpu(machine, vcpu.vcpu_id)
        if not vm_protocol(machine, vcpu).snp or not host.on_init:
            return before(machine, vcpu, vector)
        host.vmsas = (host.on_init, *host.vmsas[1:])
        vcpu.vmcb.vmsa_pa, host.on_init = host.on_init, NO_PAGE
        vcpu.halted = False
        return True

    return start_vcpu


def keep_asleep(machine: Machine, vcpu: Vcpu) -> None:
    """Before an entry: a vCPU without a save area is none to run, whatever woke it; it waits to be created again.

    Source: Linux arch/x86/kvm/svm/sev.c (pre_sev_run; a destroyed vCPU is KVM_MP_STATE_STOPPED).
    """
    if vcpu.vmcb.vmsa_pa == NO_PAGE and vm_protocol(machine, vcpu).snp:
        vcpu.halted = True


def unmapped(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """A nested page fault where no plugin has devices behind addresses: the VM ends."""
    machine.hypervisor.stop(machine, vcpu.vm_id, f"nested page fault at {exit_.exit_info_2:#x}")


def make_npf(before: ExitHandler) -> ExitHandler:
    """The hypervisor at a nested page fault with the RMP bit: mend sizes, else stop the VM.

    Source: Linux arch/x86/kvm/svm/svm.c (npf_interception) and sev.c (sev_handle_rmp_fault).
    """

    def npf(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
        if exit_.exit_info_1 & NpfError.RMP:
            private = bool(exit_.exit_info_1 & NpfError.ENC)
            vmpl = exit_.exit_info_1 & NpfError.VMPL
            if vmpl or not handle_rmp_fault(machine, vcpu.vm_id, exit_.exit_info_2, private=private):
                reason = f"RMP fault at {exit_.exit_info_2:#x} that the hypervisor cannot mend"
                machine.hypervisor.stop(machine, vcpu.vm_id, reason)
        else:
            before(machine, vcpu, exit_)

    return npf


def register(builder: PluginBuilder) -> None:
    """Take over the slots of SEV-ES for SNP guests."""
    builder.replace_slot("vmrun_enter", make_vmrun_enter)
    builder.replace_slot("inject_filter", make_inject_filter)
    builder.replace_slot("start_vcpu", make_start_vcpu)
    builder.at_entry(keep_asleep)
    builder.exits.replace(ExitCode.NPF, make_npf, absent=unmapped)
