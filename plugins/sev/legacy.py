"""Every legacy command, declared: from here come dispatch, checks, documentation, mutation and decoding."""

from __future__ import annotations

from sevlab.core.layout import Layout
from sevlab.plugins.sev import buffers as b
from sevlab.plugins.sev.command import Family, MailboxCommand
from sevlab.plugins.sev.context import sev_state
from sevlab.plugins.sev.handlers import guest, launch, platform
from sevlab.plugins.sev.layout import AttestationReport, Measurement, PacketHeader, Session
from sevlab.plugins.sev.numbers import Command
from sevlab.plugins.sev.states import PLATFORM

LEGACY = Family("sev", PLATFORM, lambda machine: sev_state(machine).state)

LEGACY_COMMANDS = (
    MailboxCommand(command=Command.INIT, handler=platform.init, buffer=b.Init),
    MailboxCommand(command=Command.SHUTDOWN, handler=platform.shutdown),
    MailboxCommand(command=Command.PLATFORM_RESET, handler=platform.platform_reset),
    MailboxCommand(
        command=Command.PLATFORM_STATUS,
        handler=platform.platform_status,
        buffer=b.PlatformStatus,
        outputs=("api_major", "api_minor", "state", "external_owner", "config_es", "build_id", "guest_count"),
    ),
    MailboxCommand(command=Command.DF_FLUSH, handler=platform.df_flush),
    MailboxCommand(
        command=Command.GET_ID, handler=platform.get_id, buffer=b.OneBlob, outputs=("length",), length_query=True
    ),
    MailboxCommand(command=Command.INIT_EX, handler=platform.init_ex, buffer=b.InitEx),
    MailboxCommand(command=Command.NOP, handler=platform.nop),
    MailboxCommand(command=Command.DECOMMISSION, handler=guest.decommission, buffer=b.HandleOnly),
    MailboxCommand(command=Command.ACTIVATE, handler=guest.activate, buffer=b.Activate),
    MailboxCommand(command=Command.DEACTIVATE, handler=guest.deactivate, buffer=b.HandleOnly),
    MailboxCommand(
        command=Command.GUEST_STATUS,
        handler=guest.guest_status,
        buffer=b.GuestStatus,
        outputs=("policy", "asid", "state"),
    ),
    MailboxCommand(command=Command.COPY, handler=guest.copy, buffer=b.Copy),
    MailboxCommand(command=Command.ACTIVATE_EX, handler=guest.activate_ex, buffer=b.ActivateEx),
    MailboxCommand(
        command=Command.LAUNCH_START, handler=launch.launch_start, buffer=b.LaunchStart, outputs=("handle",)
    ),
    MailboxCommand(command=Command.LAUNCH_UPDATE_DATA, handler=launch.launch_update_data, buffer=b.LaunchUpdate),
    MailboxCommand(
        command=Command.LAUNCH_UPDATE_VMSA,
        handler=launch.launch_update_vmsa,
        buffer=b.LaunchUpdate,
        early=launch.vmsa_length,
    ),
    MailboxCommand(
        command=Command.LAUNCH_MEASURE,
        handler=launch.launch_measure,
        buffer=b.LaunchMeasure,
        outputs=("length",),
        length_query=True,
    ),
    MailboxCommand(command=Command.LAUNCH_SECRET, handler=launch.launch_secret, buffer=b.Transport),
    MailboxCommand(command=Command.LAUNCH_FINISH, handler=launch.launch_finish, buffer=b.HandleOnly),
    MailboxCommand(
        command=Command.ATTESTATION,
        handler=launch.attestation,
        buffer=b.Attestation,
        outputs=("length",),
        length_query=True,
    ),
)

LAYOUTS: tuple[type[Layout], ...] = (
    Session,
    PacketHeader,
    Measurement,
    AttestationReport,
    *dict.fromkeys(declared.buffer for declared in LEGACY_COMMANDS if declared.buffer is not None),
)
"""The structures of the interface."""
