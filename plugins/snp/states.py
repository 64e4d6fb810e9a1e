"""States of pages, of the SNP platform, of SNP guests and vCPUs; the transitions of pages as a table."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, cast

from sevlab.core.state import StateDict, Stateful, new
from sevlab.core.statemachine import StateMachine
from sevlab.plugins.snp.context import SnpPlatform
from sevlab.plugins.snp.layout import ASID, ASSIGNED, GPA, IMMUTABLE, VALIDATED, VMSA

if TYPE_CHECKING:
    from sevlab.core.machine import Machine


class PageState(IntEnum):
    """What a page is to the ASP. Source: 56860, page states; AMD-ASPFW sev_rmp.c."""

    HYPERVISOR = 0
    HV_FIXED = 1
    RECLAIM = 2
    FIRMWARE = 3
    CONTEXT = 4
    METADATA = 5
    PRE_GUEST = 6
    PRE_SWAP = 7
    GUEST_INVALID = 8
    GUEST_VALID = 9
    DEFAULT = 10
    """No entry of the RMP covers the page: it is treated as the hypervisor's, and nobody can be given it."""


def page_state(low_word: int) -> PageState:
    """The state that an entry's low word means. Source: 56860, page states; AMDESE/sev-tool src/rmp.h."""
    immutable = low_word & IMMUTABLE
    if not low_word & ASSIGNED:
        return PageState.HV_FIXED if immutable else PageState.HYPERVISOR
    if low_word & ASID:
        if immutable:
            return PageState.PRE_SWAP if low_word & VALIDATED else PageState.PRE_GUEST
        return PageState.GUEST_VALID if low_word & VALIDATED else PageState.GUEST_INVALID
    if not immutable:
        return PageState.RECLAIM
    if low_word & GPA:
        return PageState.METADATA
    return PageState.CONTEXT if low_word & VMSA else PageState.FIRMWARE


class PageEvent(IntEnum):
    """What can change a page's state; RMPUPDATE by what it asks for, a command by what the page is to it."""

    RMPUPDATE_HYPERVISOR = 0
    RMPUPDATE_RECLAIM = 1
    RMPUPDATE_FIRMWARE = 2
    RMPUPDATE_GUEST = 3
    RMPUPDATE_PRE_GUEST = 4
    PVALIDATE = 5
    PVALIDATE_RESCIND = 6
    RMPADJUST = 7
    PSMASH = 8
    GCTX_CREATE = 9
    DECOMMISSION = 10
    MD_INIT = 11
    LAUNCH_UPDATE = 12
    SWAP_OUT_SOURCE = 13
    SWAP_OUT_METADATA_SOURCE = 14
    SWAP_IN_DESTINATION = 15
    SWAP_IN_VALIDATED_DESTINATION = 16
    SWAP_IN_METADATA_DESTINATION = 17
    MOVE_INVALID_DESTINATION = 18
    MOVE_VALID_DESTINATION = 19
    MOVE_METADATA_DESTINATION = 20
    MOVE_SOURCE = 21
    RECLAIM = 22
    UNSMASH = 23
    SET_STATE = 24
    COMMAND_DONE = 25
    """A command that answers in its own buffer is done with the buffer's page."""


class PageRefused(IntEnum):
    """The answer to an event that the page's state does not admit; instructions and commands have their own codes."""

    REFUSED = 0


_S = PageState
_E = PageEvent
_UPDATES = {
    _E.RMPUPDATE_HYPERVISOR: _S.HYPERVISOR,
    _E.RMPUPDATE_RECLAIM: _S.RECLAIM,
    _E.RMPUPDATE_FIRMWARE: _S.FIRMWARE,
    _E.RMPUPDATE_GUEST: _S.GUEST_INVALID,
    _E.RMPUPDATE_PRE_GUEST: _S.PRE_GUEST,
}

PAGE_STATES = StateMachine(
    name="snp.page",
    initial=PageState.HYPERVISOR,
    reject=PageRefused.REFUSED,
    messages=tuple(PageEvent),
    table={
        _S.HYPERVISOR: {**_UPDATES, _E.RECLAIM: _S.HYPERVISOR},
        _S.HV_FIXED: {},
        _S.RECLAIM: {**_UPDATES, _E.RECLAIM: _S.RECLAIM},
        _S.FIRMWARE: {
            _E.GCTX_CREATE: _S.CONTEXT,
            _E.MD_INIT: _S.METADATA,
            _E.SWAP_IN_METADATA_DESTINATION: _S.METADATA,
            _E.MOVE_METADATA_DESTINATION: _S.METADATA,
            _E.RECLAIM: _S.RECLAIM,
            _E.SET_STATE: _S.HV_FIXED,
            _E.COMMAND_DONE: _S.RECLAIM,
        },
        _S.CONTEXT: {_E.DECOMMISSION: _S.FIRMWARE},
        _S.METADATA: {
            _E.SWAP_OUT_METADATA_SOURCE: _S.FIRMWARE,
            _E.MOVE_SOURCE: _S.FIRMWARE,
            _E.RECLAIM: _S.RECLAIM,
        },
        _S.PRE_GUEST: {
            _E.LAUNCH_UPDATE: _S.GUEST_VALID,
            _E.SWAP_OUT_SOURCE: _S.PRE_GUEST,
            _E.SWAP_IN_DESTINATION: _S.PRE_GUEST,
            _E.SWAP_IN_VALIDATED_DESTINATION: _S.PRE_SWAP,
            _E.MOVE_INVALID_DESTINATION: _S.GUEST_INVALID,
            _E.MOVE_VALID_DESTINATION: _S.GUEST_VALID,
            _E.MOVE_SOURCE: _S.GUEST_INVALID,
            _E.RECLAIM: _S.GUEST_INVALID,
            _E.UNSMASH: _S.PRE_GUEST,
        },
        _S.PRE_SWAP: {
            _E.SWAP_OUT_SOURCE: _S.PRE_GUEST,
            _E.MOVE_SOURCE: _S.GUEST_INVALID,
            _E.RECLAIM: _S.GUEST_VALID,
            _E.UNSMASH: _S.PRE_SWAP,
        },
        _S.GUEST_INVALID: {
            **_UPDATES,
            _E.PVALIDATE: _S.GUEST_VALID,
            _E.PVALIDATE_RESCIND: _S.GUEST_INVALID,
            _E.PSMASH: _S.GUEST_INVALID,
            _E.RECLAIM: _S.GUEST_INVALID,
        },
        _S.GUEST_VALID: {
            **_UPDATES,
            _E.RMPUPDATE_GUEST: _S.GUEST_VALID,
            _E.RMPUPDATE_PRE_GUEST: _S.PRE_SWAP,
            _E.PVALIDATE: _S.GUEST_VALID,
            _E.PVALIDATE_RESCIND: _S.GUEST_INVALID,
            _E.RMPADJUST: _S.GUEST_VALID,
            _E.PSMASH: _S.GUEST_VALID,
            _E.RECLAIM: _S.GUEST_VALID,
        },
        _S.DEFAULT: {},
    },
)
"""Every change of a page's state. RMPUPDATE of a guest's page stands for one that keeps ASID, GPA and size; one that
changes them leads to GUEST_INVALID or PRE_GUEST, as from HYPERVISOR. That an update which only sets `immutable` keeps
`validated` (GUEST_VALID to PRE_SWAP) is UNVERIFIED.

Source: 56860, page states; AMD-ASPFW sev_rmp.c and sev_mcmd.c; 24593, 15.36.5.
"""

STATE_BITS = {
    _S.HYPERVISOR: 0,
    _S.HV_FIXED: IMMUTABLE,
    _S.RECLAIM: ASSIGNED,
    _S.FIRMWARE: ASSIGNED | IMMUTABLE,
    _S.CONTEXT: ASSIGNED | IMMUTABLE | VMSA,
    _S.METADATA: ASSIGNED | IMMUTABLE,
    _S.PRE_GUEST: ASSIGNED | IMMUTABLE,
    _S.PRE_SWAP: ASSIGNED | IMMUTABLE | VALIDATED,
    _S.GUEST_INVALID: ASSIGNED,
    _S.GUEST_VALID: ASSIGNED | VALIDATED,
}
"""The bits that make a state, besides the ASID of a guest's page and the GPA of a metadata page."""

GUEST_STATES = frozenset((_S.PRE_GUEST, _S.PRE_SWAP, _S.GUEST_INVALID, _S.GUEST_VALID))
"""The states of a guest's pages: ASID, GPA, VMSA and permissions stay when one becomes another."""


class SnpVcpu(Stateful):
    """A vCPU that runs with SEV_FEATURES.SNPActive, and the page of its VMSA."""

    sev_features: int = 1
    vmsa_spa: int = 0
    virtual_tom: int = 0
    """With vTOM: where shared memory begins."""
    event_waits: bool = False
    """With alternate injection: a virtual interrupt or NMI in the save area that the guest cannot take yet."""


HWCR_SMM_LOCK = 1 << 0
"""The platform's firmware sets it. Source: 24593, 15.32."""


class SnpState(Stateful):
    """The SNP side of the processor - the RMP's place, which vCPUs are SNP-active - and the firmware's context."""

    rmp_base: int = 0
    rmp_end: int = 0
    hwcr: int = HWCR_SMM_LOCK
    vm_hsave_pa: int = 0
    vcpus: StateDict[int, SnpVcpu] = new(StateDict)
    platform: SnpPlatform = new(SnpPlatform)


def snp_state(machine: Machine) -> SnpState:
    """The state of the plugin in `machine`."""
    return cast("SnpState", machine.components["snp"])
