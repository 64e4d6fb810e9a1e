"""Every legacy command, declared: from here come dispatch, checks, documentation, mutation and decoding."""

from __future__ import annotations

from sevlab.core.layout import Layout
from sevlab.plugins.sev import buffers as b
from sevlab.plugins.sev.command import Family, Handler, MailboxCommand, markdown_table
from sevlab.plugins.sev.context import sev_state
from sevlab.plugins.sev.firmware import FirmwareHeader, download_firmware
from sevlab.plugins.sev.handlers import debug, guest, keys, launch, migration, platform, swap
from sevlab.plugins.sev.layout import AttestationReport, Measurement, PacketHeader, Session, SwapMetadata
from sevlab.plugins.sev.numbers import Command
from sevlab.plugins.sev.ring import RingCommand, RingControl, RingHead, RingStatus, RingTail, ring_buffer
from sevlab.plugins.sev.states import PLATFORM

LEGACY = Family("sev", PLATFORM, lambda machine: sev_state(machine).state)


def _declare(command: Command, handler: Handler, buffer: type[Layout] | None = None, *outputs: str) -> MailboxCommand:
    return MailboxCommand(
        command=command,
        handler=handler,
        buffer=buffer,
        outputs=outputs,
        firmware_page=command in FIRMWARE_PAGE,
        length_query=command in LENGTH_QUERY,
        early=launch.vmsa_length if command is Command.LAUNCH_UPDATE_VMSA else None,
    )


FIRMWARE_PAGE = (
    Command.PLATFORM_STATUS,
    Command.PEK_CSR,
    Command.PDH_CERT_EXPORT,
    Command.GET_ID,
    Command.GUEST_STATUS,
    Command.LAUNCH_START,
    Command.LAUNCH_MEASURE,
    Command.SEND_START,
    Command.SEND_UPDATE_DATA,
    Command.SEND_UPDATE_VMSA,
    Command.RECEIVE_START,
    Command.SWAP_OUT,
)
LENGTH_QUERY = (
    Command.PEK_CSR,
    Command.PDH_CERT_EXPORT,
    Command.GET_ID,
    Command.LAUNCH_MEASURE,
    Command.ATTESTATION,
    Command.SEND_START,
    Command.SEND_UPDATE_DATA,
    Command.SEND_UPDATE_VMSA,
    Command.SWAP_OUT,
)
"""Source of both: AMD-ASPFW sev_uapp/src/sev_dispatch.c, master_handler_table."""

WRITTEN: dict[Command, tuple[tuple[str, str], ...]] = {
    Command.PEK_CSR: (("spa", "length"),),
    Command.PDH_CERT_EXPORT: (("pdh_spa", "pdh_bytes"), ("chain_spa", "chain_bytes")),
    Command.GET_ID: (("spa", "length"),),
    Command.LAUNCH_UPDATE_DATA: (("spa", "length"),),
    Command.LAUNCH_UPDATE_VMSA: (("spa", "length"),),
    Command.LAUNCH_MEASURE: (("spa", "length"),),
    Command.LAUNCH_SECRET: (("guest_spa", "guest_bytes"),),
    Command.ATTESTATION: (("spa", "length"),),
    Command.SEND_START: (("session_spa", "session_bytes"),),
    Command.SEND_UPDATE_DATA: (("header_spa", "header_bytes"), ("transport_spa", "transport_bytes")),
    Command.SEND_UPDATE_VMSA: (("header_spa", "header_bytes"), ("transport_spa", "transport_bytes")),
    Command.RECEIVE_UPDATE_DATA: (("guest_spa", "guest_bytes"),),
    Command.RECEIVE_UPDATE_VMSA: (("guest_spa", "guest_bytes"),),
    Command.DBG_DECRYPT: (("destination_spa", "length"),),
    Command.DBG_ENCRYPT: (("destination_spa", "length"),),
}
"""The memory that a command writes besides its buffer: address and length. COPY and the swaps, which no driver sends,
are left to their callers. Source: Linux drivers/crypto/ccp/sev-dev.c, snp_populate_cmd_buf_desc_list.
"""

LEGACY_COMMANDS: tuple[MailboxCommand, ...] = (
    _declare(Command.INIT, platform.init, b.Init),
    _declare(Command.SHUTDOWN, platform.shutdown),
    _declare(Command.PLATFORM_RESET, platform.platform_reset),
    _declare(
        Command.PLATFORM_STATUS,
        platform.platform_status,
        b.PlatformStatus,
        *("api_major", "api_minor", "state", "owner", "config", "build_id", "guest_count"),
    ),
    _declare(Command.PEK_GEN, keys.pek_gen),
    _declare(Command.PEK_CSR, keys.pek_csr, b.OneBlob, "length"),
    _declare(Command.PEK_CERT_IMPORT, keys.pek_cert_import, b.PekCertImport),
    _declare(Command.PDH_CERT_EXPORT, keys.pdh_cert_export, b.PdhCertExport, "pdh_bytes", "chain_bytes"),
    _declare(Command.PDH_GEN, keys.pdh_gen),
    _declare(Command.DF_FLUSH, platform.df_flush),
    _declare(Command.DOWNLOAD_FIRMWARE, download_firmware, b.OneBlob),
    _declare(Command.GET_ID, platform.get_id, b.OneBlob, "length"),
    _declare(Command.INIT_EX, platform.init_ex, b.InitEx),
    _declare(Command.NOP, platform.nop),
    _declare(Command.RING_BUFFER, ring_buffer, b.RingBuffer),
    _declare(Command.DECOMMISSION, guest.decommission, b.HandleOnly),
    _declare(Command.ACTIVATE, guest.activate, b.Activate),
    _declare(Command.DEACTIVATE, guest.deactivate, b.HandleOnly),
    _declare(Command.GUEST_STATUS, guest.guest_status, b.GuestStatus, "policy", "asid", "state"),
    _declare(Command.COPY, guest.copy, b.Copy),
    _declare(Command.ACTIVATE_EX, guest.activate_ex, b.ActivateEx),
    _declare(Command.LAUNCH_START, launch.launch_start, b.LaunchStart, "handle"),
    _declare(Command.LAUNCH_UPDATE_DATA, launch.launch_update_data, b.LaunchUpdate),
    _declare(Command.LAUNCH_UPDATE_VMSA, launch.launch_update_vmsa, b.LaunchUpdate),
    _declare(Command.LAUNCH_MEASURE, launch.launch_measure, b.LaunchMeasure, "length"),
    _declare(Command.LAUNCH_SECRET, launch.launch_secret, b.Transport),
    _declare(Command.LAUNCH_FINISH, launch.launch_finish, b.HandleOnly),
    _declare(Command.ATTESTATION, launch.attestation, b.Attestation, "length"),
    _declare(Command.SEND_START, migration.send_start, b.SendStart, "policy", "session_bytes"),
    _declare(Command.SEND_UPDATE_DATA, migration.send_update_data, b.Transport, "header_bytes"),
    _declare(Command.SEND_UPDATE_VMSA, migration.send_update_vmsa, b.Transport, "header_bytes"),
    _declare(Command.SEND_FINISH, migration.send_finish, b.HandleOnly),
    _declare(Command.SEND_CANCEL, migration.send_cancel, b.HandleOnly),
    _declare(Command.RECEIVE_START, migration.receive_start, b.LaunchStart, "handle"),
    _declare(Command.RECEIVE_UPDATE_DATA, migration.receive_update_data, b.Transport),
    _declare(Command.RECEIVE_UPDATE_VMSA, migration.receive_update_vmsa, b.Transport),
    _declare(Command.RECEIVE_FINISH, migration.receive_finish, b.HandleOnly),
    _declare(Command.DBG_DECRYPT, debug.dbg_decrypt, b.Debug),
    _declare(Command.DBG_ENCRYPT, debug.dbg_encrypt, b.Debug),
    _declare(Command.SWAP_OUT, swap.swap_out, b.SwapOut),
    _declare(Command.SWAP_IN, swap.swap_in, b.SwapIn),
)

LAYOUTS: tuple[type[Layout], ...] = (
    Session,
    PacketHeader,
    Measurement,
    AttestationReport,
    SwapMetadata,
    FirmwareHeader,
    RingControl,
    RingTail,
    RingHead,
    RingCommand,
    RingStatus,
    *dict.fromkeys(declared.buffer for declared in LEGACY_COMMANDS if declared.buffer is not None),
)
"""The structures of the interface."""


def markdown_tables() -> str:
    """All commands for documentation."""
    return markdown_table(LEGACY, LEGACY_COMMANDS)
