"""Every SNP command, declared: from here come dispatch, checks, documentation, mutation and decoding."""

from __future__ import annotations

from sevlab.core.layout import Layout
from sevlab.plugins.sev import Command, Family, MailboxCommand, Status
from sevlab.plugins.snp import buffers as b
from sevlab.plugins.snp.automata import SNP_PLATFORM
from sevlab.plugins.snp.handlers import guest, launch, pages, platform, request, swap, updates
from sevlab.plugins.snp.states import snp_state

SNP = Family("sev", SNP_PLATFORM, lambda machine: snp_state(machine).platform.state)
"""SNP's commands on the SEV mailbox, by the SNP platform's automaton."""

_HANDLERS = (
    (Command.SNP_INIT, platform.snp_init, None),
    (Command.SNP_SHUTDOWN, platform.snp_shutdown, None),
    (Command.SNP_PLATFORM_STATUS, platform.snp_platform_status, b.OnePage),
    (Command.SNP_DF_FLUSH, platform.snp_df_flush, None),
    (Command.SNP_INIT_EX, platform.snp_init_ex, b.SnpInitEx),
    (Command.SNP_SHUTDOWN_EX, platform.snp_shutdown_ex, b.SnpShutdownEx),
    (Command.SNP_CONFIG, platform.snp_config, b.SnpConfig),
    (Command.SNP_DOWNLOAD_FIRMWARE_EX, updates.snp_download_firmware_ex, b.SnpDownloadFirmwareEx),
    (Command.SNP_COMMIT, updates.snp_commit, b.SnpCommit),
    (Command.SNP_VLEK_LOAD, platform.snp_vlek_load, b.SnpVlekLoad),
    (Command.SNP_FEATURE_INFO, platform.snp_feature_info, b.SnpFeatureInfo),
    (Command.SNP_GCTX_CREATE, guest.gctx_create, b.OnePage),
    (Command.SNP_DECOMMISSION, guest.decommission, b.OnePage),
    (Command.SNP_ACTIVATE, guest.activate, b.SnpActivate),
    (Command.SNP_ACTIVATE_EX, guest.activate_ex, b.SnpActivateEx),
    (Command.SNP_GUEST_STATUS, guest.guest_status, b.SnpGuestStatusCommand),
    (Command.SNP_GUEST_REQUEST, request.guest_request, b.SnpGuestRequest),
    (Command.SNP_HV_REPORT_REQ, request.hv_report_request, b.SnpHvReportRequest),
    (Command.SNP_LAUNCH_START, launch.launch_start, b.SnpLaunchStart),
    (Command.SNP_LAUNCH_UPDATE, launch.launch_update, b.SnpLaunchUpdate),
    (Command.SNP_LAUNCH_FINISH, launch.launch_finish, b.SnpLaunchFinish),
    (Command.SNP_DBG_DECRYPT, pages.dbg_decrypt, b.SnpDebug),
    (Command.SNP_DBG_ENCRYPT, pages.dbg_encrypt, b.SnpDebug),
    (Command.SNP_VERIFY_MITIGATION, updates.snp_verify_mitigation, b.SnpVerifyMitigation),
    (Command.SNP_PAGE_SWAP_OUT, swap.swap_out, b.SnpPageSwapOut),
    (Command.SNP_PAGE_SWAP_IN, swap.swap_in, b.SnpPageSwapIn),
    (Command.SNP_PAGE_MOVE, pages.page_move, b.SnpPageMove),
    (Command.SNP_PAGE_MD_INIT, pages.md_init, b.SnpMdInit),
    (Command.SNP_PAGE_SET_STATE, platform.snp_page_set_state, b.SnpPageSetState),
    (Command.SNP_PAGE_RECLAIM, pages.page_reclaim, b.SnpPageReclaim),
    (Command.SNP_PAGE_UNSMASH, pages.page_unsmash, b.SnpPageUnsmash),
)

SNP_COMMANDS = tuple(
    MailboxCommand(command=command, handler=handler, buffer=buffer, reserved=Status.INVALID_PARAM)
    for command, handler, buffer in _HANDLERS
)
"""All of them look at reserved bits after the platform's state, and none answers in its own buffer."""

COMMAND_LAYOUTS: tuple[type[Layout], ...] = (
    *dict.fromkeys(declared.buffer for declared in SNP_COMMANDS if declared.buffer is not None),
    b.SnpPlatformStatus,
    b.RangeListHeader,
    b.RangeListEntry,
    b.WrappedVlek,
    b.FeatureInfoOutput,
    b.MitigationResult,
    b.SnpGuestStatus,
    b.MetadataEntry,
)
"""The structures of the interface."""
