"""SEV-SNP: RMP, launch, guest messages, attestation, VMPLs and page states.

Documents: 56860 (SNP firmware ABI) revision 1.58; 56421 (GHCB) revision 2.04; 24593 (APM volume 2) revision 3.42,
15.36.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.cliapi import DemoChapter
from sevlab.core.config import Option
from sevlab.core.hookspecs import hookimpl
from sevlab.plugins.sev import mailbox_payload
from sevlab.plugins.snp.automata import SNP_GUEST, SNP_PLATFORM
from sevlab.plugins.snp.buffers import SnpActivate, SnpGuestRequest
from sevlab.plugins.snp.cert_table import CertTableRow
from sevlab.plugins.snp.command_table import COMMAND_LAYOUTS, SNP, SNP_COMMANDS
from sevlab.plugins.snp.firmware import MetadataHeader, MetadataSection
from sevlab.plugins.snp.fuzzing import COUNTERS, FORGED_PSC, GHCB_PAYLOADS
from sevlab.plugins.snp.guest_agent import Agent
from sevlab.plugins.snp.guest_pages import GUEST_PAGE_LAYOUTS
from sevlab.plugins.snp.guest_protocol import change_page_states
from sevlab.plugins.snp.id_block import IdAuth, IdBlock
from sevlab.plugins.snp.injection import VintrCtrl
from sevlab.plugins.snp.kernel_hashes import KernelHashTable
from sevlab.plugins.snp.launch_digest import PageInfo
from sevlab.plugins.snp.layout import RmpEntry, RmpState
from sevlab.plugins.snp.messages import HEADER_BYTES, MESSAGE_LAYOUTS, MessageHeader, header_is_legal
from sevlab.plugins.snp.oracles import ORACLES
from sevlab.plugins.snp.psc import MAX_ENTRIES, PSC_LAYOUTS, PscEntryValue, PscHeader, build_psc, parse_psc
from sevlab.plugins.snp.records import GUEST_RECORDS, RMP_RECORDS, SetPages
from sevlab.plugins.snp.report import REPORT_LAYOUTS
from sevlab.plugins.snp.setup import OPTIONS, register
from sevlab.plugins.snp.states import PAGE_STATES, PageState, page_state, snp_state
from sevlab.plugins.snp.svsm import SVSM_LAYOUTS, SVSM_RECORDS
from sevlab.plugins.snp.targets import TARGETS

if TYPE_CHECKING:
    from typing import Any

    from sevlab.core.builder import PluginBuilder
    from sevlab.core.layout import Layout
    from sevlab.core.oracle import Oracle, StateCounter, Target
    from sevlab.core.payload import Payload
    from sevlab.core.statemachine import StateMachine

OWNER_LAYOUTS: tuple[type[Layout], ...] = (
    PageInfo,
    MetadataHeader,
    MetadataSection,
    KernelHashTable,
    IdBlock,
    IdAuth,
    CertTableRow,
)
"""What a guest's owner and a VMM make and read."""

REQUIRES: tuple[str, ...] = ("sme", "sev", "sev_es")

__all__ = [
    "HEADER_BYTES",
    "MAX_ENTRIES",
    "Agent",
    "MessageHeader",
    "PageState",
    "PscEntryValue",
    "PscHeader",
    "RmpEntry",
    "RmpState",
    "SetPages",
    "SnpActivate",
    "SnpGuestRequest",
    "build_psc",
    "change_page_states",
    "header_is_legal",
    "page_state",
    "parse_psc",
    "snp_state",
]


@hookimpl
def sevlab_options() -> tuple[Option, ...]:
    return OPTIONS


@hookimpl
def sevlab_register(builder: PluginBuilder) -> None:
    register(builder)


@hookimpl
def sevlab_records() -> tuple[type, ...]:
    return RMP_RECORDS + GUEST_RECORDS + SVSM_RECORDS


@hookimpl
def sevlab_layouts() -> tuple[type[Layout], ...]:
    return (
        RmpEntry,
        RmpState,
        VintrCtrl,
        *COMMAND_LAYOUTS,
        *MESSAGE_LAYOUTS,
        *GUEST_PAGE_LAYOUTS,
        *PSC_LAYOUTS,
        *SVSM_LAYOUTS,
        *REPORT_LAYOUTS,
        *OWNER_LAYOUTS,
    )


@hookimpl
def sevlab_state_machines() -> tuple[StateMachine[Any, Any, Any], ...]:
    return (PAGE_STATES, SNP_PLATFORM, SNP_GUEST)


@hookimpl
def sevlab_demo_chapters() -> tuple[DemoChapter, ...]:
    return (
        DemoChapter(
            "snp",
            "SNP: a guest launched, attested, and attacked in vain",
            50,
            "sevlab.plugins.snp.demo:chapter",
        ),
        DemoChapter(
            "attestation",
            "SNP: a real report of a Milan verified against AMD's chain",
            60,
            "sevlab.plugins.snp.demo_attestation:chapter",
        ),
    )


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
    return (mailbox_payload(SNP, SNP_COMMANDS), *GHCB_PAYLOADS, FORGED_PSC)
