"""Xen: the hypercall ABIs of a guest, with real state behind them.

Documents: Xen public headers and sources of 4.22-dev (c447b7308b); what a guest is told is 4.17. The physical-address
ABI, FastABI and coco_op are Vates's series, not upstream.

What you may touch: `HypercallEntry` and `Call` (to replace a hypercall by number), `HvContext`, `VpMask` and friends
(to replace a Hyper-V call under `HYPERV_FLAG | code`), `xen`, `Domain` (state), `XenGuest` and
`XenstoreClient` (a scripted guest), `SURVIVAL` (which hypercall survives encryption), and the numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sevlab.core.cliapi import DemoChapter
from sevlab.core.hookspecs import hookimpl
from sevlab.core.porting import Porting
from sevlab.plugins.xen import clock, domains, events, hyperv
from sevlab.plugins.xen.arguments import LAYOUTS as ARGUMENT_LAYOUTS
from sevlab.plugins.xen.assess import SURVIVAL, Fate, Survival, fates, survival
from sevlab.plugins.xen.call import Abi, Call
from sevlab.plugins.xen.discovery import Discovery, hypercall_page
from sevlab.plugins.xen.dispatch import HypercallEntry, Owner
from sevlab.plugins.xen.fuzzing import COUNTERS, ORACLES, PAYLOADS, TARGETS
from sevlab.plugins.xen.guest import XenGuest
from sevlab.plugins.xen.guest_store import XenstoreClient
from sevlab.plugins.xen.hypercalls.table import TABLE
from sevlab.plugins.xen.hyperv import HvContext, HvInput, VpMask, sparse_set
from sevlab.plugins.xen.layout import LAYOUTS
from sevlab.plugins.xen.numbers import (
    ABI_FLAG,
    HYPERV_FLAG,
    Errno,
    Evtchnop,
    Gntst,
    Gnttabop,
    HvCall,
    Hvmop,
    HvStatus,
    Memop,
    Nr,
    Schedop,
    Vcpuop,
)
from sevlab.plugins.xen.records import (
    RECORDS,
    Adapted,
    BackendEvent,
    ConsoleInput,
    ConsoleOutput,
    Hypercalled,
    HypercallPage,
    HypercallStep,
    Upcall,
    XenstoreReply,
    XenstoreRequest,
)
from sevlab.plugins.xen.settings import OPTIONS, settings_of
from sevlab.plugins.xen.sharing import SharedPage, after_firmware, shared_pages
from sevlab.plugins.xen.startup import enter_long_mode, enter_protected_mode
from sevlab.plugins.xen.state import CHANNEL, Domain, XenState, domain_of, xen
from sevlab.plugins.xen.steps import Steps
from sevlab.plugins.xen.xenstore.wire import XsType

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.config import Option
    from sevlab.core.layout import Layout
    from sevlab.core.oracle import Oracle, StateCounter, Target
    from sevlab.core.payload import Payload
    from sevlab.core.statemachine import StateMachine

REQUIRES: tuple[str, ...] = ("io",)

__all__ = [
    "ABI_FLAG",
    "HYPERV_FLAG",
    "SURVIVAL",
    "TABLE",
    "Abi",
    "Adapted",
    "BackendEvent",
    "Call",
    "ConsoleInput",
    "ConsoleOutput",
    "Domain",
    "Errno",
    "Evtchnop",
    "Fate",
    "Gntst",
    "Gnttabop",
    "HvCall",
    "HvContext",
    "HvInput",
    "HvStatus",
    "Hvmop",
    "HypercallEntry",
    "HypercallPage",
    "HypercallStep",
    "Hypercalled",
    "Memop",
    "Nr",
    "Schedop",
    "SharedPage",
    "Survival",
    "Upcall",
    "Vcpuop",
    "VpMask",
    "XenGuest",
    "XenstoreClient",
    "XenstoreReply",
    "XenstoreRequest",
    "XsType",
    "after_firmware",
    "domain_of",
    "enter_long_mode",
    "enter_protected_mode",
    "hypercall_page",
    "shared_pages",
    "sparse_set",
    "survival",
    "xen",
]


@hookimpl
def sevlab_register(builder: PluginBuilder) -> None:
    settings = settings_of(builder.options)
    builder.component(XenState())
    owner = Owner(settings)
    builder.slot("hypercall", owner.serve)
    builder.slot("hypercall_registers", owner.passed)
    builder.slot("next_timer", clock.next_timer)
    builder.slot("direct_interrupt", events.direct_interrupt)
    for number, entry in TABLE.items():
        builder.hypercalls.add(number, entry)
    for code, handler in hyperv.CALLS.items():
        builder.hypercalls.add(HYPERV_FLAG | code, handler)
    Discovery(settings).register(builder)
    Steps(settings).register(builder)
    builder.at_boot(lambda machine: domains.build(machine, settings))


@hookimpl
def sevlab_options() -> tuple[Option, ...]:
    return OPTIONS


@hookimpl
def sevlab_records() -> tuple[type, ...]:
    return RECORDS


@hookimpl
def sevlab_layouts() -> tuple[type[Layout], ...]:
    return (*LAYOUTS, *ARGUMENT_LAYOUTS)


@hookimpl
def sevlab_state_machines() -> tuple[StateMachine[Any, Any, Any], ...]:
    return (CHANNEL,)


@hookimpl
def sevlab_oracles() -> tuple[Oracle, ...]:
    return ORACLES


@hookimpl
def sevlab_targets() -> tuple[Target, ...]:
    return TARGETS


@hookimpl
def sevlab_state_counters() -> tuple[StateCounter, ...]:
    return COUNTERS


@hookimpl
def sevlab_payloads() -> tuple[Payload, ...]:
    return PAYLOADS


@hookimpl
def sevlab_porting() -> tuple[Porting, ...]:
    calls = fates()
    return tuple(Porting(feature, calls=calls) for feature in ("sev", "sev-es", "snp"))


@hookimpl
def sevlab_demo_chapters() -> tuple[DemoChapter, ...]:
    return (
        DemoChapter(
            "xen",
            "Xen: one guest, three hypercall ABIs, with and without encryption",
            60,
            "sevlab.plugins.xen.demo:chapter",
        ),
    )
