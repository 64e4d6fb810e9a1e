"""ASIDs on core complexes: clean, allocated, in use, dirty. Legacy and SNP commands share this one state.

dirty -> (WBINVD on every core, then DF_FLUSH) clean -> (ACTIVATE) allocated -> (the guest runs) in use -> (DEACTIVATE)
dirty; allocated -> (DEACTIVATE) clean. Source: AMD-ASPFW sev_uapp/src/{sev_mcmd,sev_guest}.c; 55766, ACTIVATE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.plugins.sev import transfers
from sevlab.plugins.sev.context import Ccx, Gctx, SevState, sev_state
from sevlab.plugins.sev.numbers import Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sevlab.core.machine import Machine

APIC_IDS_MAX = 1024
"""Source: AMD-ASPFW sev_uapp/src/apicid.h, APIC_ID_LIST_MAX_CNT."""


def all_ccxs(sev: SevState) -> int:
    """Mask of every core complex."""
    return (1 << len(sev.ccxs)) - 1


def chosen(sev: SevState, mask: int) -> Iterator[Ccx]:
    """The core complexes of a mask."""
    return (ccx for number, ccx in sev.ccxs.items() if mask >> number & 1)


def ccxs_of(machine: Machine, ids_spa: int, id_count: int) -> int | Status:
    """Mask of the core complexes that a list of APIC ids names, or what is wrong with the list."""
    sev = sev_state(machine)
    if not 1 <= id_count <= APIC_IDS_MAX:
        return Status.INVALID_PARAM
    ids = transfers.read(machine, ids_spa, 4 * id_count)
    if ids is None:
        return Status.INVALID_ADDRESS
    ccxs = 0
    for start in range(0, len(ids), 4):
        number = int.from_bytes(ids[start : start + 4], "little") // sev.cores_per_ccx
        if number not in sev.ccxs:
            return Status.INVALID_CONFIG
        ccxs |= 1 << number
    return ccxs


def make_all_dirty(sev: SevState) -> None:
    """What initialisation does: every ASID dirty everywhere, and no core has done WBINVD."""
    for ccx in sev.ccxs.values():
        ccx.dirty = ((1 << sev.max_asid) - 1) << 1
        ccx.allocated = ccx.in_use = ccx.wbinvd_done = 0


def wbinvd(sev: SevState, core: int | None = None) -> None:
    """A core has executed WBINVD; None: every core has."""
    for number, ccx in sev.ccxs.items():
        first = number * sev.cores_per_ccx
        if core is None:
            ccx.wbinvd_done = (1 << sev.cores_per_ccx) - 1
        elif first <= core < first + sev.cores_per_ccx:
            ccx.wbinvd_done |= 1 << (core - first)


def flush(sev: SevState) -> Status:
    """DF_FLUSH: dirty ASIDs become clean where every core has done WBINVD; WBINVD_REQUIRED if one has not.

    The core complexes that are done become clean even then.
    """
    everywhere = True
    for ccx in sev.ccxs.values():
        if ccx.wbinvd_done == (1 << sev.cores_per_ccx) - 1:
            ccx.dirty = 0
        else:
            everywhere = False
    return Status.SUCCESS if everywhere else Status.WBINVD_REQUIRED


def owned(sev: SevState, asid: int) -> bool:
    """Whether a guest has this ASID somewhere."""
    return any((ccx.allocated | ccx.in_use) >> asid & 1 for ccx in sev.ccxs.values())


def runs(sev: SevState, asid: int) -> bool:
    """Whether a guest with this ASID may run on some core complex."""
    for ccx in sev.ccxs.values():  # noqa: SIM110  # before every VMRUN: a generator costs twice as much
        if ccx.in_use >> asid & 1:
            return True
    return False


def dirty(sev: SevState, asid: int, ccxs: int) -> bool:
    """Whether the ASID must be flushed on one of `ccxs`."""
    return any(ccx.dirty >> asid & 1 for ccx in chosen(sev, ccxs))


def in_range(sev: SevState, asid: int, *, es: bool) -> bool:
    """Whether the ASID is one for this kind of guest: below the minimum for SEV-ES and SNP, else from it on."""
    return 1 <= asid < sev.min_asid if es else sev.min_asid <= asid <= sev.max_asid


def allocate(sev: SevState, asid: int, ccxs: int, *, running: bool) -> None:
    """Give a clean ASID to a guest on `ccxs`: in use when it runs already, else allocated until it does."""
    bit = 1 << asid
    for ccx in chosen(sev, ccxs):
        if running:
            ccx.in_use |= bit
            ccx.allocated &= ~bit
        elif not ccx.in_use & bit:
            ccx.allocated |= bit


def release(sev: SevState, asid: int, ccxs: int) -> None:
    """Take the ASID from its guest: clean where it never ran, dirty where it did; those cores need WBINVD again."""
    bit = 1 << asid
    for ccx in chosen(sev, ccxs):
        ccx.allocated &= ~bit
        if ccx.in_use & bit:
            ccx.in_use &= ~bit
            ccx.dirty |= bit
            ccx.wbinvd_done = 0


def guest_runs(sev: SevState, guest: Gctx) -> None:
    """The guest becomes RUNNING: a pending activation takes effect."""
    if guest.asid and not guest.running_on_ccxs:
        allocate(sev, guest.asid, guest.ccxs, running=True)
        guest.running_on_ccxs = True
