"""What most handlers do first: addresses, the guest behind a context page, the states of pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES
from sevlab.plugins.sev import Command, Status, sev_state, transfers
from sevlab.plugins.snp.automata import SNP_GUEST, SNP_PLATFORM
from sevlab.plugins.snp.context import SnpGuest, SnpPlatform
from sevlab.plugins.snp.rmp import Entry, overlaps_rmp, owning_entry, state_of
from sevlab.plugins.snp.states import PageState, snp_state

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

FIRMWARE_WRITES = (PageState.FIRMWARE, PageState.DEFAULT)
"""States in which the firmware writes to a page of the host's. Source: AMD-ASPFW sev_uapp/src/sev_rmp.c."""


def platform_of(machine: Machine) -> SnpPlatform:
    """The platform's context."""
    return snp_state(machine).platform


def move_platform(machine: Machine, command: Command) -> None:
    """The platform's transition of an accepted command."""
    platform = platform_of(machine)
    target = SNP_PLATFORM.next(platform.state, command)
    assert target is not None  # the dispatcher has asked
    platform.state = target


def plain(machine: Machine, address: int) -> int:
    """The address without the C-bit."""
    return transfers.guest_spa(machine, address)


def range_status(machine: Machine, address: int, length_bytes: int) -> Status:
    """Whether a command may name this memory: INVALID_ADDRESS outside DRAM, INVALID_PARAM inside the RMP.

    Source: AMD-ASPFW sev_uapp/src/x86_copy.c and sev_rmp.c.
    """
    if overlaps_rmp(machine, plain(machine, address), length_bytes):
        return Status.INVALID_PARAM
    return Status.SUCCESS if transfers.valid_range(machine, address, length_bytes) else Status.INVALID_ADDRESS


def page_bytes(*, large: int) -> int:
    """Length of a page of the size flag."""
    return PAGE_2M_BYTES if large else PAGE_BYTES


def writable_status(machine: Machine, address: int) -> Status:
    """Whether the firmware may write the page: FIRMWARE or DEFAULT, once the RMP is in use."""
    if not sev_state(machine).snp_initialised or state_of(machine, plain(machine, address)) in FIRMWARE_WRITES:
        return Status.SUCCESS
    return Status.INVALID_PAGE_STATE


def find_guest(machine: Machine, gctx_spa: int) -> SnpGuest | Status:
    """The guest of a context page, or why there is none."""
    status = range_status(machine, gctx_spa, PAGE_BYTES)
    if status:
        return status
    spa = plain(machine, gctx_spa)
    guest = platform_of(machine).guests.get(spa)
    if guest is None or state_of(machine, spa) is not PageState.CONTEXT:
        return Status.INVALID_GUEST
    return guest


def guest_allows(guest: SnpGuest, command: Command) -> bool:
    """Whether the guest's state allows the command; else INVALID_GUEST_STATE."""
    return SNP_GUEST.allows(guest.state, command)


def move_guest(guest: SnpGuest, command: Command) -> None:
    """The guest's transition of an accepted command."""
    target = SNP_GUEST.next(guest.state, command)
    assert target is not None  # the handler has asked `guest_allows`
    guest.state = target


def page_entry(machine: Machine, address: int) -> Entry | None:
    """The entry that rules the page; None: no entry (Default)."""
    found = owning_entry(machine, plain(machine, address))
    return None if found is None else found[1]


def read_page(machine: Machine, guest: SnpGuest, spa: int) -> bytes:
    """A page of the guest as the guest sees it; the caller has checked the range."""
    return machine.memory.read(spa, PAGE_BYTES, guest.key(machine))


def write_page(machine: Machine, guest: SnpGuest, spa: int, data: bytes) -> None:
    """Encrypt a page for the guest; the caller has checked the range."""
    machine.memory.write(spa, data, guest.key(machine), guest_tag(machine, guest))


def guest_tag(machine: Machine, guest: SnpGuest) -> int:
    """Whose data the guest's memory is: the VM that runs under its ASID, else the ASP's."""
    return transfers.tag_of_asid(machine, guest.asid)
