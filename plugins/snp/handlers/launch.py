"""Launch commands: SNP_LAUNCH_START, SNP_LAUNCH_UPDATE, SNP_LAUNCH_FINISH."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.layout import Layout, raw_bytes, u64
from sevlab.core.units import MASK64, PAGE_BYTES, is_aligned
from sevlab.plugins.sev import Request, Status, asids, sev_state, transfers
from sevlab.plugins.snp.buffers import SnpLaunchFinish, SnpLaunchStart, SnpLaunchUpdate
from sevlab.plugins.snp.context import VMPCKS, SnpGuest
from sevlab.plugins.snp.cpuid_table import corrected_table
from sevlab.plugins.snp.guest_pages import secrets_page
from sevlab.plugins.snp.handlers.common import (
    find_guest,
    guest_allows,
    move_guest,
    page_bytes,
    page_entry,
    plain,
    platform_of,
    range_status,
    write_page,
)
from sevlab.plugins.snp.id_block import IdAuth, IdBlock
from sevlab.plugins.snp.launch_digest import NO_DIGEST, PageType, extend, page_contents
from sevlab.plugins.snp.launch_identity import LaunchIdentity, check_identity
from sevlab.plugins.snp.layout import VMSA
from sevlab.plugins.snp.policy import policy_fits, policy_of
from sevlab.plugins.snp.rmp import Entry, change_state, read_entry, write_entry
from sevlab.plugins.snp.states import PageEvent, PageState

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

KEY_BYTES = 32
REFERENCE_KHZ = 99_800
"""What GUEST_TSC_SCALE is relative to on Genoa. Source: AMD-ASPFW sev_uapp/src."""
SECURE_TSC = 1 << 9
"""Bit of SEV_FEATURES. Source: 24593, 15.36.18."""

SMALL_TYPES = frozenset((PageType.VMSA, PageType.SECRETS, PageType.CPUID))
"""Page types that have 4 KiB only. Source: 56860, SNP_LAUNCH_UPDATE."""


class VmsaFirmwareFields(Layout, size=0x1000):
    """The fields of a VMSA that the firmware sets at launch."""

    guest_tsc_scale = u64(0x2F0, source="24593, table B-4")
    guest_tsc_offset = u64(0x2F8, source="24593, table B-4")
    integrity = raw_bytes(0x380, 16, doc="zero, then all ones", source="AMD-ASPFW sev_uapp/src/sev_es.c")
    sev_features = u64(0x3B0, source="24593, table B-4")


def launch_start(machine: Machine, request: Request[SnpLaunchStart]) -> Status:
    """Begin a launch: the policy is checked against the platform, keys and report id are made.

    Source: 56860, SNP_LAUNCH_START; AMD-ASPFW sev_uapp/src/sev_mcmd.c (order: context, state, policy, agent).
    """
    buffer, platform = request.buffer, platform_of(machine)
    guest = find_guest(machine, buffer.gctx_spa)
    if isinstance(guest, Status):
        return guest
    if not guest_allows(guest, request.command):
        return Status.INVALID_GUEST_STATE
    if not policy_fits(machine, platform, buffer.policy):
        return Status.POLICY_FAILURE
    agent: SnpGuest | None = None
    if buffer.ma_en:
        if not policy_of(buffer.policy).migrate_ma:
            return Status.POLICY_FAILURE
        found = find_guest(machine, buffer.ma_gctx_spa)
        if isinstance(found, Status):
            return found
        if policy_of(found.policy).migrate_ma:
            return Status.POLICY_FAILURE
        agent = found
    take = machine.entropy.take
    guest.policy = buffer.policy
    guest.imi_en = bool(buffer.imi_en)
    guest.oek = take("snp.oek", KEY_BYTES)
    guest.vmpcks = tuple(take("snp.vmpck", KEY_BYTES) for _ in range(VMPCKS))
    guest.vmrk = take("snp.vmrk", KEY_BYTES)
    guest.report_id = take("snp.report-id", KEY_BYTES)
    if agent is not None:
        guest.migration_agent_spa = agent.gctx_spa
        guest.report_id_ma = agent.report_id
    guest.gosvw = buffer.gosvw
    guest.desired_tsc_khz = buffer.desired_tsc_khz
    guest.tsc_offset = -machine.tsc() & MASK64
    guest.launch_tcb = platform.current_tcb
    guest.launch_mit_vector = platform.mitigations_verified
    move_guest(guest, request.command)
    return Status.SUCCESS


def tsc_scale(desired_khz: int) -> int:
    """GUEST_TSC_SCALE of a wished frequency: 8.32 fixed point, rounded up; 0 for 0. Source: AMD-ASPFW sev_uapp/src."""
    return -(-(desired_khz << 32) // REFERENCE_KHZ)


# SNP_LAUNCH_UPDATE ----------------------------------------------------------------------------------------------------


def launch_update(machine: Machine, request: Request[SnpLaunchUpdate]) -> Status:
    """Measure a Pre-Guest page (or 2 MiB) and make it the guest's, valid and encrypted in place.

    A CPUID page with values that the processor does not have is answered with INVALID_PARAM and corrected in place.
    Order: context, page state, page size, alignment, type, guest state, activation, owner, IMI. Source: 56860,
    SNP_LAUNCH_UPDATE; AMD-ASPFW sev_uapp/src/sev_mcmd.c.
    """
    buffer = request.buffer
    guest = find_guest(machine, buffer.gctx_spa)
    if isinstance(guest, Status):
        return guest
    large = bool(buffer.page_size)
    length_bytes = page_bytes(large=large)
    status = range_status(machine, buffer.page_spa, length_bytes)
    if status:
        return status
    entry = page_entry(machine, buffer.page_spa)
    if entry is None or entry.state is not PageState.PRE_GUEST:
        return Status.INVALID_PAGE_STATE
    if entry.huge != large:
        return Status.INVALID_PAGE_SIZE
    spa = plain(machine, buffer.page_spa)
    if not is_aligned(spa, length_bytes):
        return Status.INVALID_ADDRESS
    if large and buffer.page_type in SMALL_TYPES:
        return Status.INVALID_PAGE_SIZE
    if not guest_allows(guest, request.command):
        return Status.INVALID_GUEST_STATE
    if not guest.asid:
        return Status.INACTIVE
    if entry.asid != guest.asid:
        return Status.INVALID_PAGE_OWNER
    if buffer.page_type not in _TYPES or (guest.imi_en and not buffer.imi_page):
        return Status.INVALID_PARAM
    data = transfers.read(machine, buffer.page_spa, length_bytes)
    assert data is not None  # the range was checked
    prepared = _prepared(machine, guest, buffer, data)
    if prepared is None:
        return Status.INVALID_PARAM
    _measure(guest, buffer, entry, data)
    for offset in range(0, length_bytes, PAGE_BYTES):
        write_page(machine, guest, spa + offset, prepared[offset : offset + PAGE_BYTES])
    _make_valid(machine, spa, buffer)
    return Status.SUCCESS


_TYPES = frozenset(PageType)


def _prepared(machine: Machine, guest: SnpGuest, buffer: SnpLaunchUpdate, data: bytes) -> bytes | None:
    """What goes into the guest's memory; None after a CPUID page was corrected."""
    if buffer.page_type == PageType.ZERO:
        return bytes(len(data))
    if buffer.page_type == PageType.VMSA:
        return _prepared_vmsa(guest, data)
    if buffer.page_type == PageType.SECRETS:
        return secrets_page(guest, fms=machine.cpuid(None, 1, 0)[0], launch_mit_vector=guest.launch_mit_vector)
    if buffer.page_type == PageType.CPUID:
        table = corrected_table(machine, data)
        if table != data:
            if table is not None:
                transfers.write(machine, buffer.page_spa, table)
            return None
    return data


def _prepared_vmsa(guest: SnpGuest, data: bytes) -> bytes:
    """The VMSA with the firmware's fields: no integrity slot, and the TSC of a guest with Secure TSC.

    Register protection (VmsaRegProt) is not modelled. Source: AMD-ASPFW sev_uapp/src/sev_es.c.
    """
    vmsa = VmsaFirmwareFields.from_bytes(data)
    fields: dict[str, int | bytes] = {"integrity": bytes(8) + b"\xff" * 8}
    if vmsa.sev_features & SECURE_TSC:
        fields |= {"guest_tsc_scale": tsc_scale(guest.desired_tsc_khz), "guest_tsc_offset": guest.tsc_offset}
    return vmsa.replace(**fields).to_bytes()


def _measure(guest: SnpGuest, buffer: SnpLaunchUpdate, entry: Entry, data: bytes) -> None:
    """Extend the launch digest, and that of the initial migration image for its pages, by every 4 KiB."""
    permissions = (buffer.vmpl1_perms, buffer.vmpl2_perms, buffer.vmpl3_perms)
    if buffer.page_type == PageType.VMSA:
        data = VmsaFirmwareFields.from_bytes(data).replace(guest_tsc_scale=0, guest_tsc_offset=0).to_bytes()
    for offset in range(0, len(data), PAGE_BYTES):
        contents = page_contents(buffer.page_type, data[offset : offset + PAGE_BYTES])

        def longer(digest: bytes, *, gpa: int = entry.gpa + offset, contents: bytes = contents) -> bytes:
            return extend(
                digest,
                buffer.page_type,
                gpa,
                contents,
                imi_page=bool(buffer.imi_page),
                permissions=permissions,
            )

        guest.launch_digest = longer(guest.launch_digest)
        if guest.imi_en and buffer.imi_page:
            guest.imi_digest = longer(guest.imi_digest)


def _make_valid(machine: Machine, spa: int, buffer: SnpLaunchUpdate) -> None:
    change_state(machine, spa, PageEvent.LAUNCH_UPDATE)
    entry = read_entry(machine, spa)
    assert entry is not None
    high = entry.high & 0xFF | buffer.vmpl1_perms << 8 | buffer.vmpl2_perms << 16 | buffer.vmpl3_perms << 24
    low = entry.low | (VMSA if buffer.page_type == PageType.VMSA else 0)
    write_entry(machine, spa, low, high)


# SNP_LAUNCH_FINISH ----------------------------------------------------------------------------------------------------


def launch_finish(machine: Machine, request: Request[SnpLaunchFinish]) -> Status:
    """End the launch: the owner's ID block, if one is given, must agree with digest and policy and be signed.

    Source: 56860, SNP_LAUNCH_FINISH; AMD-ASPFW sev_uapp/src/sev_mcmd.c.
    """
    buffer = request.buffer
    guest = find_guest(machine, buffer.gctx_spa)
    if isinstance(guest, Status):
        return guest
    if not guest_allows(guest, request.command) or guest.imi_en:
        return Status.INVALID_GUEST_STATE
    if not guest.asid:
        return Status.INACTIVE
    identity = LaunchIdentity(b"", NO_DIGEST, NO_DIGEST)
    if buffer.id_block_en:
        found = _identity(machine, guest, buffer)
        if isinstance(found, Status):
            return found
        identity = found
    guest.id_block, guest.id_key_digest, guest.author_key_digest = identity
    guest.author_key_en = bool(buffer.auth_key_en)
    guest.vcek_dis = bool(buffer.vcek_dis)
    guest.host_data = buffer.host_data
    sev = sev_state(machine)
    asids.allocate(sev, guest.asid, guest.ccxs, running=True)
    move_guest(guest, request.command)
    return Status.SUCCESS


def _identity(machine: Machine, guest: SnpGuest, buffer: SnpLaunchFinish) -> LaunchIdentity | Status:
    """What an ID block makes of the launch; both structures are read once."""
    block = transfers.read(machine, buffer.id_block_spa, IdBlock.SIZE)
    auth = transfers.read(machine, buffer.id_auth_spa, IdAuth.SIZE)
    if block is None or auth is None:
        return Status.INVALID_ADDRESS
    return check_identity(
        block,
        auth,
        launch_digest=guest.launch_digest,
        policy=guest.policy,
        author_key_en=bool(buffer.auth_key_en),
    )
