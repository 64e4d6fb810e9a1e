"""The reference hypervisor's side of #HV: the doorbell page, interrupts posted in it, IPIs.

With restricted injection nothing but #HV can be injected. What waits is shown in the page, the highest first; one that
the guest has not taken when a higher one comes goes back to those that wait.
Source: 56421, #HV doorbell page and #HV IPI; coconut-svsm kernel/src/sev/hv_doorbell.rs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.svm import EVENT_VALID, EventType, Vector, event
from sevlab.core.units import PAGE_BYTES, PAGE_MASK
from sevlab.plugins.sev_es import (
    DONE,
    INVALID_EVENT,
    INVALID_INPUT,
    Ghcb,
    HvFeature,
    NaeCode,
    NaeEvent,
    Reply,
    Scratch,
    sev_es_state,
)
from sevlab.plugins.snp.guest_pages import HvDoorbell
from sevlab.plugins.snp.hypervisor import (
    NO_DOORBELL,
    HostVcpu,
    host_vcpu,
    page_spa,
    read_guest,
    snp_hypervisor,
    vcpu_by_apic_id,
    write_guest,
)
from sevlab.plugins.snp.injection import RESTRICTED_INJECTION
from sevlab.plugins.snp.states import snp_state

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

DOORBELL_PREFERRED, DOORBELL_SET, DOORBELL_QUERY, DOORBELL_CLEAR = 0, 1, 2, 3
ALL_ONES = (1 << 64) - 1
HEAD_BYTES = 4
LOWEST_VECTOR = 16
"""Of an interrupt. Source: 24593, 16.5."""


def offered(machine: Machine, feature: HvFeature) -> bool:
    """Whether the hypervisor offers this feature."""
    return bool(sev_es_state(machine).features & feature)


def hv_doorbell(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, _scratch: Scratch | None) -> Reply:
    """Tell or ask where the #HV doorbell page of this vCPU is. Source: 56421, #HV doorbell page."""
    if not offered(machine, HvFeature.RESTRICTED_INJECTION):
        return INVALID_EVENT
    host, operation = host_vcpu(machine, vcpu.vcpu_id), ghcb.sw_exit_info_1
    if operation == DOORBELL_PREFERRED:
        return Reply(info_2=ALL_ONES)
    if operation == DOORBELL_QUERY:
        return Reply(info_2=host.doorbell_gpa & ALL_ONES)
    if operation == DOORBELL_CLEAR:
        host.doorbell_gpa = NO_DOORBELL
        return DONE
    gpa = ghcb.sw_exit_info_2
    if operation != DOORBELL_SET or gpa & PAGE_MASK or page_spa(machine, vcpu.vm_id, gpa, PAGE_BYTES) is None:
        return INVALID_INPUT
    host.doorbell_gpa = gpa
    return Reply(info_2=gpa)


# Posting --------------------------------------------------------------------------------------------------------------


def post_interrupt(machine: Machine, vcpu: Vcpu, vector: int, *, needs_eoi: bool = False) -> bool:
    """Let an interrupt wait for the vCPU, and show it in its doorbell page if it is the highest; False: no page."""
    host = host_vcpu(machine, vcpu.vcpu_id)
    host.irr |= 1 << vector
    host.needs_eoi = host.needs_eoi & ~(1 << vector) | int(needs_eoi) << vector
    return show(machine, vcpu, host)


def post_nmi(machine: Machine, vcpu: Vcpu) -> bool:
    """Let an NMI wait for the vCPU."""
    host = host_vcpu(machine, vcpu.vcpu_id)
    host.nmi = True
    return show(machine, vcpu, host)


def show(machine: Machine, vcpu: Vcpu, host: HostVcpu) -> bool:
    """Put the highest interrupt that waits into the page, and inject #HV unless the guest still has to look.

    That an interrupt which no controller keeps in service needs no EOI is the model's reading of NoEoiRequired.
    """
    gpa = host.doorbell_gpa
    raw = read_guest(machine, vcpu, gpa, HvDoorbell.SIZE) if gpa != NO_DOORBELL else None
    if raw is None:
        return False
    page = HvDoorbell.from_bytes(raw)
    waiting = host.irr | (1 << page.pending_vector if page.pending_vector else 0)
    top = waiting.bit_length() - 1 if waiting else 0
    answer = page.replace(
        pending_vector=top,
        nmi_pending=int(page.nmi_pending or host.nmi),
        no_further_signal=1,
        no_eoi_required=int(bool(top) and not host.needs_eoi >> top & 1),
    )
    if not write_guest(machine, vcpu, gpa, answer.to_bytes()[:HEAD_BYTES]):
        return False
    host.irr, host.nmi = waiting & ~(1 << top), False
    vcpu.halted = False
    if not page.no_further_signal:
        vcpu.vmcb.event_inj = event(Vector.HV, EventType.EXCEPTION)
    return True


def before_entry(machine: Machine, vcpu: Vcpu) -> None:
    """Before VMRUN: what a controller would inject is posted instead, and what the guest has made room for is shown."""
    host = snp_hypervisor(machine).vcpus.get(vcpu.vcpu_id)
    if host is None or host.doorbell_gpa == NO_DOORBELL:
        return
    known, word = snp_state(machine).vcpus.get(vcpu.vcpu_id), vcpu.vmcb.event_inj
    kind = word >> 8 & 7
    if known is not None and known.sev_features & RESTRICTED_INJECTION and word & EVENT_VALID:
        if kind == EventType.INTERRUPT:
            vcpu.vmcb.event_inj = 0
            post_interrupt(machine, vcpu, word & 0xFF, needs_eoi=True)
            return
        if kind == EventType.NMI:
            vcpu.vmcb.event_inj = 0
            post_nmi(machine, vcpu)
            return
    if host.irr:
        show(machine, vcpu, host)


# IPIs -----------------------------------------------------------------------------------------------------------------

ICR_MODE_SHIFT, ICR_FIXED, ICR_NMI = 8, 0, 4
ICR_LOGICAL = 1 << 11
ICR_SHORTHAND_SHIFT, ICR_SELF, ICR_ALL, ICR_OTHERS = 18, 1, 2, 3


def hv_ipi(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, _scratch: Scratch | None) -> Reply:
    """Send an interrupt or an NMI to vCPUs with a doorbell page; SW_EXITINFO1 is an x2APIC ICR value.

    That other delivery modes and logical destinations are refused is UNVERIFIED.
    Source: 56421, #HV IPI; 24593, 16.5 (ICR).
    """
    if not offered(machine, HvFeature.RESTRICTED_INJECTION):
        return INVALID_EVENT
    icr = ghcb.sw_exit_info_1
    mode, vector, shorthand = icr >> ICR_MODE_SHIFT & 7, icr & 0xFF, icr >> ICR_SHORTHAND_SHIFT & 3
    if mode not in (ICR_FIXED, ICR_NMI) or (mode == ICR_FIXED and vector < LOWEST_VECTOR):
        return INVALID_INPUT
    members = [machine.vcpus[vcpu_id] for vcpu_id in machine.hypervisor.vms[vcpu.vm_id].vcpu_ids]
    if shorthand == ICR_SELF:
        members = [vcpu]
    elif shorthand == ICR_OTHERS:
        members = [member for member in members if member is not vcpu]
    elif shorthand != ICR_ALL:
        target = None if icr & ICR_LOGICAL else vcpu_by_apic_id(machine, vcpu.vm_id, icr >> 32)
        if target is None:
            return INVALID_INPUT
        members = [target]
    for member in members:
        if host_vcpu(machine, member.vcpu_id).doorbell_gpa != NO_DOORBELL:
            if mode == ICR_NMI:
                post_nmi(machine, member)
            else:
                post_interrupt(machine, member, vector)
    return DONE


EVENTS: dict[int, NaeEvent] = {
    NaeCode.HV_DOORBELL: NaeEvent(
        "#HV doorbell page", hv_doorbell, since=2, snp_only=True, feature=2, source="56421, #HV doorbell page"
    ),
    NaeCode.HV_IPI: NaeEvent("#HV IPI", hv_ipi, since=2, snp_only=True, feature=2, source="56421, #HV IPI"),
}
"""By SW_EXITCODE."""
