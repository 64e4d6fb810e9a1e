"""SWAP_OUT and SWAP_IN: guest pages under the guest's offline key, for a disk that the hypervisor owns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES, is_aligned
from sevlab.plugins.sev import crypto, transfers, vmsa_slots
from sevlab.plugins.sev.buffers import SwapIn, SwapOut
from sevlab.plugins.sev.command import Request
from sevlab.plugins.sev.handlers.common import live_guest
from sevlab.plugins.sev.layout import SwapMetadata
from sevlab.plugins.sev.numbers import Status

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

METADATA_ALIGNMENT_BYTES = 64
PAGE_TYPE_VMSA = 2
LAST_IV = (1 << 64) - 2


def swap_out(machine: Machine, request: Request[SwapOut]) -> Status:
    """Encrypt a page with AES-256-GCM under the guest's OEK; the metadata carry IV and tag.

    Source: sev-tool src/sevapi.h; AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_swap_out (order of checks).
    """
    buffer = request.buffer
    size = PAGE_2M_BYTES if buffer.large else PAGE_BYTES
    status = _places(machine, buffer, size, destination_alignment=size)
    if status:
        return status
    vmsa = buffer.page_type == PAGE_TYPE_VMSA
    if vmsa and buffer.large:
        return Status.INVALID_PARAM
    guest = live_guest(machine, buffer.handle)
    if guest is None:
        return Status.INVALID_GUEST
    if not guest.asid:
        return Status.INACTIVE
    if guest.oek_iv == LAST_IV:
        return Status.AEAD_OFLOW
    status = transfers.output_status(machine, buffer.destination_spa, size) or transfers.output_status(
        machine, buffer.mdata_spa, SwapMetadata.SIZE
    )
    if status:
        return status
    data = transfers.read_guest(machine, guest, buffer.source_spa, size)
    if data is None:
        return Status.INVALID_ADDRESS
    if vmsa_slots.matches(machine, guest, data[:PAGE_BYTES]) != vmsa:
        return Status.INVALID_PARAM
    fields = {
        "software_data": buffer.software_data,
        "iv": guest.oek_iv,
        "large": buffer.large,
        "page_type": buffer.page_type,
    }
    sealed, tag = crypto.gcm_seal(guest.oek, guest.oek_iv, SwapMetadata.build(**fields), data)
    guest.oek_iv += 1
    transfers.write(machine, buffer.destination_spa, sealed)
    transfers.write(machine, buffer.mdata_spa, SwapMetadata.build(**fields, tag=tag))
    return Status.SUCCESS


def swap_in(machine: Machine, request: Request[SwapIn]) -> Status:
    """Decrypt a swapped page into guest memory, at any address, when its tag holds.

    Source: sev-tool src/sevapi.h; AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_swap_in (order of checks).
    """
    buffer = request.buffer
    size = PAGE_2M_BYTES if buffer.large else PAGE_BYTES
    status = _places(machine, buffer, size, destination_alignment=PAGE_BYTES)
    if status:
        return status
    stored = transfers.read(machine, buffer.mdata_spa, SwapMetadata.SIZE)
    if stored is None:
        return Status.INVALID_ADDRESS
    metadata = SwapMetadata.from_bytes(stored)
    if (
        (buffer.large, buffer.page_type) != (metadata.large, metadata.page_type)
        or (buffer.in_place and buffer.page_type == PAGE_TYPE_VMSA)
        or (buffer.in_place and buffer.source_spa != buffer.destination_spa)
    ):
        return Status.INVALID_PARAM
    guest = live_guest(machine, buffer.handle)
    if guest is None:
        return Status.INVALID_GUEST
    if not guest.asid:
        return Status.INACTIVE
    status = transfers.output_status(machine, buffer.destination_spa, size)
    if status:
        return status
    sealed = transfers.read(machine, buffer.source_spa, size)
    if sealed is None:
        return Status.INVALID_ADDRESS
    associated = metadata.replace(tag=bytes(16)).to_bytes()
    data = crypto.gcm_open(guest.oek, metadata.iv, associated, sealed, metadata.tag)
    if data is None:
        return Status.BAD_MEASUREMENT
    transfers.write_guest(machine, guest, buffer.destination_spa, data)
    return Status.SUCCESS


def _places(machine: Machine, buffer: SwapOut | SwapIn, size: int, *, destination_alignment: int) -> Status:
    """Both pages and the metadata are memory, aligned, and the metadata in neither page."""
    metadata = buffer.mdata_spa, SwapMetadata.SIZE
    places = ((buffer.source_spa, size), (buffer.destination_spa, size), metadata)
    if not all(transfers.valid_range(machine, spa, length) for spa, length in places):
        return Status.INVALID_ADDRESS
    if not (
        is_aligned(buffer.source_spa, size)
        and is_aligned(buffer.destination_spa, destination_alignment)
        and is_aligned(buffer.mdata_spa, METADATA_ALIGNMENT_BYTES)
    ):
        return Status.INVALID_ADDRESS
    if any(transfers.overlap(*metadata, spa, length) for spa, length in places[:2]):
        return Status.INVALID_PARAM
    return Status.SUCCESS
