"""The reference guest before it has a GHCB, and its application processors.

Source: Linux arch/x86/boot/compressed/sev.c and arch/x86/coco/sev/core.c (sev_es_negotiate_protocol, setup_ghcb,
sev_es_setup_ap_jump_table); edk2 UefiCpuPkg/Library/MpInitLib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.layout import Layout, u16
from sevlab.plugins.sev_es.ghcb import PROTOCOL_MAX, PROTOCOL_MIN, HvFeature, NaeCode
from sevlab.plugins.sev_es.guest import MsrExit, Outcome, PageExit, VcContext, VcHandler, VcResult, call
from sevlab.plugins.sev_es.msr_layout import (
    INFO_MASK,
    GhcbGpa,
    MsrInfo,
    NoArgument,
    SevInfoResponse,
    TerminateRequest,
    build,
    decode,
)

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

REASON_PROTOCOL, REASON_SNP = 1, 2
LINUX_SET, REASON_REGISTER = 1, 0


class ApJumpTable(Layout, size=4):
    """Where an AP goes after its reset hold: the first four bytes of the page.

    Source: 56421, AP jump table; edk2 MdePkg/Include/Register/Amd/Ghcb.h.
    """

    ip = u16(0, source="56421, AP jump table")
    cs = u16(2, source="56421, AP jump table")


def before_setup(ghcb_gpa: int, *, snp: bool, version: int = 0) -> VcHandler:
    """Negotiate the version; in an SNP guest ask for the features, and register the page.

    `version`: what another vCPU of an SNP guest has negotiated; then there is only the page to register. `length` of
    the result is the version. Source: Linux arch/x86/coco/sev/core.c (sev_es_negotiate_protocol,
    snp_register_ghcb_early), arch/x86/boot/compressed/sev.c (sev_enable, get_hv_features).
    """
    if not version:
        answer = yield MsrExit(build(NoArgument, MsrInfo.SEV_INFO_REQUEST))
        info = decode(answer) if isinstance(answer, int) else None
        if not isinstance(info, SevInfoResponse) or info.version_min > PROTOCOL_MAX or info.version_max < PROTOCOL_MIN:
            return (yield from _end(0, REASON_PROTOCOL, "no protocol version in common"))
        version = min(info.version_max, PROTOCOL_MAX)
        if snp:
            answer = yield MsrExit(build(NoArgument, MsrInfo.HV_FEATURES_REQUEST))
            value = answer if isinstance(answer, int) else 0
            if value & INFO_MASK != MsrInfo.HV_FEATURES_RESPONSE or not value >> 12 & HvFeature.SNP:
                return (yield from _end(0, REASON_SNP, "the hypervisor does not offer SNP"))
    if snp:
        answer = yield MsrExit(build(GhcbGpa, MsrInfo.REGISTER_GPA_REQUEST, gfn=ghcb_gpa >> 12))
        if answer != ghcb_gpa | MsrInfo.REGISTER_GPA_RESPONSE:
            return (yield from _end(LINUX_SET, REASON_REGISTER, "the GHCB was not registered"))
    return VcResult(Outcome.DONE, version)


def _end(reason_set: int, reason_code: int, why: str) -> VcHandler:
    yield MsrExit(build(TerminateRequest, MsrInfo.TERMINATE_REQUEST, reason_set=reason_set, reason_code=reason_code))
    return VcResult(Outcome.TERMINATE, reason=why)


def jump_table_request(context: VcContext, *, gpa: int = -1) -> VcHandler:
    """Ask for the AP jump table's GPA, or set it; the answer is in the result's `length`.

    Source: Linux arch/x86/coco/sev/core.c (get_jump_table_addr).
    """
    request = PageExit(NaeCode.AP_JUMP_TABLE, 1) if gpa < 0 else PageExit(NaeCode.AP_JUMP_TABLE, 0, gpa)
    reply = yield from call(context, request)
    return VcResult(Outcome.DONE, reply.info_2)


def jump_table_entry(machine: Machine, vcpu: Vcpu, gpa: int) -> None:
    """Start an AP where the table says: real mode at CS:IP. The page is the guest's own, encrypted memory."""
    table = ApJumpTable.from_bytes(machine.access.guest_physical_read(vcpu, gpa, ApJumpTable.SIZE, c_bit=True))
    vcpu.system.cs = (table.cs, 0x9B, 0xFFFF, table.cs << 4)
    vcpu.regs.rip = table.ip
