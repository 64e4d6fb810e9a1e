"""Page commands: debug, move, reclaim, unsmash, metadata pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES, is_aligned
from sevlab.plugins.sev import Request, Status, transfers
from sevlab.plugins.snp.buffers import (
    SnpDebug,
    SnpMdInit,
    SnpPageMove,
    SnpPageReclaim,
    SnpPageUnsmash,
)
from sevlab.plugins.snp.context import SnpGuest
from sevlab.plugins.snp.handlers.common import (
    find_guest,
    guest_allows,
    page_bytes,
    page_entry,
    plain,
    range_status,
    read_page,
    write_page,
)
from sevlab.plugins.snp.layout import ASID, ASSIGNED, GPA, IMMUTABLE, PAGE_SIZE, SUBPAGE_COUNT, VMSA
from sevlab.plugins.snp.policy import policy_of
from sevlab.plugins.snp.rmp import (
    PAGES_PER_2M,
    Entry,
    change_state,
    fill_region,
    overlaps_rmp,
    read_entry,
    write_entry,
)
from sevlab.plugins.snp.states import GUEST_STATES, PageEvent, PageState

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

DEBUG_TARGETS = (PageState.PRE_GUEST, PageState.PRE_SWAP)


def same_context(guest: SnpGuest, entry: Entry) -> bool:
    """Whether a Metadata page belongs to this guest. Source: AMD-ASPFW sev_uapp/src/sev_rmp.c."""
    return entry.gpa == guest.gctx_spa


# Debugging ------------------------------------------------------------------------------------------------------------


def dbg_decrypt(machine: Machine, request: Request[SnpDebug]) -> Status:
    """Decrypt one 4 KiB page of a guest whose policy allows debugging into a Firmware page.

    Order: page states, owner, policy, activation. Source: 56860, SNP_DBG_DECRYPT; AMD-ASPFW sev_uapp/src/sev_mcmd.c.
    """
    buffer = request.buffer
    guest = _debug_guest(machine, buffer)
    if isinstance(guest, Status):
        return guest
    source, destination = page_entry(machine, buffer.source_spa), page_entry(machine, buffer.destination_spa)
    if source is None or source.state not in GUEST_STATES:
        return Status.INVALID_PAGE_STATE
    if destination is None or destination.state is not PageState.FIRMWARE:
        return Status.INVALID_PAGE_STATE
    status = _debug_status(guest, source)
    if status:
        return status
    transfers.write(machine, buffer.destination_spa, read_page(machine, guest, plain(machine, buffer.source_spa)))
    return Status.SUCCESS


def dbg_encrypt(machine: Machine, request: Request[SnpDebug]) -> Status:
    """Encrypt one 4 KiB page into a Pre-Guest or Pre-Swap page of a guest whose policy allows debugging.

    The source's state is not looked at. Source: 56860, SNP_DBG_ENCRYPT; AMD-ASPFW sev_uapp/src/sev_mcmd.c.
    """
    buffer = request.buffer
    guest = _debug_guest(machine, buffer)
    if isinstance(guest, Status):
        return guest
    destination = page_entry(machine, buffer.destination_spa)
    if destination is None or destination.state not in DEBUG_TARGETS:
        return Status.INVALID_PAGE_STATE
    status = _debug_status(guest, destination)
    if status:
        return status
    data = transfers.read(machine, buffer.source_spa, PAGE_BYTES)
    assert data is not None  # the range was checked
    write_page(machine, guest, plain(machine, buffer.destination_spa), data)
    return Status.SUCCESS


def _debug_guest(machine: Machine, buffer: SnpDebug) -> SnpGuest | Status:
    for spa in (buffer.source_spa, buffer.destination_spa):
        status = range_status(machine, spa, PAGE_BYTES)
        if status:
            return status
    return find_guest(machine, buffer.gctx_spa)


def _debug_status(guest: SnpGuest, page: Entry) -> Status:
    if not guest.asid or page.asid != guest.asid:
        return Status.INVALID_PAGE_OWNER if guest.asid else Status.INACTIVE
    return Status.SUCCESS if policy_of(guest.policy).debug else Status.POLICY_FAILURE


# Move, reclaim, unsmash, metadata -------------------------------------------------------------------------------------


def page_move(machine: Machine, request: Request[SnpPageMove]) -> Status:
    """Move a page of the guest, or a Metadata page, to another place: the tweak of its encryption changes.

    Order: context, page sizes, guest state, page states, owners, activation. Source: 56860, SNP_PAGE_MOVE;
    AMD-ASPFW sev_uapp/src/sev_mcmd.c.
    """
    buffer = request.buffer
    length_bytes = page_bytes(large=buffer.page_size)
    guest = find_guest(machine, buffer.gctx_spa)
    if isinstance(guest, Status):
        return guest
    for address in (buffer.source_spa, buffer.destination_spa):
        status = range_status(machine, address, length_bytes)
        if status:
            return status
    source, destination = page_entry(machine, buffer.source_spa), page_entry(machine, buffer.destination_spa)
    if source is None or destination is None:
        return Status.INVALID_PAGE_STATE
    if source.huge != bool(buffer.page_size) or destination.huge != bool(buffer.page_size):
        return Status.INVALID_PAGE_SIZE
    if not is_aligned(buffer.source_spa | buffer.destination_spa, length_bytes):
        return Status.INVALID_ADDRESS
    if not guest_allows(guest, request.command):
        return Status.INVALID_GUEST_STATE
    places = plain(machine, buffer.source_spa), plain(machine, buffer.destination_spa)
    if source.state is PageState.METADATA:
        return _move_metadata(machine, guest, places, source, destination)
    if source.state not in DEBUG_TARGETS or destination.state is not PageState.PRE_GUEST:
        return Status.INVALID_PAGE_STATE
    if not guest.asid:
        return Status.INACTIVE
    if source.asid != guest.asid or destination.asid != guest.asid:
        return Status.INVALID_PAGE_OWNER
    for offset in range(0, length_bytes, PAGE_BYTES):
        write_page(machine, guest, places[1] + offset, read_page(machine, guest, places[0] + offset))
    was_valid = source.state is PageState.PRE_SWAP
    change_state(machine, places[0], PageEvent.MOVE_SOURCE)
    change_state(
        machine,
        places[1],
        PageEvent.MOVE_VALID_DESTINATION if was_valid else PageEvent.MOVE_INVALID_DESTINATION,
    )
    _carry(machine, places[1], source)
    return Status.SUCCESS


def _move_metadata(
    machine: Machine, guest: SnpGuest, places: tuple[int, int], source: Entry, destination: Entry
) -> Status:
    if destination.state is not PageState.FIRMWARE:
        return Status.INVALID_PAGE_STATE
    if not same_context(guest, source):
        return Status.INVALID_PAGE_OWNER
    transfers.write(machine, places[1], machine.memory.read(places[0], PAGE_BYTES, None))
    change_state(machine, places[0], PageEvent.MOVE_SOURCE)
    change_state(machine, places[1], PageEvent.MOVE_METADATA_DESTINATION, context_spa=guest.gctx_spa)
    return Status.SUCCESS


def _carry(machine: Machine, spa: int, source: Entry) -> None:
    """A moved page keeps its address, what VMPLs may do with it, and whether it is a VMSA."""
    entry = read_entry(machine, spa)
    assert entry is not None
    kept = GPA | VMSA
    write_entry(machine, spa, entry.low & ~kept | source.low & kept, source.high)


def page_reclaim(machine: Machine, request: Request[SnpPageReclaim]) -> Status:
    """Give a page back to where the hypervisor can take it with RMPUPDATE.

    Order: address, size, alignment; a page that is mutable already is a success. Source: 56860, SNP_PAGE_RECLAIM;
    AMD-ASPFW sev_uapp/src/sev_mcmd.c.
    """
    buffer = request.buffer
    address = buffer.page * PAGE_BYTES
    length_bytes = page_bytes(large=buffer.page_size)
    status = range_status(machine, address, length_bytes)
    if status:
        return status
    entry = page_entry(machine, address)
    if entry is None:
        return Status.INVALID_PAGE_STATE
    if entry.low & ASSIGNED and entry.huge != bool(buffer.page_size):
        return Status.INVALID_PAGE_SIZE
    if not is_aligned(plain(machine, address), length_bytes):
        return Status.INVALID_ADDRESS
    if not entry.low & IMMUTABLE:
        return Status.SUCCESS
    if not change_state(machine, plain(machine, address), PageEvent.RECLAIM):
        return Status.INVALID_PAGE_STATE
    return Status.SUCCESS


def page_unsmash(machine: Machine, request: Request[SnpPageUnsmash]) -> Status:
    """Make 512 immutable pages of one guest, in the same state and in a row, one page of 2 MiB.

    Source: 56860, SNP_PAGE_UNSMASH; AMD-ASPFW sev_uapp/src/sev_mcmd.c.
    """
    spa = plain(machine, request.buffer.page_spa)
    if not transfers.valid_range(machine, spa, PAGE_2M_BYTES) or overlaps_rmp(machine, spa, PAGE_2M_BYTES):
        return Status.INVALID_ADDRESS
    first = read_entry(machine, spa)
    if first is None or first.huge or first.state not in DEBUG_TARGETS or not is_aligned(first.gpa, PAGE_2M_BYTES):
        return Status.INVALID_PAGE_STATE
    if first.low & VMSA or not first.low & ASID:
        return Status.INVALID_PAGE_STATE
    low = first.low & ~SUBPAGE_COUNT
    for number in range(1, PAGES_PER_2M):
        entry = read_entry(machine, spa + number * PAGE_BYTES)
        if entry is None or entry != (low + number * PAGE_BYTES, first.high):
            return Status.INVALID_PAGE_STATE
    fill_region(machine, spa, low | PAGE_SIZE, first.high)
    return Status.SUCCESS


def md_init(machine: Machine, request: Request[SnpMdInit]) -> Status:
    """Make a Firmware page a Metadata page of the guest, all zero. Source: 56860, SNP_PAGE_MD_INIT; AMD-ASPFW."""
    buffer = request.buffer
    guest = find_guest(machine, buffer.gctx_spa)
    if isinstance(guest, Status):
        return guest
    status = range_status(machine, buffer.page_spa, PAGE_BYTES)
    if status:
        return status
    if not guest_allows(guest, request.command):
        return Status.INVALID_GUEST_STATE
    entry = page_entry(machine, buffer.page_spa)
    if entry is None or entry.state is not PageState.FIRMWARE:
        return Status.INVALID_PAGE_STATE
    if entry.huge:
        return Status.INVALID_PAGE_SIZE
    spa = plain(machine, buffer.page_spa)
    transfers.write(machine, spa, bytes(PAGE_BYTES))
    change_state(machine, spa, PageEvent.MD_INIT, context_spa=guest.gctx_spa)
    return Status.SUCCESS
