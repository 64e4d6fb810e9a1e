"""SNP_PAGE_SWAP_OUT and SNP_PAGE_SWAP_IN: a guest's pages leave memory under its OEK, and come back once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.units import MASK64, PAGE_BYTES, is_aligned
from sevlab.plugins.sev import Request, Status, transfers
from sevlab.plugins.snp.buffers import MetadataEntry, SnpPageSwapIn, SnpPageSwapOut
from sevlab.plugins.snp.context import SnpGuest
from sevlab.plugins.snp.handlers.common import (
    find_guest,
    guest_allows,
    page_bytes,
    page_entry,
    plain,
    range_status,
    read_page,
    writable_status,
    write_page,
)
from sevlab.plugins.snp.handlers.pages import DEBUG_TARGETS, same_context
from sevlab.plugins.snp.layout import GPA, VALIDATED, VMSA
from sevlab.plugins.snp.policy import policy_of
from sevlab.plugins.snp.rmp import Entry, change_state, read_entry, write_entry
from sevlab.plugins.snp.states import PageEvent, PageState

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

DATA, METADATA, VMSA_PAGE = 0, 1, 2
"""Types of a page that is swapped. Source: AMD-ASPFW sev_uapp/src/sev_mcmd.h."""

NO_ENTRY = bytes(MetadataEntry.SIZE)
TAG_BYTES = 16


def _nonce(iv: int) -> bytes:
    """The GCM nonce of a swapped page: the 8-byte counter and four zero bytes. Source: AMD-ASPFW."""
    return iv.to_bytes(8, "little") + bytes(4)


def _common(
    machine: Machine, request: Request[SnpPageSwapOut] | Request[SnpPageSwapIn], firmware_page: int, guest_page: int
) -> SnpGuest | Status:
    """What both directions check before they look at the guest's page."""
    buffer = request.buffer
    length_bytes = page_bytes(large=buffer.page_size)
    if buffer.page_type > VMSA_PAGE or (buffer.page_size and buffer.page_type != DATA):
        return Status.INVALID_PARAM
    guest = find_guest(machine, buffer.gctx_spa)
    if isinstance(guest, Status):
        return guest
    for address in (firmware_page, guest_page):
        status = range_status(machine, address, length_bytes)
        if status:
            return status
    if not is_aligned(firmware_page | guest_page, length_bytes):
        return Status.INVALID_ADDRESS
    if not buffer.root_mdata_en:
        status = range_status(machine, buffer.mdata_spa, MetadataEntry.SIZE)
        if status:
            return status
        mdata = page_entry(machine, buffer.mdata_spa)
        if mdata is None or mdata.state is not PageState.METADATA:
            return Status.INVALID_PAGE_STATE
        if not same_context(guest, mdata):
            return Status.INVALID_PAGE_OWNER
    if policy_of(guest.policy).page_swap_disable:
        return Status.POLICY_FAILURE
    return guest


def _load_entry(machine: Machine, guest: SnpGuest, buffer: SnpPageSwapOut | SnpPageSwapIn) -> MetadataEntry:
    if buffer.root_mdata_en:
        return MetadataEntry.from_bytes(guest.root_md_entry)
    return MetadataEntry.from_bytes(machine.memory.read(plain(machine, buffer.mdata_spa), MetadataEntry.SIZE, None))


def _store_entry(machine: Machine, guest: SnpGuest, buffer: SnpPageSwapOut | SnpPageSwapIn, entry: bytes) -> None:
    if buffer.root_mdata_en:
        guest.root_md_entry = entry
    else:
        transfers.write(machine, plain(machine, buffer.mdata_spa), entry)


def swap_out(machine: Machine, request: Request[SnpPageSwapOut]) -> Status:
    """Encrypt a page under the OEK into the host's memory; the metadata entry remembers what it was.

    The page stays Pre-Guest, a Metadata page becomes Firmware. Source: 56860, SNP_PAGE_SWAP_OUT; AMD-ASPFW
    sev_uapp/src/sev_mcmd.c (order: sizes, states, owners before the guest's state).
    """
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    buffer = request.buffer
    guest = _common(machine, request, buffer.destination_spa, buffer.source_spa)
    if isinstance(guest, Status):
        return guest
    source = page_entry(machine, buffer.source_spa)
    status = _source_status(guest, buffer, source) or writable_status(machine, buffer.destination_spa)
    if status:
        return status
    assert source is not None
    if not guest_allows(guest, request.command):
        return Status.INVALID_GUEST_STATE
    if buffer.page_type != METADATA and not guest.asid:
        return Status.INACTIVE
    if _load_entry(machine, guest, buffer).valid:
        return Status.INVALID_MDATA_ENTRY
    if guest.oek_iv_count >= MASK64:
        return Status.AEAD_OFLOW
    spa = plain(machine, buffer.source_spa)
    iv = guest.oek_iv_count + 1
    sealed = AESGCM(guest.oek).encrypt(_nonce(iv), _content(machine, guest, buffer, spa), None)
    guest.oek_iv_count = iv
    transfers.write(machine, buffer.destination_spa, sealed[:-TAG_BYTES])
    metadata = buffer.page_type == METADATA
    entry = MetadataEntry.build(
        software_data=buffer.software_data,
        iv=iv,
        tag=sealed[-TAG_BYTES:],
        valid=1,
        page_validated=int(bool(source.low & VALIDATED)),
        vmsa=int(bool(source.low & VMSA) and not metadata),
        metadata=int(metadata),
        page_size=buffer.page_size,
        gpa_page=0 if metadata else source.gpa // PAGE_BYTES,
        **{f"vmpl{level}": source.permissions(level) for level in range(4)},
    )
    _store_entry(machine, guest, buffer, entry)
    change_state(machine, spa, PageEvent.SWAP_OUT_METADATA_SOURCE if metadata else PageEvent.SWAP_OUT_SOURCE)
    return Status.SUCCESS


def _source_status(guest: SnpGuest, buffer: SnpPageSwapOut, source: Entry | None) -> Status:
    if source is None:
        return Status.INVALID_PAGE_STATE
    if source.huge != bool(buffer.page_size):
        return Status.INVALID_PAGE_SIZE
    if buffer.page_type == METADATA:
        if source.state is not PageState.METADATA:
            return Status.INVALID_PAGE_STATE
        return Status.SUCCESS if same_context(guest, source) else Status.INVALID_PAGE_OWNER
    if source.state not in DEBUG_TARGETS or bool(source.low & VMSA) != (buffer.page_type == VMSA_PAGE):
        return Status.INVALID_PAGE_STATE
    return Status.SUCCESS if source.asid == guest.asid else Status.INVALID_PAGE_OWNER


def _content(machine: Machine, guest: SnpGuest, buffer: SnpPageSwapOut, spa: int) -> bytes:
    if buffer.page_type == METADATA:
        return machine.memory.read(spa, PAGE_BYTES, None)
    length_bytes = page_bytes(large=buffer.page_size)
    return b"".join(read_page(machine, guest, spa + offset) for offset in range(0, length_bytes, PAGE_BYTES))


def swap_in(machine: Machine, request: Request[SnpPageSwapIn]) -> Status:
    """Decrypt a page that was swapped out into a page of the guest's; its metadata entry is used up.

    With swap_in_place the ciphertext is in the destination already. That a validated page needs a Pre-Guest page at
    the address of the entry is UNVERIFIED. Source: 56860, SNP_PAGE_SWAP_IN; AMD-ASPFW sev_uapp/src/sev_mcmd.c.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    buffer = request.buffer
    source_spa = buffer.destination_spa if buffer.swap_in_place else buffer.source_spa
    guest = _common(machine, request, source_spa, buffer.destination_spa)
    if isinstance(guest, Status):
        return guest
    destination = page_entry(machine, buffer.destination_spa)
    entry = _load_entry(machine, guest, buffer)
    status = _destination_status(guest, buffer, destination)
    if status:
        return status
    assert destination is not None
    if not guest_allows(guest, request.command):
        return Status.INVALID_GUEST_STATE
    metadata = buffer.page_type == METADATA
    if not metadata and not guest.asid:
        return Status.INACTIVE
    if not _entry_fits(entry, buffer, destination):
        return Status.INVALID_MDATA_ENTRY
    sealed = transfers.read(machine, source_spa, page_bytes(large=buffer.page_size))
    assert sealed is not None  # the range was checked
    try:
        content = AESGCM(guest.oek).decrypt(_nonce(entry.iv), sealed + entry.tag, None)
    except InvalidTag:
        return Status.BAD_MEASUREMENT
    _store_entry(machine, guest, buffer, entry.replace(valid=0).to_bytes())
    spa = plain(machine, buffer.destination_spa)
    if metadata:
        transfers.write(machine, spa, content)
        change_state(machine, spa, PageEvent.SWAP_IN_METADATA_DESTINATION, context_spa=guest.gctx_spa)
        return Status.SUCCESS
    for offset in range(0, len(content), PAGE_BYTES):
        write_page(machine, guest, spa + offset, content[offset : offset + PAGE_BYTES])
    valid = bool(entry.page_validated)
    change_state(machine, spa, PageEvent.SWAP_IN_VALIDATED_DESTINATION if valid else PageEvent.SWAP_IN_DESTINATION)
    _restore(machine, spa, entry)
    return Status.SUCCESS


def _destination_status(guest: SnpGuest, buffer: SnpPageSwapIn, destination: Entry | None) -> Status:
    if destination is None:
        return Status.INVALID_PAGE_STATE
    if buffer.page_type == METADATA:
        return Status.SUCCESS if destination.state is PageState.FIRMWARE else Status.INVALID_PAGE_STATE
    if destination.state is not PageState.PRE_GUEST:
        return Status.INVALID_PAGE_STATE
    if destination.huge != bool(buffer.page_size):
        return Status.INVALID_PAGE_SIZE
    return Status.SUCCESS if destination.asid == guest.asid else Status.INVALID_PAGE_OWNER


def _entry_fits(entry: MetadataEntry, buffer: SnpPageSwapIn, destination: Entry) -> bool:
    return bool(
        entry.valid
        and entry.metadata == (buffer.page_type == METADATA)
        and entry.vmsa == (buffer.page_type == VMSA_PAGE)
        and entry.page_size == buffer.page_size
        and (entry.metadata or entry.gpa_page * PAGE_BYTES == destination.gpa)
    )


def _restore(machine: Machine, spa: int, entry: MetadataEntry) -> None:
    """The page gets back its address, VMSA bit and permissions."""
    now = read_entry(machine, spa)
    assert now is not None
    low = now.low & ~(GPA | VMSA) | entry.gpa_page * PAGE_BYTES | (VMSA if entry.vmsa else 0)
    write_entry(machine, spa, low, entry.vmpl0 | entry.vmpl1 << 8 | entry.vmpl2 << 16 | entry.vmpl3 << 24)
