"""SEV: guests encrypted under keys of their own, and the Secure Processor's commands for them.

Documents: 55766 (SEV API) revision 3.24; 24593 (APM volume 2) revision 3.42, 15.34.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.cliapi import DemoChapter
from sevlab.core.config import Option
from sevlab.core.hookspecs import hookimpl
from sevlab.plugins.sev import asids, certificates, chain, crypto, firmware, identity, owner, transfers, vmsa_slots
from sevlab.plugins.sev.certificates import CERTIFICATE_LAYOUTS, Algorithm, EcPublicKey
from sevlab.plugins.sev.chain import ARK_ROOTS
from sevlab.plugins.sev.checks import Check, show_checks
from sevlab.plugins.sev.command import Family, MailboxCommand, NoBuffer, Request, mailbox_payload
from sevlab.plugins.sev.command import markdown_table as command_table
from sevlab.plugins.sev.command import register as register_commands
from sevlab.plugins.sev.context import Gctx, SevState, sev_state
from sevlab.plugins.sev.crypto import Point, public_point, scalar_from_seed
from sevlab.plugins.sev.driver import (
    LENDER,
    Launched,
    begin_launch,
    initialise,
    launch_guest,
    need,
    run,
    stop_guest,
)
from sevlab.plugins.sev.fuzzing import COUNTERS, ORACLES, TARGETS
from sevlab.plugins.sev.host import CoreWbinvd
from sevlab.plugins.sev.launch_digest import SevLaunchDigest
from sevlab.plugins.sev.legacy import LAYOUTS, LEGACY, LEGACY_COMMANDS
from sevlab.plugins.sev.numbers import Command, Policy, Status
from sevlab.plugins.sev.nvfile import NvFile
from sevlab.plugins.sev.setup import OPTIONS, register
from sevlab.plugins.sev.signatures import (
    RSA_EXPONENT,
    RsaKey,
    pubkey_bytes,
    pubkey_point,
    rsa_pss_sign,
    sign_ecdsa,
    verify_ecdsa,
)
from sevlab.plugins.sev.states import GUEST, PLATFORM, GuestState, PlatformState
from sevlab.plugins.sev.vendor import vendor_key

if TYPE_CHECKING:
    from typing import Any

    from sevlab.core.builder import PluginBuilder
    from sevlab.core.layout import Layout
    from sevlab.core.oracle import Oracle, StateCounter, Target
    from sevlab.core.payload import Payload
    from sevlab.core.statemachine import StateMachine

REQUIRES: tuple[str, ...] = ("sme",)

__all__ = [
    "ARK_ROOTS",
    "GUEST",
    "LEGACY",
    "LEGACY_COMMANDS",
    "LENDER",
    "PLATFORM",
    "RSA_EXPONENT",
    "Algorithm",
    "Check",
    "Command",
    "CoreWbinvd",
    "EcPublicKey",
    "Family",
    "Gctx",
    "GuestState",
    "Launched",
    "MailboxCommand",
    "NoBuffer",
    "NvFile",
    "PlatformState",
    "Point",
    "Policy",
    "Request",
    "RsaKey",
    "SevLaunchDigest",
    "SevState",
    "Status",
    "asids",
    "begin_launch",
    "certificates",
    "chain",
    "command_table",
    "crypto",
    "firmware",
    "identity",
    "initialise",
    "launch_guest",
    "mailbox_payload",
    "need",
    "owner",
    "pubkey_bytes",
    "pubkey_point",
    "public_point",
    "register_commands",
    "rsa_pss_sign",
    "run",
    "scalar_from_seed",
    "sev_state",
    "show_checks",
    "sign_ecdsa",
    "stop_guest",
    "transfers",
    "vendor_key",
    "verify_ecdsa",
    "vmsa_slots",
]


@hookimpl
def sevlab_options() -> tuple[Option, ...]:
    return OPTIONS


@hookimpl
def sevlab_register(builder: PluginBuilder) -> None:
    register(builder)


@hookimpl
def sevlab_records() -> tuple[type, ...]:
    return (CoreWbinvd,)


@hookimpl
def sevlab_layouts() -> tuple[type[Layout], ...]:
    return (*LAYOUTS, *CERTIFICATE_LAYOUTS, owner.SecretEntry)


@hookimpl
def sevlab_state_machines() -> tuple[StateMachine[Any, Any, Any], ...]:
    return (PLATFORM, GUEST)


@hookimpl
def sevlab_demo_chapters() -> tuple[DemoChapter, ...]:
    return (
        DemoChapter(
            "sev",
            "SEV: an owner launches a guest, and only the guest can read the owner's secret",
            20,
            "sevlab.plugins.sev.demo:chapter",
        ),
    )


@hookimpl
def sevlab_state_counters() -> tuple[StateCounter, ...]:
    return COUNTERS


@hookimpl
def sevlab_payloads() -> tuple[Payload, ...]:
    return (mailbox_payload(LEGACY, LEGACY_COMMANDS),)


@hookimpl
def sevlab_oracles() -> tuple[Oracle, ...]:
    return ORACLES


@hookimpl
def sevlab_targets() -> tuple[Target, ...]:
    return TARGETS
