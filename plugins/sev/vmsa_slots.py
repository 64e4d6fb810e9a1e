"""Checksums of VMSAs in the trusted memory region: what makes a VMSA that somebody wrote to detectable."""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

from sevlab.plugins.sev.context import Gctx, SevState, sev_state
from sevlab.plugins.sev.numbers import Status

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

ZERO_OFFSET = 0x380
SLOT_OFFSET = 0x388
"""Where a VMSA holds zero and the address of its slot. Source: AMD-ASPFW sev_uapp/src/sev_es.c, sev_es_setup_vmsa."""

CHECKED_BYTES = 0xFC0
"""What the checksum covers. Source: AMD-ASPFW sev_uapp/src/sev_es.h, VMSA_CRC_SIZE."""

SLOT_BYTES = 8
"""Source: AMD-ASPFW sev_uapp/src/pool_u32.h, CRC_BLOCK_SIZE."""


def checksum(vmsa: bytes) -> int:
    """The checksum of a VMSA page. It never leaves the region; the firmware's polynomial is not ours. UNVERIFIED."""
    return crc32(vmsa[:CHECKED_BYTES])


def prepare(machine: Machine, guest: Gctx, vmsa: bytes) -> bytes | Status:
    """Take a slot for a new VMSA and put its address into it; RESOURCE_LIMIT when none is free.

    The first half of the region is the firmware's index, the second half the slots.
    """
    sev = sev_state(machine)
    slot = _free_slot(sev)
    if not slot or not sev.tmr.locked:
        return Status.RESOURCE_LIMIT
    page = vmsa[:ZERO_OFFSET] + bytes(8) + slot.to_bytes(8, "little") + vmsa[SLOT_OFFSET + 8 :]
    sev.tmr.checksums[slot] = checksum(page)
    guest.vmsa_slots = (*guest.vmsa_slots, slot)
    return page


def _free_slot(sev: SevState) -> int:
    tmr = sev.tmr
    slots = range(tmr.spa + tmr.length_bytes // 2, tmr.spa + tmr.length_bytes, SLOT_BYTES)
    return next((slot for slot in slots if slot not in tmr.checksums), 0)


def matches(machine: Machine, guest: Gctx, vmsa: bytes) -> bool:
    """Whether the page is one of the guest's VMSAs and nobody but the processor has changed it."""
    slot = int.from_bytes(vmsa[SLOT_OFFSET : SLOT_OFFSET + 8], "little")
    return slot in guest.vmsa_slots and sev_state(machine).tmr.checksums[slot] == checksum(vmsa)


def update(machine: Machine, vmsa: bytes) -> None:
    """What the processor does when it saves a VMSA: the new checksum goes into the slot."""
    slot = int.from_bytes(vmsa[SLOT_OFFSET : SLOT_OFFSET + 8], "little")
    if slot in sev_state(machine).tmr.checksums:
        sev_state(machine).tmr.checksums[slot] = checksum(vmsa)
