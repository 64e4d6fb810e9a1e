"""Guest management: ACTIVATE, ACTIVATE_EX, DEACTIVATE, DECOMMISSION, GUEST_STATUS, COPY."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.units import PAGE_BYTES, is_aligned
from sevlab.plugins.sev import asids, transfers
from sevlab.plugins.sev.buffers import Activate, ActivateEx, Copy, GuestStatus, HandleOnly
from sevlab.plugins.sev.command import Request
from sevlab.plugins.sev.context import Gctx, sev_state
from sevlab.plugins.sev.crypto import LABEL_MEMORY_KEY, kdf
from sevlab.plugins.sev.handlers.common import allowed, live_guest
from sevlab.plugins.sev.numbers import Command, Status
from sevlab.plugins.sev.states import GuestState, PlatformState
from sevlab.plugins.sme import install_key, sme_state

if TYPE_CHECKING:
    from sevlab.core.machine import Machine


def activate(machine: Machine, request: Request[Activate]) -> Status:
    """Give the guest an ASID on every core complex, and its key to the memory controllers.

    Source: 55766, ACTIVATE; AMD-ASPFW sev_uapp/src/sev_mcmd.c, mcmd_activate_common (order of checks).
    """
    sev = sev_state(machine)
    guest, asid = live_guest(machine, request.buffer.handle), request.buffer.asid
    if guest is None:
        return Status.INVALID_GUEST
    if not 1 <= asid <= sev.max_asid:
        return Status.INVALID_ASID
    if asids.owned(sev, asid):
        return Status.ASID_OWNED
    if guest.asid:
        return Status.ACTIVE
    return _activate(machine, guest, asid, asids.all_ccxs(sev), request.command)


def activate_ex(machine: Machine, request: Request[ActivateEx]) -> Status:
    """As ACTIVATE, on the core complexes of the given APIC ids only; may be repeated for more of them.

    Source: AMD-ASPFW sev_uapp/src/sev_mcmd.c, mcmd_activate_ex_common (order of checks).
    """
    sev = sev_state(machine)
    buffer = request.buffer
    if buffer.length != ActivateEx.SIZE:
        return Status.INVALID_PARAM
    guest = live_guest(machine, buffer.handle)
    if guest is None:
        return Status.INVALID_GUEST
    if not 1 <= buffer.asid <= sev.max_asid:
        return Status.INVALID_ASID
    ccxs = asids.ccxs_of(machine, buffer.ids_spa, buffer.id_count)
    if isinstance(ccxs, Status):
        return ccxs
    return _activate(machine, guest, buffer.asid, ccxs, request.command)


def _activate(machine: Machine, guest: Gctx, asid: int, ccxs: int, command: Command) -> Status:
    sev = sev_state(machine)
    if not allowed(guest, command):
        return Status.INVALID_GUEST_STATE
    if not guest.asid:
        if asids.dirty(sev, asid, asids.all_ccxs(sev)):
            return Status.DF_FLUSH_REQUIRED
        if asids.owned(sev, asid):
            return Status.ASID_OWNED
    elif asid != guest.asid:
        return Status.ACTIVE
    if not asids.in_range(sev, asid, es=guest.es):
        return Status.INVALID_ASID
    if not guest.asid:
        load_key(machine, guest, asid)
    guest.asid = asid
    guest.ccxs |= ccxs
    guest.running_on_ccxs = guest.state in (GuestState.RUNNING, GuestState.SUPDATE)
    asids.allocate(sev, asid, guest.ccxs, running=guest.running_on_ccxs)
    return Status.SUCCESS


def load_key(machine: Machine, guest: Gctx, asid: int) -> None:
    """Put the guest's key into the slot of `asid`; a guest that comes back finds its memory as it left it.

    The parts have a key for each memory channel, by its number as KDF context; the model has one channel.
    Source: AMD-ASPFW sev_uapp/src, set_umc_key.
    """
    if guest.key_id:
        sme_state(machine).keys[asid] = guest.key_id
        return
    length_bytes = machine.memory.key_bits // 4
    xts_key = kdf(guest.vek_seed, LABEL_MEMORY_KEY, bytes(4), length_bytes)
    guest.key_id = install_key(machine, asid, xts_key, f"SEV guest {guest.handle}").key_id


def deactivate(machine: Machine, request: Request[HandleOnly]) -> Status:
    """Take the ASID from the guest; the key stays in the controllers until somebody else's replaces it.

    Source: 55766, DEACTIVATE; AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_deactivate.
    """
    guest = live_guest(machine, request.buffer.handle)
    if guest is None:
        return Status.INVALID_GUEST
    if not guest.asid:
        return Status.INACTIVE
    asids.release(sev_state(machine), guest.asid, guest.ccxs)
    guest.asid = guest.ccxs = 0
    guest.running_on_ccxs = False
    return Status.SUCCESS


def decommission(machine: Machine, request: Request[HandleOnly]) -> Status:
    """Delete the guest's context; after the last one the platform is back in INIT.

    Source: 55766, DECOMMISSION; AMD-ASPFW sev_uapp/src/sev_mcmd.c, mcmd_decommission_common.
    """
    sev = sev_state(machine)
    guest = live_guest(machine, request.buffer.handle)
    if guest is None:
        return Status.INVALID_GUEST
    if guest.asid:
        return Status.ACTIVE
    for slot in guest.vmsa_slots:
        del sev.tmr.checksums[slot]
    del sev.guests[guest.handle]
    if not sev.guests:
        sev.state = PlatformState.INIT
    return Status.SUCCESS


def guest_status(machine: Machine, request: Request[GuestStatus]) -> Status:
    """Policy, ASID and state of a guest; for a handle without one SUCCESS and state 0.

    Source: 55766, GUEST_STATUS; AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_guest_status.
    """
    guest = live_guest(machine, request.buffer.handle)
    if guest is None:
        request.answer(state=GuestState.UNINIT)
    else:
        request.answer(policy=guest.policy, asid=guest.asid, state=guest.state)
    return Status.SUCCESS


def copy(machine: Machine, request: Request[Copy]) -> Status:
    """Move guest pages: decrypted at the source, encrypted at the destination, where the tweak is another.

    When the first pages of source and destination overlap nothing is done, and that is a success. Source: 55766,
    COPY; AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_copy.
    """
    buffer = request.buffer
    guest = live_guest(machine, buffer.handle)
    if guest is None:
        return Status.INVALID_GUEST
    if not guest.asid:
        return Status.INACTIVE
    if not buffer.length or not is_aligned(buffer.length, PAGE_BYTES):
        return Status.INVALID_LENGTH
    if not is_aligned(buffer.source_spa | buffer.destination_spa, PAGE_BYTES):
        return Status.INVALID_ADDRESS
    status = transfers.output_status(machine, buffer.destination_spa, buffer.length)
    if status:
        return status
    if transfers.overlap(buffer.source_spa, PAGE_BYTES, buffer.destination_spa, PAGE_BYTES):
        return Status.SUCCESS
    if not transfers.valid_range(machine, buffer.destination_spa, buffer.length):
        return Status.INVALID_ADDRESS
    data = transfers.read_guest(machine, guest, buffer.source_spa, buffer.length)
    if data is None:
        return Status.INVALID_ADDRESS
    transfers.write_guest(machine, guest, buffer.destination_spa, data)
    return Status.SUCCESS
