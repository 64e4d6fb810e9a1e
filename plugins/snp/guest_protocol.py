"""The reference guest's side of the SNP events, without a machine: requests as generators, answers judged.

As in the #VC handlers of SEV-ES: yield a `PageExit` or an `MsrExit`, get the answer, return a `VcResult`. Whatever the
hypervisor answers, the guest goes on safely or ends itself with the reason that Linux has for it.

Source: Linux arch/x86/coco/sev/core.c (vmgexit_psc, snp_set_memory_*), drivers/virt/coco/sev-guest; 56421.
"""

from __future__ import annotations

from collections.abc import Generator
from enum import IntEnum
from typing import NamedTuple

from sevlab.core.svm import ExitCode
from sevlab.plugins.sev_es import (
    GuestReply,
    MsrExit,
    MsrInfo,
    NaeCode,
    Outcome,
    PageExit,
    VcHandler,
    VcResult,
    msr_layout,
)
from sevlab.plugins.snp.psc import PscEntryValue, PscHeader, PscOperation, build_psc, parse_psc

GHCB_SET, LINUX_SET = 0, 1
GENERAL_REASON = 0
"""Of set 0."""

DOORBELL_SET = 1
X2APIC_EOI = 0x80B
PSC_ATTEMPTS = 1024
"""How often the guest sends an interrupted request again before it gives up; a hypervisor that never gets on is one
that refuses. The number is the model's own."""


class Termination(IntEnum):
    """Reason codes of set 1. Source: Linux arch/x86/include/asm/sev-common.h."""

    REGISTER = 0
    PSC = 1
    PVALIDATE = 2
    NOT_VMPL0 = 3
    CPUID = 4
    CPUID_HV = 5
    SECRETS_PAGE = 6


def terminate(
    code: int, why: str, *, reason_set: int = LINUX_SET
) -> Generator[PageExit | MsrExit, GuestReply | int, VcResult]:
    """Ask for the end of the VM; there is no answer to wait for."""
    value = msr_layout.build(
        msr_layout.TerminateRequest, MsrInfo.TERMINATE_REQUEST, reason_set=reason_set, reason_code=code
    )
    yield MsrExit(value)
    return VcResult(Outcome.TERMINATE, reason=why)


def change_page_states(entries: tuple[PscEntryValue, ...]) -> VcHandler:
    """Have the states of up to 253 pages changed, again and again until the hypervisor is done.

    The reserved word stays 0, END_ENTRY and the entries themselves stay as they were, CUR_ENTRY never goes back; else
    the guest ends. Source: Linux arch/x86/coco/sev/core.c (vmgexit_psc).
    """
    data = build_psc(entries)
    current = 0
    for _ in range(PSC_ATTEMPTS):
        reply = yield PageExit(NaeCode.SNP_PAGE_STATE_CHANGE, data=data, scratch=True, buffer_bytes=len(data))
        assert isinstance(reply, GuestReply)
        if reply.info_1 & 0xFFFF_FFFF or reply.info_2:
            return (yield from terminate(Termination.PSC, f"page state change: result {reply.info_2:#x}"))
        header, answered = parse_psc(reply.data)
        forged = (
            header.reserved_4
            or header.end_entry != len(entries) - 1
            or header.cur_entry < current
            or header.cur_entry > len(entries)
            or any(after._replace(cur_page=0) != entry for after, entry in zip(answered, entries, strict=True))
        )
        if forged:
            return (yield from terminate(Termination.PSC, "page state change: the structure came back forged"))
        current = header.cur_entry
        if current == len(entries):
            return VcResult(Outcome.DONE)
        data = PscHeader.build(cur_entry=current, end_entry=header.end_entry) + reply.data[PscHeader.SIZE :]
    return (yield from terminate(Termination.PSC, "page state change: the hypervisor does not get on"))


def change_page_state_early(gpa: int, operation: PscOperation) -> VcHandler:
    """Have the state of one page changed before there is a GHCB.

    Source: Linux arch/x86/coco/sev/core.c (early_set_pages_state, __page_state_change).
    """
    request = msr_layout.build(
        msr_layout.PageStateRequest, MsrInfo.PAGE_STATE_REQUEST, gfn=gpa >> 12, operation=operation
    )
    answer = yield MsrExit(request)
    assert isinstance(answer, int)
    if answer != MsrInfo.PAGE_STATE_RESPONSE:
        return (yield from terminate(Termination.PSC, f"page state change: response {answer:#x}"))
    return VcResult(Outcome.DONE)


def set_doorbell(gpa: int) -> VcHandler:
    """Register the #HV doorbell page; without interrupts there is nothing to go on with.

    Source: coconut-svsm kernel/src/sev/hv_doorbell.rs; that the page is echoed: 56421, #HV doorbell page.
    """
    reply = yield PageExit(NaeCode.HV_DOORBELL, DOORBELL_SET, gpa)
    assert isinstance(reply, GuestReply)
    if reply.info_1 & 0xFFFF_FFFF or reply.info_2 != gpa:
        why = f"#HV doorbell page: {reply.info_1:#x}, {reply.info_2:#x}"
        return (yield from terminate(GENERAL_REASON, why, reason_set=GHCB_SET))
    return VcResult(Outcome.DONE)


def send_hv_ipi(icr: int) -> VcHandler:
    """Have an interrupt posted to vCPUs of this guest. Source: coconut-svsm kernel/src/sev/ghcb.rs (hv_ipi)."""
    reply = yield PageExit(NaeCode.HV_IPI, icr)
    assert isinstance(reply, GuestReply)
    if reply.info_1 & 0xFFFF_FFFF:
        return VcResult(Outcome.VMM_ERROR, reason=f"#HV IPI: {reply.info_1:#x}, {reply.info_2:#x}")
    return VcResult(Outcome.DONE)


def end_of_interrupt() -> VcHandler:
    """Write the x2APIC's EOI register. Source: coconut-svsm kernel/src/cpu/apic.rs."""
    reply = yield PageExit(ExitCode.MSR, 1, fields={"rcx": X2APIC_EOI, "rax": 0, "rdx": 0})
    assert isinstance(reply, GuestReply)
    if reply.info_1 & 0xFFFF_FFFF:
        return VcResult(Outcome.VMM_ERROR, reason=f"EOI: {reply.info_1:#x}, {reply.info_2:#x}")
    return VcResult(Outcome.DONE)


class MessageAnswer(NamedTuple):
    """What became of a guest request: the VMM's error and the firmware's, and RBX of an extended one."""

    vmm_error: int
    firmware_error: int
    pages_needed: int = 0


def send_guest_request(
    request_gpa: int, response_gpa: int, *, data_gpa: int = 0, data_pages: int = 0, extended: bool = False
) -> Generator[PageExit | MsrExit, GuestReply | int, MessageAnswer | None]:
    """One guest request; None: the hypervisor refused the event itself.

    Source: Linux drivers/virt/coco/sev-guest, arch/x86/coco/sev/core.c (snp_issue_guest_request).
    """
    fields = {"rax": data_gpa, "rbx": data_pages} if extended else {}
    code = NaeCode.SNP_EXTENDED_GUEST_REQUEST if extended else NaeCode.SNP_GUEST_REQUEST
    reply = yield PageExit(code, request_gpa, response_gpa, fields=fields)
    assert isinstance(reply, GuestReply)
    if reply.info_1 & 0xFFFF_FFFF:
        return None
    needed = reply.registers.get("rbx", 0)
    return MessageAnswer(reply.info_2 >> 32, reply.info_2 & 0xFFFF_FFFF, needed)


def create_ap(apic_id: int, vmsa_gpa: int, features: int, *, request: int = 1, vmpl: int = 0) -> VcHandler:
    """Have a vCPU created from a save area, or destroyed (`request` 2).

    Source: Linux arch/x86/coco/sev/core.c (wakeup_cpu_via_vmgexit).
    """
    info_1 = apic_id << 32 | vmpl << 16 | request
    reply = yield PageExit(NaeCode.SNP_AP_CREATION, info_1, vmsa_gpa, fields={"rax": features})
    assert isinstance(reply, GuestReply)
    if reply.info_1 & 0xFFFF_FFFF:
        return VcResult(Outcome.VMM_ERROR, reason=f"AP creation: {reply.info_1:#x}, {reply.info_2:#x}")
    return VcResult(Outcome.DONE)
