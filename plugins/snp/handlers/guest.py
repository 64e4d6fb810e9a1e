"""Guest management: context pages, ASIDs, status."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.units import PAGE_BYTES
from sevlab.plugins.sev import Command, Request, Status, asids, sev_state, transfers
from sevlab.plugins.sme import install_key, sme_state
from sevlab.plugins.snp.automata import SnpGuestState
from sevlab.plugins.snp.buffers import (
    OnePage,
    SnpActivate,
    SnpActivateEx,
    SnpGuestStatus,
    SnpGuestStatusCommand,
)
from sevlab.plugins.snp.context import SnpGuest
from sevlab.plugins.snp.handlers.common import (
    find_guest,
    guest_allows,
    page_entry,
    plain,
    platform_of,
    range_status,
    writable_status,
)
from sevlab.plugins.snp.policy import policy_of
from sevlab.plugins.snp.rmp import asid_pages, change_state
from sevlab.plugins.snp.states import PageEvent, PageState

if TYPE_CHECKING:
    from sevlab.core.machine import Machine


def gctx_create(machine: Machine, request: Request[OnePage]) -> Status:
    """Make a Firmware page of 4 KiB the context of a new guest with a new memory key.

    Source: 56860, SNP_GCTX_CREATE; AMD-ASPFW sev_uapp/src/sev_mcmd.c.
    """
    address = request.buffer.page_spa
    status = range_status(machine, address, PAGE_BYTES)
    if status:
        return status
    entry = page_entry(machine, address)
    if entry is None or entry.state is not PageState.FIRMWARE:
        return Status.INVALID_PAGE_STATE
    if entry.huge:
        return Status.INVALID_PAGE_SIZE
    spa = plain(machine, address)
    change_state(machine, spa, PageEvent.GCTX_CREATE)
    vek = machine.entropy.take("snp.vek", machine.memory.key_bits // 4)
    platform_of(machine).guests[spa] = SnpGuest(gctx_spa=spa, vek=vek)
    return Status.SUCCESS


def decommission(machine: Machine, request: Request[OnePage]) -> Status:
    """Delete a guest's context, taking its ASID first; the page becomes Firmware.

    Source: 56860, SNP_DECOMMISSION; AMD-ASPFW sev_uapp/src/sev_mcmd.c.
    """
    guest = find_guest(machine, request.buffer.page_spa)
    if isinstance(guest, Status):
        return guest
    if guest.asid:
        asids.release(sev_state(machine), guest.asid, guest.ccxs)
    change_state(machine, guest.gctx_spa, PageEvent.DECOMMISSION)
    del platform_of(machine).guests[guest.gctx_spa]
    return Status.SUCCESS


def activate(machine: Machine, request: Request[SnpActivate]) -> Status:
    """Give the guest an ASID on every core complex, and its key to the memory controllers.

    Source: 56860, SNP_ACTIVATE; AMD-ASPFW sev_uapp/src/sev_mcmd.c, mcmd_activate_common.
    """
    guest = find_guest(machine, request.buffer.gctx_spa)
    if isinstance(guest, Status):
        return guest
    if guest.asid:
        return Status.ACTIVE
    ccxs = asids.all_ccxs(sev_state(machine))
    return _activate(machine, guest, request.buffer.asid, ccxs, request.command)


def activate_ex(machine: Machine, request: Request[SnpActivateEx]) -> Status:
    """As SNP_ACTIVATE, on the core complexes of the given APIC ids only; may be repeated for more of them.

    Source: 56860, SNP_ACTIVATE_EX; AMD-ASPFW sev_uapp/src/sev_mcmd.c, mcmd_activate_ex_common.
    """
    buffer = request.buffer
    if buffer.length != SnpActivateEx.SIZE:
        return Status.INVALID_PARAM
    guest = find_guest(machine, buffer.gctx_spa)
    if isinstance(guest, Status):
        return guest
    ccxs = asids.ccxs_of(machine, buffer.ids_spa, buffer.id_count)
    if isinstance(ccxs, Status):
        return ccxs
    if guest.asid and guest.asid != buffer.asid:
        return Status.ACTIVE
    return _activate(machine, guest, buffer.asid, ccxs, request.command)


def _activate(machine: Machine, guest: SnpGuest, asid: int, ccxs: int, command: Command) -> Status:
    sev, platform = sev_state(machine), platform_of(machine)
    if not guest_allows(guest, command):
        return Status.INVALID_GUEST_STATE
    if not asids.in_range(sev, asid, es=True) or (platform.max_snp_asid and asid > platform.max_snp_asid):
        return Status.INVALID_ASID
    if not guest.asid:
        if asids.owned(sev, asid):
            return Status.ASID_OWNED
        if asid_pages(machine, asid):
            return Status.INVALID_CONFIG
        if policy_of(guest.policy).single_socket and sev.second_chip_key:
            return Status.POLICY_FAILURE
        if asids.dirty(sev, asid, asids.all_ccxs(sev)):
            return Status.DF_FLUSH_REQUIRED
        _load_key(machine, guest, asid)
    guest.asid = asid
    guest.ccxs |= ccxs
    asids.allocate(sev, asid, guest.ccxs, running=guest.state is SnpGuestState.RUNNING)
    return Status.SUCCESS


def _load_key(machine: Machine, guest: SnpGuest, asid: int) -> None:
    """Put the guest's key into the slot of `asid`; a guest that comes back finds its memory as it left it."""
    if guest.key_id:
        sme_state(machine).keys[asid] = guest.key_id
    else:
        guest.key_id = install_key(machine, asid, guest.vek, f"SNP guest {guest.gctx_spa:#x}").key_id


def guest_status(machine: Machine, request: Request[SnpGuestStatusCommand]) -> Status:
    """Write policy, ASID and state of a guest to a page of the host's. Source: 56860, SNP_GUEST_STATUS."""
    guest = find_guest(machine, request.buffer.gctx_spa)
    if isinstance(guest, Status):
        return guest
    address = request.buffer.page_spa
    status = range_status(machine, address, PAGE_BYTES) or writable_status(machine, address)
    if status:
        return status
    answer = SnpGuestStatus.build(policy=guest.policy, asid=guest.asid, state=guest.state, vcek_dis=int(guest.vcek_dis))
    transfers.write(machine, address, answer)
    return Status.SUCCESS
