"""The reference hypervisor's side of the MSR protocol.

Source: 56421, 2.3; Linux arch/x86/kvm/svm/sev.c (sev_handle_vmgexit_msr_protocol).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.plugins.sev_es.declare import MsrRequest
from sevlab.plugins.sev_es.msr_layout import (
    GFN_ALL_ONES,
    CpuidRequest,
    GhcbGpa,
    MsrInfo,
    SevInfoResponse,
    TerminateRequest,
    build,
)
from sevlab.plugins.sev_es.records import Terminated
from sevlab.plugins.sev_es.states import Hold, sev_es_state, vcpu_protocol

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

_CPUID_RESPONSE = int(MsrInfo.CPUID_RESPONSE)

SECTION = "56421, 2.3; Linux arch/x86/kvm/svm/sev.c (sev_handle_vmgexit_msr_protocol)"


def sev_information(machine: Machine) -> int:
    """What the GHCB MSR holds at a vCPU's reset, and what an information request is answered."""
    state = sev_es_state(machine)
    return build(
        SevInfoResponse,
        MsrInfo.SEV_INFO_RESPONSE,
        c_bit=machine.config.part.c_bit,
        version_min=state.protocol_min,
        version_max=state.protocol_max,
    )


def sev_info(machine: Machine, vcpu: Vcpu, value: int) -> int:
    """SEV information: the versions that the hypervisor speaks, and the C-bit. Source: 56421, 2.3."""
    return sev_information(machine)


def cpuid(machine: Machine, vcpu: Vcpu, value: int) -> int:
    """CPUID: one register of a leaf, subleaf 0. Source: 56421, 2.3."""
    registers = machine.cpuid(vcpu, value >> 32, 0)
    register = value >> 30 & 3
    return registers[register] << 32 | register << 30 | _CPUID_RESPONSE


def ap_reset_hold(machine: Machine, vcpu: Vcpu, value: int) -> int:
    """AP reset hold: 0 until the start-up IPI comes, and the vCPU sleeps. Source: 56421, 2.3."""
    vcpu_protocol(machine, vcpu).hold = Hold.MSR
    vcpu.halted = True
    return MsrInfo.AP_RESET_HOLD_RESPONSE


def preferred_gpa(machine: Machine, vcpu: Vcpu, value: int) -> int:
    """Preferred GHCB GPA: none. Source: 56421, 2.3; KVM answers all ones."""
    return GFN_ALL_ONES << 12 | MsrInfo.PREFERRED_GPA_RESPONSE


def register_gpa(machine: Machine, vcpu: Vcpu, value: int) -> int:
    """Register GHCB GPA: the only page that this vCPU may use from now on; the echo says that it was taken.

    Source: 56421, 2.3; Linux arch/x86/kvm/svm/sev.c (GHCB_MSR_REG_GPA_REQ).
    """
    vcpu_protocol(machine, vcpu).registered_gpa = value & ~0xFFF
    return value & ~0xFFF | MsrInfo.REGISTER_GPA_RESPONSE


def hv_features(machine: Machine, vcpu: Vcpu, value: int) -> int:
    """Hypervisor features: bit n of the bitmap is bit n + 12. Source: 56421, 2.3."""
    return sev_es_state(machine).features << 12 | MsrInfo.HV_FEATURES_RESPONSE


def terminate(machine: Machine, vcpu: Vcpu, value: int) -> None:
    """Termination: the VM ends. Source: 56421, 2.3; Linux selftests kvm/x86/sev_smoke_test.c."""
    reason_set, code = value >> 12 & 0xF, value >> 16 & 0xFF
    machine.emit(Terminated(vcpu.vcpu_id, reason_set, code, value))
    machine.hypervisor.stop(machine, vcpu.vm_id, f"the guest asked for its end: set {reason_set}, {code}")


REQUESTS: dict[int, MsrRequest] = {
    MsrInfo.SEV_INFO_REQUEST: MsrRequest(
        "SEV information", sev_info, response=MsrInfo.SEV_INFO_RESPONSE, source=SECTION
    ),
    MsrInfo.CPUID_REQUEST: MsrRequest(
        "CPUID", cpuid, request=CpuidRequest, response=MsrInfo.CPUID_RESPONSE, source=SECTION
    ),
    MsrInfo.AP_RESET_HOLD_REQUEST: MsrRequest(
        "AP reset hold", ap_reset_hold, response=MsrInfo.AP_RESET_HOLD_RESPONSE, since=2, source=SECTION
    ),
    MsrInfo.PREFERRED_GPA_REQUEST: MsrRequest(
        "preferred GHCB GPA",
        preferred_gpa,
        response=MsrInfo.PREFERRED_GPA_RESPONSE,
        since=2,
        snp_only=True,
        source=SECTION,
    ),
    MsrInfo.REGISTER_GPA_REQUEST: MsrRequest(
        "register GHCB GPA",
        register_gpa,
        request=GhcbGpa,
        response=MsrInfo.REGISTER_GPA_RESPONSE,
        since=2,
        snp_only=True,
        source=SECTION,
    ),
    MsrInfo.HV_FEATURES_REQUEST: MsrRequest(
        "hypervisor features", hv_features, response=MsrInfo.HV_FEATURES_RESPONSE, since=2, source=SECTION
    ),
    MsrInfo.TERMINATE_REQUEST: MsrRequest("termination", terminate, request=TerminateRequest, source=SECTION),
}
"""By info; page state change and run VMPL belong to SNP."""
