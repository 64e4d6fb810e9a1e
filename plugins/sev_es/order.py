"""The order checker: is a GHCB conversation legal in its order? It warns; a hypervisor answers all the same.

The order itself is a table; what depends on more than the order (versions, features, the page's state) are named
checks beside it. Rule names R1 to R15 are those of docs/sev_es.md.
Source: 56421, 2.3 and 4; Linux arch/x86/coco/sev and arch/x86/boot/compressed/sev.c for the order that guests keep.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from sevlab.core.state import StateDict, Stateful, new
from sevlab.core.statemachine import StateMachine
from sevlab.core.svm import ExitCode
from sevlab.plugins.sev_es.ghcb import (
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    SHARED_BUFFER_BYTES,
    SHARED_BUFFER_OFFSET,
    Ghcb,
    HvFeature,
    NaeCode,
)
from sevlab.plugins.sev_es.insn import MNEMONICS, decode
from sevlab.plugins.sev_es.msr_layout import INFO_MASK, MsrInfo


class Stage(IntEnum):
    """How far the conversation of one vCPU has come."""

    START = 0
    NEGOTIATED = 1
    PAGED = 2
    ENDED = 3


class Message(IntEnum):
    """What a VMGEXIT is, as far as the order is concerned."""

    SEV_INFO = 0
    CPUID = 1
    FEATURES = 2
    REGISTER = 3
    PAGE_STATE = 4
    RUN_VMPL = 5
    RESET_HOLD = 6
    PREFERRED_GPA = 7
    OTHER_MSR = 8
    PAGE = 9
    TERMINATE = 10


_EARLY = (
    Message.CPUID,
    Message.FEATURES,
    Message.REGISTER,
    Message.PAGE_STATE,
    Message.RUN_VMPL,
    Message.RESET_HOLD,
    Message.PREFERRED_GPA,
)

CONVERSATION = StateMachine(
    name="sev_es.conversation",
    initial=Stage.START,
    reject="out of order",
    table={
        Stage.START: dict.fromkeys((Message.CPUID, Message.RESET_HOLD), Stage.START)
        | {Message.SEV_INFO: Stage.NEGOTIATED, Message.TERMINATE: Stage.ENDED},
        Stage.NEGOTIATED: dict.fromkeys((*_EARLY, Message.SEV_INFO), Stage.NEGOTIATED)
        | {Message.PAGE: Stage.PAGED, Message.TERMINATE: Stage.ENDED},
        Stage.PAGED: dict.fromkeys((*_EARLY, Message.SEV_INFO, Message.PAGE), Stage.PAGED)
        | {Message.TERMINATE: Stage.ENDED},
        Stage.ENDED: {},
    },
    messages=tuple(Message),
)

_BY_INFO: dict[int, Message] = {
    MsrInfo.SEV_INFO_REQUEST: Message.SEV_INFO,
    MsrInfo.CPUID_REQUEST: Message.CPUID,
    MsrInfo.HV_FEATURES_REQUEST: Message.FEATURES,
    MsrInfo.REGISTER_GPA_REQUEST: Message.REGISTER,
    MsrInfo.PAGE_STATE_REQUEST: Message.PAGE_STATE,
    MsrInfo.RUN_VMPL_REQUEST: Message.RUN_VMPL,
    MsrInfo.AP_RESET_HOLD_REQUEST: Message.RESET_HOLD,
    MsrInfo.PREFERRED_GPA_REQUEST: Message.PREFERRED_GPA,
    MsrInfo.TERMINATE_REQUEST: Message.TERMINATE,
}

SNP_CODES = frozenset(
    (
        NaeCode.SNP_PAGE_STATE_CHANGE,
        NaeCode.SNP_GUEST_REQUEST,
        NaeCode.SNP_EXTENDED_GUEST_REQUEST,
        NaeCode.SNP_AP_CREATION,
        NaeCode.HV_DOORBELL,
        NaeCode.SNP_RUN_VMPL,
    )
)
AP_DESTROY = 2
SNP_INFOS = range(MsrInfo.PREFERRED_GPA_REQUEST, MsrInfo.RUN_VMPL_REQUEST + 1)
V2_CODES = range(NaeCode.SNP_PAGE_STATE_CHANGE, NaeCode.TERMINATION + 1)
FEATURE_OF: dict[int, HvFeature] = {
    NaeCode.SNP_AP_CREATION: HvFeature.SNP_AP_CREATION,
    NaeCode.HV_DOORBELL: HvFeature.RESTRICTED_INJECTION,
    NaeCode.HV_IPI: HvFeature.RESTRICTED_INJECTION,
    NaeCode.HV_TIMER: HvFeature.RESTRICTED_INJECTION_TIMER,
    NaeCode.APIC_ID_LIST: HvFeature.APIC_ID_LIST,
    NaeCode.SNP_RUN_VMPL: HvFeature.MULTIPLE_VMPLS,
    NaeCode.CONFIGURE_INTERRUPT_INJECTION: HvFeature.EXTENDED_INTERRUPTS,
    NaeCode.DISABLE_ALTERNATE_INJECTION: HvFeature.EXTENDED_INTERRUPTS,
    NaeCode.SPECIFIC_EOI: HvFeature.EXTENDED_INTERRUPTS,
}


class Exchange(NamedTuple):
    """One VMGEXIT to judge. `page` is the GHCB (None for the MSR protocol); `boot`: the boot processor's.

    `shared` says whether the page was shared at that moment, where that is known; `features` what was offered so far;
    `apic_id` is the vCPU's number in its VM.
    """

    vcpu: int
    ghcb_msr: int
    page: Ghcb | None = None
    boot: bool = True
    snp: bool = False
    shared: bool = True
    features: int = 0
    apic_id: int = 0


class Broken(NamedTuple):
    """A rule that was broken, and how."""

    rule: str
    message: str


class VcpuOrder(Stateful):
    """What the checker remembers of one vCPU."""

    stage: Stage = Stage.START
    registered_gpa: int = -1
    exits: int = 0


class OrderState(Stateful):
    """What the checker remembers of a guest."""

    vcpus: StateDict[int, VcpuOrder] = new(StateDict)
    negotiated: bool = False
    features_asked: bool = False
    created: StateDict[int, bool] = new(StateDict)
    """vCPUs that an AP creation named."""


def message_of(exchange: Exchange) -> Message:
    """Which message of the table an exchange is."""
    if exchange.page is not None:
        ends = exchange.page.is_valid("sw_exit_code") and exchange.page.sw_exit_code == NaeCode.TERMINATION
        return Message.TERMINATE if ends else Message.PAGE
    return _BY_INFO.get(exchange.ghcb_msr & INFO_MASK, Message.OTHER_MSR)


def check(state: OrderState, exchange: Exchange) -> tuple[Broken, ...]:
    """The rules that this VMGEXIT breaks, after all that `state` has seen; remembers it."""
    vcpu = state.vcpus.get(exchange.vcpu)
    if vcpu is None:
        vcpu = state.vcpus[exchange.vcpu] = VcpuOrder()
    warnings = [*_order(state, vcpu, exchange), *_application_processor(state, vcpu, exchange)]
    vcpu.exits += 1
    if exchange.page is None:
        warnings += _msr_rules(state, vcpu, exchange)
    else:
        warnings += _page_rules(state, vcpu, exchange, exchange.page)
    return tuple(warnings)


def _order(state: OrderState, vcpu: VcpuOrder, exchange: Exchange) -> list[Broken]:
    message = message_of(exchange)
    if vcpu.stage is Stage.START and state.negotiated and not exchange.boot:
        vcpu.stage = Stage.NEGOTIATED  # an AP needs not ask again
    target = CONVERSATION.next(vcpu.stage, message)
    if target is not None:
        vcpu.stage = target
        state.negotiated |= target is not Stage.START
        return []
    if vcpu.stage is Stage.ENDED:
        return [Broken("R13", "a VMGEXIT after the termination")]
    if message in (Message.PAGE, Message.TERMINATE):
        first = [Broken("R1", "the first VMGEXIT uses the page protocol")] if not vcpu.exits and exchange.boot else []
        vcpu.stage = Stage.PAGED
        return [*first, Broken("R2", "the page protocol before the SEV information")]
    if message is Message.OTHER_MSR:
        return [Broken("R1", f"request {exchange.ghcb_msr & INFO_MASK:#05x} is none of the MSR protocol")]
    return [Broken("R2", f"{message.name.lower().replace('_', ' ')} before the SEV information")]


def _application_processor(state: OrderState, vcpu: VcpuOrder, exchange: Exchange) -> list[Broken]:
    """R11: an SNP guest's AP is created before it says anything, and registers its GHCB before anything else."""
    if exchange.page is not None and exchange.page.value_or_zero("sw_exit_code") == NaeCode.SNP_AP_CREATION:
        info_1 = exchange.page.value_or_zero("sw_exit_info_1")
        state.created[exchange.vcpu - exchange.apic_id + (info_1 >> 32)] = info_1 & 0xFFFF != AP_DESTROY
    if exchange.boot or not exchange.snp or vcpu.exits:
        return []
    found = []
    if not state.created.get(exchange.vcpu):
        found.append(Broken("R11", f"vCPU {exchange.vcpu} talks, and no AP creation named it"))
    if message_of(exchange) is not Message.REGISTER:
        found.append(Broken("R11", "the first VMGEXIT of an AP does not register its GHCB"))
    return found


def _msr_rules(state: OrderState, vcpu: VcpuOrder, exchange: Exchange) -> list[Broken]:
    info, value = exchange.ghcb_msr & INFO_MASK, exchange.ghcb_msr
    found = []
    if info in SNP_INFOS and not exchange.snp:
        found.append(Broken("R5", f"request {info:#05x} is for SNP guests only"))
    if info == MsrInfo.REGISTER_GPA_REQUEST:
        vcpu.registered_gpa = value & ~INFO_MASK
    if info == MsrInfo.PAGE_STATE_REQUEST and value >> 52 & 0xF not in (1, 2):
        found.append(Broken("R9", f"page state operation {value >> 52 & 0xF}: expected 1 or 2"))
    if info == MsrInfo.HV_FEATURES_REQUEST:
        state.features_asked = True
    return found


def _page_rules(state: OrderState, vcpu: VcpuOrder, exchange: Exchange, page: Ghcb) -> list[Broken]:
    found = []
    code = page.value_or_zero("sw_exit_code")
    if exchange.snp and vcpu.registered_gpa != exchange.ghcb_msr:
        found.append(Broken("R3", f"GHCB {exchange.ghcb_msr:#x} is not registered on this vCPU"))
    if not exchange.shared:
        found.append(Broken("R4", "the GHCB page is not shared"))
    if code in SNP_CODES and not exchange.snp:
        found.append(Broken("R5", f"event {code:#x} is for SNP guests only"))
    if code in V2_CODES and page.protocol_version < 2:
        found.append(Broken("R6", f"event {code:#x} needs version 2, the page says {page.protocol_version}"))
    if not PROTOCOL_MIN <= page.protocol_version <= PROTOCOL_MAX or page.ghcb_usage:
        found.append(Broken("R7", f"version {page.protocol_version}, usage {page.ghcb_usage}"))
    feature = FEATURE_OF.get(code)
    if code == NaeCode.HV_FEATURES:
        state.features_asked = True
    if feature is not None and not (state.features_asked and exchange.features & feature):
        found.append(Broken("R8", f"event {code:#x} without feature {feature.name}"))
    if page.is_valid("sw_scratch") and page.protocol_version >= 2:
        offset = page.sw_scratch - exchange.ghcb_msr
        if not SHARED_BUFFER_OFFSET <= offset < SHARED_BUFFER_OFFSET + SHARED_BUFFER_BYTES:
            found.append(Broken("R15", f"scratch area at {page.sw_scratch:#x}, outside the page's buffer"))
    return found


def check_vc(vc_code: int, insn: bytes, exit_code: int, bits: int = 64) -> tuple[Broken, ...]:
    """R14: do a #VC's code, the bytes at RIP, and the event that the guest sent agree?"""
    if vc_code == ExitCode.NPF:
        if exit_code not in (NaeCode.MMIO_READ, NaeCode.MMIO_WRITE):
            return (Broken("R14", f"#VC {vc_code:#x} was sent as event {exit_code:#x}"),)
        return ()
    expected = MNEMONICS.get(vc_code)
    decoded = decode(insn[:15], bits)
    if exit_code not in (vc_code, NaeCode.UNSUPPORTED):
        return (Broken("R14", f"#VC {vc_code:#x} was sent as event {exit_code:#x}"),)
    if expected is not None and (decoded is None or decoded.mnemonic not in expected):
        name = "no instruction" if decoded is None else decoded.mnemonic
        return (Broken("R14", f"#VC {vc_code:#x} at {name}"),)
    return ()
