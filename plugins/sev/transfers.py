"""How the ASP reaches memory for a command: plain or with the C-bit by address, and guest memory by its key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.access import ASP, GPA_NONE, AccessKind
from sevlab.core.buffers import SharedBuffer
from sevlab.core.memory import TAG_ASP, split_pages
from sevlab.core.units import PAGE_BYTES
from sevlab.plugins.sev.context import Gctx, sev_state
from sevlab.plugins.sev.numbers import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from sevlab.core.machine import Machine


def valid_range(machine: Machine, address: int, length_bytes: int) -> bool:
    """Whether the ASP may touch these bytes for a command: memory, but not its trusted region, the queues or the RMP.

    The model has no SMRAM, so that no range is TSEG or ASEG. Source: AMD-ASPFW sev_uapp/src/x86_copy.c,
    validate_address_range.
    """
    place = machine.access.asp_place(address, length_bytes)
    if place is None or length_bytes <= 0:
        return False
    sev = sev_state(machine)
    kept = ((sev.tmr.spa, sev.tmr.length_bytes), sev.rmp)
    if any(overlap(place.spa, length_bytes, *own) for own in kept):
        return False
    queues = (*sev.ring.commands_spa, *sev.ring.statuses_spa) if sev.ring.enabled else ()
    return not any(overlap(place.spa, length_bytes, guest_spa(machine, page), PAGE_BYTES) for page in queues if page)


def overlap(first: int, first_bytes: int, second: int, second_bytes: int) -> bool:
    """Whether two ranges share a byte."""
    return first < second + second_bytes and second < first + first_bytes


def read(machine: Machine, address: int, length_bytes: int) -> bytes | None:
    """One counted fetch; None: INVALID_ADDRESS."""
    if not valid_range(machine, address, length_bytes):
        return None
    return machine.access.asp_fetch(address, length_bytes)


def output_status(machine: Machine, address: int, length_bytes: int) -> Status:
    """Whether the firmware may write these bytes: INVALID_PAGE_STATE where SNP's rules say no.

    The explicit check point for SNP: the slot `access_check` is asked about a write by the ASP to each page.
    Source: AMD-ASPFW sev_uapp/src/sev_rmp.c, check_page_range_firmware_writable.
    """
    check = machine.slots.access_check
    place = machine.access.asp_place(address, length_bytes)
    if check is None or place is None:
        return Status.SUCCESS
    for start, _ in split_pages(place.spa, length_bytes):
        if check(ASP, start, GPA_NONE, AccessKind.WRITE) is not None:
            return Status.INVALID_PAGE_STATE
    return Status.SUCCESS


def write(machine: Machine, address: int, data: bytes, *, tag: int = TAG_ASP) -> None:
    """Store what the firmware gives out; the caller has checked the range. `tag` says whose data it is."""
    place = machine.access.asp_place(address, len(data))
    assert place is not None  # the caller has checked
    machine.memory.write(place.spa, data, place.key, tag)


def guest_spa(machine: Machine, address: int) -> int:
    """The address without the C-bit: guest memory is reached by the guest's key, never the host's."""
    return address & ~(1 << machine.config.part.c_bit)


def read_guest(machine: Machine, guest: Gctx, address: int, length_bytes: int) -> bytes | None:
    """Plaintext of guest memory, one counted fetch; None: INVALID_ADDRESS."""
    if not valid_range(machine, address, length_bytes):
        return None
    key = guest.key(machine)
    return SharedBuffer(machine.fetches, guest_spa(machine, address), length_bytes, key, TAG_ASP).read(0, length_bytes)


def write_guest(machine: Machine, guest: Gctx, address: int, data: bytes) -> None:
    """Encrypt into guest memory; the caller has checked the range."""
    machine.memory.write(guest_spa(machine, address), data, guest.key(machine), guest_tag_of(machine, guest))


def encrypt_in_place(
    machine: Machine, guest: Gctx, address: int, length_bytes: int, consume: Callable[[bytes | bytearray], object]
) -> None:
    """One counted fetch of plaintext, and the same bytes back under the guest's key; the caller has checked the range.

    `consume` gets every byte once. The AES happens when somebody looks.
    """
    place = machine.access.asp_place(address, length_bytes)
    assert place is not None  # the caller has checked
    fetches = machine.fetches
    fetches.count += 1
    if fetches.watched:
        fetches.notice(place.spa, length_bytes, place.spa)
    machine.memory.hand_over(
        place.spa, length_bytes, place.key, guest.key(machine), guest_tag_of(machine, guest), consume
    )


def guest_tag_of(machine: Machine, guest: Gctx) -> int:
    """Whose data a byte of this guest's memory is: the VM that runs under its ASID, the ASP's until one does."""
    return tag_of_asid(machine, guest.asid)


def tag_of_asid(machine: Machine, asid: int) -> int:
    """The owner tag of the VM that runs under `asid`; the ASP's until one does."""
    return next((vcpu.tag for vcpu in machine.vcpus.values() if vcpu.asid == asid), TAG_ASP)
