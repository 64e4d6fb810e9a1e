"""The automata of the SNP platform and of an SNP guest, as tables.

Source: 56860, platform and guest states; AMD-ASPFW sev_uapp/src/sev_mcmd.c.
"""

from __future__ import annotations

from enum import IntEnum

from sevlab.core.statemachine import StateMachine
from sevlab.plugins.sev import Command, Status


class SnpPlatformState(IntEnum):
    """State of the platform. Source: 56860, SNP_PLATFORM_STATUS."""

    UNINIT = 0
    INIT = 1


class SnpGuestState(IntEnum):
    """State of a guest. Source: 56860, SNP_GUEST_STATUS."""

    INIT = 0
    LAUNCH = 1
    RUNNING = 2


_U, _I = SnpPlatformState.UNINIT, SnpPlatformState.INIT

ANYWHERE = (
    Command.SNP_SHUTDOWN,
    Command.SNP_SHUTDOWN_EX,
    Command.SNP_PLATFORM_STATUS,
    Command.SNP_DF_FLUSH,
    Command.SNP_CONFIG,
    Command.SNP_DOWNLOAD_FIRMWARE_EX,
    Command.SNP_COMMIT,
    Command.SNP_FEATURE_INFO,
)
"""Commands that look at no platform state. SNP_COMMIT and SNP_DOWNLOAD_FIRMWARE_EX among them is UNVERIFIED."""

GUEST_COMMANDS = (
    Command.SNP_DECOMMISSION,
    Command.SNP_ACTIVATE,
    Command.SNP_GUEST_STATUS,
    Command.SNP_GCTX_CREATE,
    Command.SNP_GUEST_REQUEST,
    Command.SNP_ACTIVATE_EX,
    Command.SNP_HV_REPORT_REQ,
    Command.SNP_LAUNCH_START,
    Command.SNP_LAUNCH_UPDATE,
    Command.SNP_LAUNCH_FINISH,
    Command.SNP_DBG_DECRYPT,
    Command.SNP_DBG_ENCRYPT,
    Command.SNP_PAGE_SWAP_OUT,
    Command.SNP_PAGE_SWAP_IN,
    Command.SNP_PAGE_MOVE,
    Command.SNP_PAGE_MD_INIT,
    Command.SNP_PAGE_SET_STATE,
    Command.SNP_PAGE_RECLAIM,
    Command.SNP_PAGE_UNSMASH,
    Command.SNP_VLEK_LOAD,
    Command.SNP_VERIFY_MITIGATION,
)
"""Commands of an initialised platform; SNP_VERIFY_MITIGATION among them is UNVERIFIED."""

SNP_PLATFORM = StateMachine(
    name="snp.platform",
    initial=_U,
    reject=Status.INVALID_PLATFORM_STATE,
    table={
        _U: dict.fromkeys(ANYWHERE, _U) | dict.fromkeys((Command.SNP_INIT, Command.SNP_INIT_EX), _I),
        _I: dict.fromkeys(ANYWHERE, _I)
        | dict.fromkeys((Command.SNP_SHUTDOWN, Command.SNP_SHUTDOWN_EX), _U)
        | dict.fromkeys(GUEST_COMMANDS, _I),
    },
)

_STAY = (
    Command.SNP_ACTIVATE,
    Command.SNP_ACTIVATE_EX,
    Command.SNP_PAGE_SWAP_OUT,
    Command.SNP_PAGE_SWAP_IN,
    Command.SNP_PAGE_MOVE,
    Command.SNP_PAGE_MD_INIT,
)
_ANY = (Command.SNP_GUEST_STATUS, Command.SNP_DBG_DECRYPT, Command.SNP_DBG_ENCRYPT)
_INIT, _LAUNCH, _RUNNING = SnpGuestState

SNP_GUEST = StateMachine(
    name="snp.guest",
    initial=_INIT,
    reject=Status.INVALID_GUEST_STATE,
    table={
        _INIT: dict.fromkeys(_ANY, _INIT) | {Command.SNP_LAUNCH_START: _LAUNCH},
        _LAUNCH: dict.fromkeys(_ANY + _STAY, _LAUNCH)
        | {Command.SNP_LAUNCH_UPDATE: _LAUNCH, Command.SNP_LAUNCH_FINISH: _RUNNING},
        _RUNNING: dict.fromkeys(_ANY + _STAY, _RUNNING)
        | dict.fromkeys((Command.SNP_GUEST_REQUEST, Command.SNP_HV_REPORT_REQ), _RUNNING),
    },
)
"""A context page that SNP_DECOMMISSION takes is gone whatever its state. The guest messages IMPORT (INIT to RUNNING)
and ABSORB (LAUNCH to RUNNING) move the state too; they are no commands of the mailbox."""
