"""SEV-ES: encrypted register state, #VC, VMGEXIT and the GHCB protocol.

Documents: 56421 (GHCB) revision 2.04; 24593 (APM volume 2) revision 3.42, 15.35.

What you may touch: `Vmsa` and `initial_vmsa` (the encrypted save area and what it holds at launch, by `PROFILES`);
`Ghcb` and `msr_layout` (the page, and every value of the MSR protocol); `NaeEvent` and `MsrRequest` (how to add an
event or a request to the shared tables, or replace one); `Vmgexit` (the step).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.cliapi import DemoChapter
from sevlab.core.config import Option
from sevlab.core.hookspecs import hookimpl
from sevlab.core.porting import Porting
from sevlab.plugins.sev_es import guest_driver, hardware, hypervisor, msr_layout, startup
from sevlab.plugins.sev_es.declare import (
    DONE,
    GENERAL_PROTECTION,
    INVALID_EVENT,
    INVALID_INPUT,
    INVALID_SCRATCH,
    MISSING_INPUT,
    Case,
    MsrRequest,
    NaeEvent,
    Need,
    Reply,
    exception,
    malformed,
)
from sevlab.plugins.sev_es.events import EVENTS as REGISTER_EVENTS
from sevlab.plugins.sev_es.exits import ExitClass, exit_class
from sevlab.plugins.sev_es.fuzzing import COUNTERS, PAYLOADS, TARGETS
from sevlab.plugins.sev_es.ghcb import (
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    SHARED_BUFFER_BYTES,
    SHARED_BUFFER_OFFSET,
    VALID_BITS,
    Ghcb,
    HvFeature,
    NaeCode,
    Reason,
    Result,
    Usage,
    valid_mask,
)
from sevlab.plugins.sev_es.guest import (
    CR4_OSXSAVE,
    GuestReply,
    MsrExit,
    Outcome,
    PageExit,
    VcContext,
    VcEnd,
    VcHandler,
    VcResult,
    call,
    handle,
)
from sevlab.plugins.sev_es.guest_driver import ReferenceGuest, guest_side
from sevlab.plugins.sev_es.guest_events import HANDLERS, INDEXED_LEAVES
from sevlab.plugins.sev_es.guest_startup import ApJumpTable, before_setup, jump_table_request
from sevlab.plugins.sev_es.hardware import enter_encrypted
from sevlab.plugins.sev_es.hyperv import HypervPage
from sevlab.plugins.sev_es.hypervisor import ghcb_window, write_reply
from sevlab.plugins.sev_es.insn import MNEMONICS as VC_MNEMONICS
from sevlab.plugins.sev_es.insn import VcInsn, may_raise
from sevlab.plugins.sev_es.insn import decode as decode_vc
from sevlab.plugins.sev_es.io_events import EVENTS as IO_EVENTS
from sevlab.plugins.sev_es.io_events import KVM_6_12, SHARED_BUFFER
from sevlab.plugins.sev_es.msr_layout import MSR_GHCB, MSR_SEV_STATUS, MsrInfo
from sevlab.plugins.sev_es.msr_requests import REQUESTS
from sevlab.plugins.sev_es.oracles import ORACLES
from sevlab.plugins.sev_es.order import CONVERSATION, Broken, Exchange, OrderState, check, check_vc
from sevlab.plugins.sev_es.porting import PORTING
from sevlab.plugins.sev_es.profiles import PROFILES, RESET_EIP, VmsaProfile, initial_vmsa
from sevlab.plugins.sev_es.records import (
    RECORDS,
    ForgeMsr,
    ForgeReply,
    GhcbReply,
    GhcbRequest,
    GuestApHold,
    GuestFailed,
    GuestFault,
    GuestSetup,
    MsrReply,
    NmiInside,
    OrderWarning,
    Terminated,
    VcDelivered,
    Vmgexit,
    VmgexitIgnored,
)
from sevlab.plugins.sev_es.save_area import state_bytes
from sevlab.plugins.sev_es.scratch import Scratch
from sevlab.plugins.sev_es.startup import set_up_vcpus
from sevlab.plugins.sev_es.states import OPTIONS, Hold, SevEsState, sev_es_state, vcpu_protocol, vm_protocol
from sevlab.plugins.sev_es.vmsa import SevFeatures, Vmsa, segment_bytes, segment_of

if TYPE_CHECKING:
    from typing import Any

    from sevlab.core.builder import PluginBuilder
    from sevlab.core.layout import Layout
    from sevlab.core.oracle import Oracle, StateCounter, Target
    from sevlab.core.payload import Payload
    from sevlab.core.statemachine import StateMachine

REQUIRES: tuple[str, ...] = ("sme", "sev")

__all__ = [
    "CONVERSATION",
    "CR4_OSXSAVE",
    "DONE",
    "GENERAL_PROTECTION",
    "HANDLERS",
    "INDEXED_LEAVES",
    "INVALID_EVENT",
    "INVALID_INPUT",
    "INVALID_SCRATCH",
    "MISSING_INPUT",
    "MSR_GHCB",
    "MSR_SEV_STATUS",
    "PROFILES",
    "PROTOCOL_MAX",
    "PROTOCOL_MIN",
    "RESET_EIP",
    "SHARED_BUFFER",
    "SHARED_BUFFER_BYTES",
    "SHARED_BUFFER_OFFSET",
    "VALID_BITS",
    "VC_MNEMONICS",
    "ApJumpTable",
    "Broken",
    "Case",
    "Exchange",
    "ExitClass",
    "ForgeMsr",
    "ForgeReply",
    "Ghcb",
    "GhcbReply",
    "GhcbRequest",
    "GuestApHold",
    "GuestFailed",
    "GuestFault",
    "GuestReply",
    "GuestSetup",
    "Hold",
    "HvFeature",
    "MsrExit",
    "MsrInfo",
    "MsrReply",
    "MsrRequest",
    "NaeCode",
    "NaeEvent",
    "Need",
    "NmiInside",
    "OrderState",
    "OrderWarning",
    "Outcome",
    "PageExit",
    "Reason",
    "ReferenceGuest",
    "Reply",
    "Result",
    "Scratch",
    "SevEsState",
    "SevFeatures",
    "Terminated",
    "Usage",
    "VcContext",
    "VcDelivered",
    "VcEnd",
    "VcHandler",
    "VcInsn",
    "VcResult",
    "Vmgexit",
    "VmgexitIgnored",
    "Vmsa",
    "VmsaProfile",
    "before_setup",
    "call",
    "check",
    "check_vc",
    "decode_vc",
    "enter_encrypted",
    "exception",
    "exit_class",
    "ghcb_window",
    "guest_side",
    "handle",
    "initial_vmsa",
    "jump_table_request",
    "malformed",
    "may_raise",
    "msr_layout",
    "segment_bytes",
    "segment_of",
    "set_up_vcpus",
    "sev_es_state",
    "state_bytes",
    "valid_mask",
    "vcpu_protocol",
    "vm_protocol",
    "write_reply",
]


@hookimpl
def sevlab_options() -> tuple[Option, ...]:
    return OPTIONS


@hookimpl
def sevlab_register(builder: PluginBuilder) -> None:
    state = SevEsState()
    builder.component(state)
    events = REGISTER_EVENTS | IO_EVENTS
    if builder.options["checks"] == "kvm-6.12":
        events |= KVM_6_12
    for code, event in events.items():
        builder.nae_events.add(code, event)
    for info, request in REQUESTS.items():
        builder.msr_protocol.add(info, request)
    hypervisor.register(builder)
    for code, handler in HANDLERS.items():
        builder.vc_handlers.add(code, handler)
    guest = guest_driver.register(builder)
    runs = builder.options["guest"] != "none"
    hardware.register(builder, state, guest.handle_vc if runs else None)
    startup.register(builder, guest.woken if runs else None)


@hookimpl
def sevlab_state_machines() -> tuple[StateMachine[Any, Any, Any], ...]:
    return (CONVERSATION,)


@hookimpl
def sevlab_demo_chapters() -> tuple[DemoChapter, ...]:
    return (
        DemoChapter(
            "sev_es",
            "SEV-ES: a guest whose registers nobody sees prints through the GHCB",
            40,
            "sevlab.plugins.sev_es.demo:chapter",
        ),
    )


@hookimpl
def sevlab_state_counters() -> tuple[StateCounter, ...]:
    return COUNTERS


@hookimpl
def sevlab_porting() -> tuple[Porting, ...]:
    return PORTING


@hookimpl
def sevlab_records() -> tuple[type, ...]:
    return RECORDS


@hookimpl
def sevlab_layouts() -> tuple[type[Layout], ...]:
    return (Ghcb, Vmsa, SevFeatures, HypervPage, *dict.fromkeys(msr_layout.LAYOUTS.values()))


@hookimpl
def sevlab_payloads() -> tuple[Payload, ...]:
    return PAYLOADS


@hookimpl
def sevlab_oracles() -> tuple[Oracle, ...]:
    return ORACLES


@hookimpl
def sevlab_targets() -> tuple[Target, ...]:
    return TARGETS
