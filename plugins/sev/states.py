"""The platform's and a guest's automaton, as tables.

A pair that the table does not hold is answered with the table's rejection and changes nothing. The tables hold what
the state allows; other checks (an ASID that is not clean, a policy) are in the handlers.

Source: 55766, platform and guest state machines; AMD-ASPFW sev_uapp/src/{sev_plat,sev_guest,sev_mcmd}.c.
"""

from __future__ import annotations

from enum import IntEnum

from sevlab.core.statemachine import StateMachine
from sevlab.plugins.sev.numbers import Command, Status


class PlatformState(IntEnum):
    """State of the platform. Source: 55766, PLATFORM_STATUS."""

    UNINIT = 0
    INIT = 1
    WORKING = 2


class GuestState(IntEnum):
    """State of a guest. Source: 55766, GUEST_STATUS; sev-tool src/sevapi.h."""

    UNINIT = 0
    LUPDATE = 1
    LSECRET = 2
    RUNNING = 3
    SUPDATE = 4
    RUPDATE = 5
    SENT = 6


ANYWHERE = (Command.SHUTDOWN, Command.PLATFORM_STATUS, Command.DF_FLUSH, Command.GET_ID, Command.NOP)
"""Commands without a look at the state, except where SHUTDOWN leads. That DF_FLUSH is one of them is what the
published firmware does; the specification's words are UNVERIFIED."""

_U, _I, _W = PlatformState.UNINIT, PlatformState.INIT, PlatformState.WORKING

PLATFORM = StateMachine(
    name="sev.platform",
    initial=_U,
    reject=Status.INVALID_PLATFORM_STATE,
    table={
        _U: dict.fromkeys((*ANYWHERE, Command.PLATFORM_RESET, Command.DOWNLOAD_FIRMWARE), _U)
        | dict.fromkeys((Command.INIT, Command.INIT_EX), _I),
        _I: dict.fromkeys(ANYWHERE, _I)
        | {Command.SHUTDOWN: _U}
        | dict.fromkeys(
            (
                Command.PEK_GEN,
                Command.PEK_CSR,
                Command.PEK_CERT_IMPORT,
                Command.PDH_CERT_EXPORT,
                Command.PDH_GEN,
                Command.RING_BUFFER,
                Command.GUEST_STATUS,
            ),
            _I,
        )
        | dict.fromkeys((Command.LAUNCH_START, Command.RECEIVE_START), _W),
        _W: dict.fromkeys(ANYWHERE, _W)
        | {Command.SHUTDOWN: _U}
        | dict.fromkeys(
            (
                Command.PEK_CSR,
                Command.PDH_CERT_EXPORT,
                Command.PDH_GEN,
                Command.RING_BUFFER,
                Command.DECOMMISSION,
                Command.ACTIVATE,
                Command.DEACTIVATE,
                Command.GUEST_STATUS,
                Command.COPY,
                Command.ACTIVATE_EX,
                Command.LAUNCH_START,
                Command.LAUNCH_UPDATE_DATA,
                Command.LAUNCH_UPDATE_VMSA,
                Command.LAUNCH_MEASURE,
                Command.LAUNCH_SECRET,
                Command.LAUNCH_FINISH,
                Command.ATTESTATION,
                Command.SEND_START,
                Command.SEND_UPDATE_DATA,
                Command.SEND_UPDATE_VMSA,
                Command.SEND_FINISH,
                Command.SEND_CANCEL,
                Command.RECEIVE_START,
                Command.RECEIVE_UPDATE_DATA,
                Command.RECEIVE_UPDATE_VMSA,
                Command.RECEIVE_FINISH,
                Command.DBG_DECRYPT,
                Command.DBG_ENCRYPT,
                Command.SWAP_OUT,
                Command.SWAP_IN,
            ),
            _W,
        ),
    },
)
"""DECOMMISSION of the last guest leads on to INIT: the guard is the number of guests, beside the table."""

LIVE = (
    GuestState.LUPDATE,
    GuestState.LSECRET,
    GuestState.RUNNING,
    GuestState.SUPDATE,
    GuestState.RUPDATE,
    GuestState.SENT,
)

_UNCHECKED = (
    Command.DEACTIVATE,
    Command.GUEST_STATUS,
    Command.COPY,
    Command.DBG_DECRYPT,
    Command.DBG_ENCRYPT,
    Command.SWAP_OUT,
    Command.SWAP_IN,
)
"""Commands for a live guest in any state; most of them need an active ASID."""

_MOVES = {
    GuestState.LUPDATE: {
        Command.LAUNCH_UPDATE_DATA: GuestState.LUPDATE,
        Command.LAUNCH_UPDATE_VMSA: GuestState.LUPDATE,
        Command.LAUNCH_MEASURE: GuestState.LSECRET,
    },
    GuestState.LSECRET: {
        Command.LAUNCH_SECRET: GuestState.LSECRET,
        Command.LAUNCH_FINISH: GuestState.RUNNING,
        Command.ATTESTATION: GuestState.LSECRET,
    },
    GuestState.RUNNING: {Command.ATTESTATION: GuestState.RUNNING, Command.SEND_START: GuestState.SUPDATE},
    GuestState.SUPDATE: {
        Command.ATTESTATION: GuestState.SUPDATE,
        Command.SEND_UPDATE_DATA: GuestState.SUPDATE,
        Command.SEND_UPDATE_VMSA: GuestState.SUPDATE,
        Command.SEND_FINISH: GuestState.SENT,
        Command.SEND_CANCEL: GuestState.RUNNING,
    },
    GuestState.RUPDATE: {
        Command.RECEIVE_UPDATE_DATA: GuestState.RUPDATE,
        Command.RECEIVE_UPDATE_VMSA: GuestState.RUPDATE,
        Command.RECEIVE_FINISH: GuestState.RUNNING,
    },
    GuestState.SENT: {Command.ATTESTATION: GuestState.SENT},
}


def _row(state: GuestState) -> dict[Command, GuestState]:
    row = dict.fromkeys(_UNCHECKED, state) | {Command.DECOMMISSION: GuestState.UNINIT} | _MOVES[state]
    if state is not GuestState.SENT:
        row |= dict.fromkeys((Command.ACTIVATE, Command.ACTIVATE_EX), state)
    return row


GUEST = StateMachine(
    name="sev.guest",
    initial=GuestState.UNINIT,
    reject=Status.INVALID_GUEST_STATE,
    table={
        GuestState.UNINIT: {Command.LAUNCH_START: GuestState.LUPDATE, Command.RECEIVE_START: GuestState.RUPDATE},
    }
    | {state: _row(state) for state in LIVE},
)
"""A handle without a guest is UNINIT; commands for it answer INVALID_GUEST before anybody looks at the state."""
