"""The reference hypervisor's answers to the SNP events of the GHCB, and to the SNP requests of the MSR protocol.

Source: 56421, section 4; Linux arch/x86/kvm/svm/sev.c; coconut-svsm kernel/src/sev/ghcb.rs (events that KVM has not).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES, PAGE_MASK
from sevlab.plugins.sev import Command
from sevlab.plugins.sev_es import (
    DONE,
    INVALID_EVENT,
    INVALID_INPUT,
    Ghcb,
    HvFeature,
    MsrInfo,
    MsrRequest,
    NaeCode,
    NaeEvent,
    Reply,
    Scratch,
    msr_layout,
    vcpu_protocol,
)
from sevlab.plugins.snp import doorbell, order
from sevlab.plugins.snp.buffers import SnpGuestRequest
from sevlab.plugins.snp.doorbell import offered
from sevlab.plugins.snp.driver import pages
from sevlab.plugins.snp.hypervisor import (
    NO_PAGE,
    VMPLS,
    firmware,
    host_guest,
    host_vcpu,
    make_private,
    make_shared,
    page_spa,
    read_guest,
    snp_hypervisor,
    vcpu_by_apic_id,
    write_guest,
)
from sevlab.plugins.snp.messages import HEADER_BYTES, MessageHeader, MessageType
from sevlab.plugins.snp.psc import PscHeader, PscOperation, change_pages

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

MSR_PSC_ERROR = 1 << 31
"""Bit 63 of the response. Source: Linux arch/x86/kvm/svm/sev.c (GHCB_MSR_PSC_RESP_ERROR)."""

VMM_INVALID_LENGTH = 1
VMM_BUSY = 2
"""SW_EXITINFO2[63:32] after a guest request. Source: Linux include/uapi/linux/sev-guest.h."""

GENERIC_FIRMWARE_ERROR = 0xFFFF_FFFF

AP_CREATE_ON_INIT, AP_CREATE, AP_DESTROY = 0, 1, 2
RUN_VMPL_ERROR = 1


# Page state change ----------------------------------------------------------------------------------------------------


def page_state_change(machine: Machine, vcpu: Vcpu, _ghcb: Ghcb, scratch: Scratch | None) -> Reply:
    """Change the states of up to 253 pages. Source: Linux arch/x86/kvm/svm/sev.c (snp_begin_psc)."""
    assert scratch is not None  # declared
    result, answer = change_pages(machine, vcpu, scratch.rest)
    if answer:
        scratch.write(answer)
    return Reply(info_2=result)


def msr_page_state(machine: Machine, vcpu: Vcpu, value: int) -> int:
    """Change the state of one 4 KiB page. Source: Linux arch/x86/kvm/svm/sev.c (snp_begin_psc_msr)."""
    request = msr_layout.PageStateRequest.from_bytes(value.to_bytes(8, "little"))
    change = {PscOperation.PRIVATE: make_private, PscOperation.SHARED: make_shared}.get(
        _OPERATIONS.get(request.operation, PscOperation.UNSMASH)
    )
    gpa = request.gfn * PAGE_BYTES
    done = change is not None and not request.reserved_63_56 and change(machine, vcpu.vm_id, gpa, large=False)
    error = 0 if done else MSR_PSC_ERROR
    return msr_layout.build(msr_layout.ErrorResponse, MsrInfo.PAGE_STATE_RESPONSE, error=error)


_OPERATIONS = {int(operation): operation for operation in PscOperation}


# Guest requests -------------------------------------------------------------------------------------------------------


def guest_request(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, _scratch: Scratch | None) -> Reply:
    """Carry a guest message to the firmware and its answer back.

    The request is copied, so that the firmware sees what the host saw. Source: Linux arch/x86/kvm/svm/sev.c
    (snp_handle_guest_req).
    """
    request, response = ghcb.sw_exit_info_1, ghcb.sw_exit_info_2
    if (request | response) & PAGE_MASK or request == response:
        return INVALID_INPUT
    return _forward(machine, vcpu, read_guest(machine, vcpu, request, PAGE_BYTES), response)


def _forward(machine: Machine, vcpu: Vcpu, message: bytes | None, response: int) -> Reply:
    if message is None or machine.access.translate_gpa(vcpu, response) is None:
        return INVALID_INPUT
    own = pages(machine)
    machine.access.hypervisor_write(own.input_spa, message)
    status = firmware(
        machine,
        Command.SNP_GUEST_REQUEST,
        SnpGuestRequest,
        gctx_spa=host_guest(machine, vcpu.vm_id).gctx_spa,
        request_spa=own.input_spa,
        response_spa=own.output_spa,
    )
    if not status:
        answer = machine.access.hypervisor_read(own.output_spa, PAGE_BYTES)
        if not write_guest(machine, vcpu, response, answer):
            return INVALID_INPUT
    return Reply(info_2=status)


def extended_guest_request(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, _scratch: Scratch | None) -> Reply:
    """As a guest request; with a report request come the host's certificates.

    Too little room for them is INVALID_LEN with the pages that are needed, and the firmware does not see the message.
    Source: Linux arch/x86/kvm/svm/sev.c (snp_handle_ext_guest_req).
    """
    request, response = ghcb.sw_exit_info_1, ghcb.sw_exit_info_2
    if (request | response) & PAGE_MASK or request == response or ghcb.rax & PAGE_MASK:
        return INVALID_INPUT
    message = read_guest(machine, vcpu, request, PAGE_BYTES)
    if message is None:
        return INVALID_INPUT
    blob = snp_hypervisor(machine).certificates
    if MessageHeader.from_bytes(message[:HEADER_BYTES]).msg_type == MessageType.REPORT_REQ:
        needed = -(-len(blob) // PAGE_BYTES)
        if ghcb.rbx < needed:
            return Reply(info_2=VMM_INVALID_LENGTH << 32, rbx=needed)
        room = min(ghcb.rbx, needed or 1) * PAGE_BYTES if ghcb.rbx else 0
        if room and not write_guest(machine, vcpu, ghcb.rax, blob.ljust(room, b"\0")):
            return INVALID_INPUT
    return _forward(machine, vcpu, message, response)


# vCPUs and VMPLs ------------------------------------------------------------------------------------------------------


def ap_creation(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, _scratch: Scratch | None) -> Reply:
    """Create a vCPU from a save area of the guest's, now or at the next start-up IPI; or destroy it.

    Source: 56421, SNP AP creation; Linux arch/x86/kvm/svm/sev.c (sev_snp_ap_creation). A VMPL other than 0 needs the
    feature of several VMPLs.
    """
    request, vmpl = ghcb.sw_exit_info_1 & 0xFFFF, ghcb.sw_exit_info_1 >> 16 & 0xF
    apic_id = ghcb.sw_exit_info_1 >> 32
    target = vcpu_by_apic_id(machine, vcpu.vm_id, apic_id)
    wrong_vmpl = vmpl >= VMPLS or (vmpl and not offered(machine, HvFeature.MULTIPLE_VMPLS))
    if target is None or wrong_vmpl or ghcb.sw_exit_info_1 >> 20 & 0xFFF or request > AP_DESTROY:
        return INVALID_INPUT
    host = host_vcpu(machine, target.vcpu_id)
    if request == AP_DESTROY:
        host.vmsas = _with(host.vmsas, vmpl, NO_PAGE)
        if vmpl == host.vmpl:
            target.vmcb.vmsa_pa = NO_PAGE
            target.halted = True
        return DONE
    gpa = ghcb.sw_exit_info_2
    spa = page_spa(machine, vcpu.vm_id, gpa, PAGE_BYTES)
    features = host_guest(machine, vcpu.vm_id).sev_features
    if spa is None or gpa & PAGE_MASK or not gpa % PAGE_2M_BYTES or ghcb.rax != features:
        return INVALID_INPUT
    if request == AP_CREATE_ON_INIT:
        host.on_init = spa
        return DONE
    host.vmsas = _with(host.vmsas, vmpl, spa)
    if vmpl == host.vmpl:
        start_on(target, spa)
    return DONE


def _with(vmsas: tuple[int, ...], vmpl: int, spa: int) -> tuple[int, ...]:
    return (*vmsas[:vmpl], spa, *vmsas[vmpl + 1 :])


def start_on(vcpu: Vcpu, spa: int) -> None:
    """Let the vCPU run from this save area at its next VMRUN."""
    vcpu.vmcb.vmsa_pa = spa
    vcpu.halted = False


def switch_vmpl(machine: Machine, vcpu: Vcpu, vmpl: int) -> bool:
    """Let the vCPU go on with the save area of `vmpl`; False: there is none. Source: 56421, run VMPL."""
    host = host_vcpu(machine, vcpu.vcpu_id)
    if vmpl >= VMPLS or not host.vmsas[vmpl]:
        return False
    protocol = vcpu_protocol(machine, vcpu)
    host.registered = _with(host.registered, host.vmpl, protocol.registered_gpa)
    protocol.registered_gpa = host.registered[vmpl]
    host.vmpl = vmpl
    start_on(vcpu, host.vmsas[vmpl])
    return True


def run_vmpl(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, _scratch: Scratch | None) -> Reply:
    """Run the vCPU at another VMPL; the caller goes on when that one hands back."""
    if not offered(machine, HvFeature.MULTIPLE_VMPLS):
        return INVALID_EVENT
    return DONE if switch_vmpl(machine, vcpu, ghcb.sw_exit_info_1 & 0xFFFF_FFFF) else INVALID_INPUT


def msr_run_vmpl(machine: Machine, vcpu: Vcpu, value: int) -> int:
    """Run the vCPU at another VMPL, by the MSR."""
    request = msr_layout.RunVmplRequest.from_bytes(value.to_bytes(8, "little"))
    legal = offered(machine, HvFeature.MULTIPLE_VMPLS) and not request.reserved_31_12 and not request.reserved_63_40
    done = legal and switch_vmpl(machine, vcpu, request.vmpl)
    error = 0 if done else RUN_VMPL_ERROR
    return msr_layout.build(msr_layout.ErrorResponse, MsrInfo.RUN_VMPL_RESPONSE, error=error)


def apic_id_list(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, _scratch: Scratch | None) -> Reply:
    """The APIC ids of the VM's vCPUs: how many pages they need, or the list. Source: 56421, APIC ID list; edk2."""
    if not offered(machine, HvFeature.APIC_ID_LIST):
        return INVALID_EVENT
    count = len(machine.hypervisor.vms[vcpu.vm_id].vcpu_ids)
    data = b"".join(number.to_bytes(4, "little") for number in (count, *range(count)))
    needed = -(-len(data) // PAGE_BYTES)
    if ghcb.rax < needed:
        return Reply(rax=needed)
    gpa = ghcb.sw_exit_info_1
    if gpa & PAGE_MASK or not write_guest(machine, vcpu, gpa, data.ljust(needed * PAGE_BYTES, b"\0")):
        return INVALID_INPUT
    return DONE


SECTION = "56421, section 4; Linux arch/x86/kvm/svm/sev.c"

EVENTS: dict[int, NaeEvent] = {
    NaeCode.SNP_PAGE_STATE_CHANGE: NaeEvent(
        "SNP page state change",
        page_state_change,
        scratch=lambda _ghcb: PscHeader.SIZE,
        since=2,
        snp_only=True,
        order=order.page_states,
        source=SECTION,
    ),
    NaeCode.SNP_GUEST_REQUEST: NaeEvent(
        "SNP guest request", guest_request, since=2, snp_only=True, order=order.message, source=SECTION
    ),
    NaeCode.SNP_EXTENDED_GUEST_REQUEST: NaeEvent(
        "SNP extended guest request",
        extended_guest_request,
        required=("rax", "rbx"),
        outputs=("rbx",),
        since=2,
        snp_only=True,
        order=order.message,
        source=SECTION,
    ),
    NaeCode.SNP_AP_CREATION: NaeEvent(
        "SNP AP creation", ap_creation, optional=("rax",), since=2, snp_only=True, source=SECTION
    ),
    NaeCode.APIC_ID_LIST: NaeEvent(
        "APIC ID list",
        apic_id_list,
        optional=("rax",),
        outputs=("rax",),
        since=2,
        feature=4,
        source="56421, APIC ID list; edk2 OvmfPkg",
    ),
    NaeCode.SNP_RUN_VMPL: NaeEvent(
        "run VMPL", run_vmpl, since=2, snp_only=True, feature=5, source="56421, run VMPL; coconut-svsm"
    ),
    **doorbell.EVENTS,
}
"""By SW_EXITCODE."""

MSR_REQUESTS: dict[int, MsrRequest] = {
    MsrInfo.PAGE_STATE_REQUEST: MsrRequest(
        "page state change",
        msr_page_state,
        request=msr_layout.PageStateRequest,
        response=MsrInfo.PAGE_STATE_RESPONSE,
        since=2,
        snp_only=True,
        order=order.page_states,
        source="56421, 2.3; Linux arch/x86/kvm/svm/sev.c",
    ),
    MsrInfo.RUN_VMPL_REQUEST: MsrRequest(
        "run VMPL",
        msr_run_vmpl,
        request=msr_layout.RunVmplRequest,
        response=MsrInfo.RUN_VMPL_RESPONSE,
        since=2,
        snp_only=True,
        source="56421, 2.3; coconut-svsm kernel/src/sev/msr_protocol.rs",
    ),
}
"""By info."""


def register(builder: PluginBuilder) -> None:
    """Add the events and requests."""
    for code, nae_event in EVENTS.items():
        builder.nae_events.add(code, nae_event)
    for info, request in MSR_REQUESTS.items():
        builder.msr_protocol.add(info, request)
    builder.at_entry(doorbell.before_entry)
    builder.component(order.MessagesSent(), order.COMPONENT)
