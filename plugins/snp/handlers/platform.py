"""Platform commands: initialisation and shutdown, status, configuration, VLEK, feature information."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES, is_aligned
from sevlab.plugins.sev import NoBuffer, PlatformState, Request, Status, asids, sev_state, transfers
from sevlab.plugins.sme import sme_state
from sevlab.plugins.snp import keys
from sevlab.plugins.snp.automata import SnpPlatformState
from sevlab.plugins.snp.buffers import (
    FeatureInfoOutput,
    OnePage,
    RangeListEntry,
    RangeListHeader,
    SnpConfig,
    SnpFeatureInfo,
    SnpInitEx,
    SnpPageSetState,
    SnpPlatformStatus,
    SnpShutdownEx,
    SnpVlekLoad,
    WrappedVlek,
)
from sevlab.plugins.snp.handlers.common import move_platform, plain, platform_of, range_status, writable_status
from sevlab.plugins.snp.handlers.updates import knows_mitigations
from sevlab.plugins.snp.rmp import BOOKKEEPING_BYTES, RMP_ALIGNMENT_BYTES, change_state, initialize_rmp, state_of
from sevlab.plugins.snp.rmp_check import SNP_EN, VMPL_EN
from sevlab.plugins.snp.states import HWCR_SMM_LOCK, PageEvent, PageState, snp_state

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

MEM_ENCRYPTION_MOD_EN = 1 << 23
MFDM = 1 << 19
"""Bits of SYSCFG that SNP_INIT wants set. Source: AMD-ASPFW sev_uapp/src/sev_mcmd.c."""

LIST_BYTES_MAX = PAGE_BYTES


class FeatureBit:
    """Bits of SNP_FEATURE_INFO, function 0. Source: Linux include/linux/psp-sev.h."""

    EBX_LEGACY_SEV = 1 << 0
    ECX_VLEK = 1 << 0
    ECX_X86_SHUTDOWN = 1 << 1
    ECX_RAPL_DISABLE = 1 << 2
    ECX_CIPHERTEXT_HIDING = 1 << 3
    ECX_AES_256_XTS = 1 << 4
    ECX_CXL = 1 << 5
    ECX_VERIFY_MITIGATION = 1 << 13


GUEST_MESSAGES_BITMAP = 0x1FF
"""Function 1: CPUID, KEY, REPORT, EXPORT, IMPORT, ABSORB, VMRK, ABSORB_NOMA, TSC_INFO."""


# Initialisation -------------------------------------------------------------------------------------------------------


def snp_init(machine: Machine, request: Request[NoBuffer]) -> Status:
    """Initialise the platform and the RMP: SNP_INIT_EX with init_rmp.

    Source: 56860, SNP_INIT.
    """
    return _initialise(machine, request, SnpInitEx.from_bytes(SnpInitEx.build(init_rmp=1)))


def snp_init_ex(machine: Machine, request: Request[SnpInitEx]) -> Status:
    """Initialise the platform, and the RMP where asked to: then every page is the hypervisor's again.

    Order: parameters, the legacy platform, the processor's settings. Source: 56860, SNP_INIT_EX; AMD-ASPFW
    sev_uapp/src/sev_mcmd.c.
    """
    return _initialise(machine, request, request.buffer)


def _initialise(machine: Machine, request: Request[NoBuffer] | Request[SnpInitEx], buffer: SnpInitEx) -> Status:
    platform, sev, snp = platform_of(machine), sev_state(machine), snp_state(machine)
    if sev.state != PlatformState.UNINIT:
        return Status.INVALID_PLATFORM_STATE
    if buffer.list_paddr_en and not buffer.init_rmp:
        return Status.INVALID_PARAM
    status = _hiding_status(machine, buffer) or _settings_status(machine, init_rmp=bool(buffer.init_rmp))
    if status:
        return status
    if not buffer.init_rmp and not (sev.rmp_initialised and platform.rmp_tcb == platform.current_tcb):
        return Status.RMP_INIT_REQUIRED
    fixed: tuple[tuple[int, int], ...] = ()
    if buffer.list_paddr_en:
        found = read_ranges(machine, buffer.list_spa)
        if isinstance(found, Status):
            return found
        fixed = found
    if any(base < snp.rmp_end and base + count * PAGE_BYTES > snp.rmp_base for base, count in fixed):
        return Status.INVALID_PARAM
    if buffer.init_rmp:
        initialize_rmp(machine, fixed)
        platform.rmp_tcb = platform.current_tcb
        sev.rmp_initialised = True
    sev.snp_initialised = True
    sev.rmp = (snp.rmp_base, snp.rmp_end + 1 - snp.rmp_base)
    asids.make_all_dirty(sev)
    platform.guests.clear()
    platform.rapl_dis = bool(buffer.rapl_dis)
    platform.ciphertext_hiding = bool(buffer.ciphertext_hiding_en)
    platform.max_snp_asid = buffer.max_snp_asid if buffer.ciphertext_hiding_en else 0
    move_platform(machine, request.command)
    return Status.SUCCESS


def _hiding_status(machine: Machine, buffer: SnpInitEx) -> Status:
    """Ciphertext hiding and SEV-TIO exist on Turin. The statuses are UNVERIFIED. Source: Linux ccp/sev-dev.c."""
    turin = machine.config.part.name == "turin"
    if buffer.tio_en or (buffer.ciphertext_hiding_en and not turin):
        return Status.UNSUPPORTED
    if buffer.ciphertext_hiding_en and not 1 <= buffer.max_snp_asid < sev_state(machine).min_asid:
        return Status.INVALID_PARAM
    return Status.SUCCESS


def _settings_status(machine: Machine, *, init_rmp: bool) -> Status:
    """What all cores must have set before SNP_INIT. The model has one SYSCFG for all of them."""
    snp = snp_state(machine)
    wanted = MEM_ENCRYPTION_MOD_EN | MFDM | SNP_EN | VMPL_EN
    if sme_state(machine).syscfg & wanted != wanted or not snp.hwcr & HWCR_SMM_LOCK:
        return Status.INVALID_CONFIG
    c_bit = 1 << machine.config.part.c_bit
    if (snp.rmp_base | snp.rmp_end) & c_bit:
        return Status.UNSUPPORTED
    length_bytes = snp.rmp_end + 1 - snp.rmp_base
    if not snp.rmp_base or not is_aligned(snp.rmp_base, RMP_ALIGNMENT_BYTES) or length_bytes <= BOOKKEEPING_BYTES:
        return Status.INVALID_CONFIG
    if snp.rmp_end >= machine.memory.size_bytes or (init_rmp and snp.vm_hsave_pa):
        return Status.INVALID_CONFIG
    return Status.SUCCESS


def read_ranges(machine: Machine, list_spa: int) -> tuple[tuple[int, int], ...] | Status:
    """The (SPA, page count) pairs of a RANGE_LIST of at most one page. Source: 56860, RANGE_LIST."""
    head = transfers.read(machine, list_spa, RangeListHeader.SIZE)
    if head is None:
        return Status.INVALID_ADDRESS
    header = RangeListHeader.from_bytes(head)
    length_bytes = RangeListHeader.SIZE + header.count * RangeListEntry.SIZE
    if header.reserved_4 or length_bytes > LIST_BYTES_MAX:
        return Status.INVALID_PARAM
    body = transfers.read(machine, list_spa + RangeListHeader.SIZE, length_bytes - RangeListHeader.SIZE)
    if header.count and body is None:
        return Status.INVALID_ADDRESS
    ranges = []
    for start in range(0, header.count * RangeListEntry.SIZE, RangeListEntry.SIZE):
        entry = RangeListEntry.from_bytes((body or b"")[start : start + RangeListEntry.SIZE])
        end = entry.base + entry.page_count * PAGE_BYTES
        if entry.reserved_c or not is_aligned(entry.base, PAGE_BYTES) or end > machine.memory.size_bytes:
            return Status.INVALID_PARAM
        ranges.append((entry.base, entry.page_count))
    return tuple(ranges)


def snp_shutdown(machine: Machine, request: Request[NoBuffer]) -> Status:
    """Leave SNP: SNP_SHUTDOWN_EX without flags. Source: 56860, SNP_SHUTDOWN."""
    flags = SnpShutdownEx.from_bytes(SnpShutdownEx.build(length=SnpShutdownEx.SIZE))
    return _shut_down(machine, request, flags)


def snp_shutdown_ex(machine: Machine, request: Request[SnpShutdownEx]) -> Status:
    """Leave SNP: every ASID must be clean; contexts and VLEK are wiped, SYSCFG.SNPEn is cleared where asked to.

    The RMP keeps its content, and the model has no IOMMU pages to give back. That context pages stay Context is
    UNVERIFIED. Source: 56860, SNP_SHUTDOWN_EX; AMD-ASPFW sev_uapp/src/sev_mcmd.c.
    """
    return _shut_down(machine, request, request.buffer)


def _shut_down(machine: Machine, request: Request[NoBuffer] | Request[SnpShutdownEx], flags: SnpShutdownEx) -> Status:
    platform, sev = platform_of(machine), sev_state(machine)
    if flags.length != SnpShutdownEx.SIZE or (flags.x86_snp_shutdown and not flags.iommu_snp_shutdown):
        return Status.INVALID_PARAM
    if platform.state is SnpPlatformState.UNINIT:
        return Status.SUCCESS
    if sev.state != PlatformState.UNINIT:
        return Status.INVALID_PLATFORM_STATE
    if any(ccx.dirty or ccx.allocated or ccx.in_use for ccx in sev.ccxs.values()):
        return Status.DF_FLUSH_REQUIRED
    platform.guests.clear()
    platform.vlek = b""
    platform.ciphertext_hiding = False
    platform.max_snp_asid = 0
    sev.snp_initialised = False
    if flags.x86_snp_shutdown:
        sme_state(machine).syscfg &= ~(SNP_EN | VMPL_EN)
    move_platform(machine, request.command)
    return Status.SUCCESS


def snp_df_flush(machine: Machine, _request: Request[NoBuffer]) -> Status:
    """Flush the data fabric: dirty ASIDs become clean where every core has done WBINVD; shared with DF_FLUSH.

    Source: 56860, SNP_DF_FLUSH.
    """
    return asids.flush(sev_state(machine))


# Status and configuration ---------------------------------------------------------------------------------------------


def snp_platform_status(machine: Machine, request: Request[OnePage]) -> Status:
    """Write versions, state and TCBs to a page of the host's.

    Source: 56860, SNP_PLATFORM_STATUS; Linux include/uapi/linux/psp-sev.h.
    """
    platform, sev = platform_of(machine), sev_state(machine)
    address = request.buffer.page_spa
    status = range_status(machine, address, PAGE_BYTES) or writable_status(machine, address)
    if status:
        return status
    turin = machine.config.part.name == "turin"
    answer = SnpPlatformStatus.build(
        api_major=sev.api_major,
        api_minor=sev.api_minor,
        state=platform.state,
        is_rmp_initialized=int(sev.rmp_initialised),
        build_id=sev.build,
        mask_chip_id=int(platform.mask_chip_id),
        mask_chip_key=int(platform.mask_chip_key),
        vlek_en=int(bool(platform.vlek)),
        feature_info=1,
        rapl_dis=int(platform.rapl_dis),
        ciphertext_hiding_cap=int(turin),
        ciphertext_hiding_en=int(platform.ciphertext_hiding),
        guest_count=len(platform.guests),
        current_tcb=platform.current_tcb,
        reported_tcb=platform.reported_tcb,
    )
    transfers.write(machine, address, answer)
    return Status.SUCCESS


def as_one_number(tcb: int) -> int:
    """Boot loader, TEE, SNP and microcode as one big-endian number: how the published firmware compares in SNP_CONFIG,
    so that a lower boot loader hides a higher SNP. Source: AMD-ASPFW sev_uapp/src/sev_mcmd.c.
    """
    levels = tcb.to_bytes(8, "little")
    return int.from_bytes(bytes((levels[0], levels[1], levels[6], levels[7])), "big")


def tcb_at_most(tcb: int, limit: int) -> bool:
    """Whether no component is above the limit's, byte by byte: the same on every generation."""
    return all(
        ours <= theirs for ours, theirs in zip(tcb.to_bytes(8, "little"), limit.to_bytes(8, "little"), strict=True)
    )


def snp_config(machine: Machine, request: Request[SnpConfig]) -> Status:
    """Set the TCB that reports name and keys derive from (0: the committed one), and what is masked.

    Source: 56860, SNP_CONFIG; AMD-ASPFW sev_uapp/src/sev_mcmd.c (comparison; on Turin component by component).
    """
    platform, buffer = platform_of(machine), request.buffer
    reported = buffer.reported_tcb or platform.committed_tcb
    turin = machine.config.part.name == "turin"
    if turin and not tcb_at_most(reported, platform.committed_tcb):
        return Status.INVALID_PARAM
    if not turin and as_one_number(reported) > as_one_number(platform.committed_tcb):
        return Status.INVALID_PARAM
    platform.reported_tcb = reported
    platform.mask_chip_id = bool(buffer.mask_chip_id)
    platform.mask_chip_key = bool(buffer.mask_chip_key)
    return Status.SUCCESS


def snp_vlek_load(machine: Machine, request: Request[SnpVlekLoad]) -> Status:
    """Take the provider's wrapped VLEK; its TCB must be the reported one, exactly.

    Source: 56860, SNP_VLEK_LOAD; AMD-ASPFW sev_uapp/src/sev_mcmd.c.
    """
    platform, buffer = platform_of(machine), request.buffer
    if buffer.length != SnpVlekLoad.SIZE or buffer.wrapped_version:
        return Status.INVALID_PARAM
    raw = transfers.read(machine, buffer.wrapped_spa, WrappedVlek.SIZE)
    if raw is None:
        return Status.INVALID_ADDRESS
    blob = WrappedVlek.from_bytes(raw)
    if blob.vlek_tcb != platform.reported_tcb:
        return Status.BAD_SVN
    stick = keys.unwrap_vlek(machine, blob)
    if stick is None:
        return Status.BAD_MEASUREMENT
    platform.vlek = stick
    return Status.SUCCESS


def snp_feature_info(machine: Machine, request: Request[SnpFeatureInfo]) -> Status:
    """Write one function of the feature information, four registers as CPUID gives them.

    Source: 56860, FEATURE_INFO; Linux include/linux/psp-sev.h.
    """
    buffer = request.buffer
    turin = machine.config.part.name == "turin"
    if buffer.length != SnpFeatureInfo.SIZE or buffer.ecx_in > 1:
        return Status.INVALID_PARAM
    address = buffer.feature_info_spa
    status = range_status(machine, address, FeatureInfoOutput.SIZE) or writable_status(machine, address)
    if status:
        return status
    answer = FeatureInfoOutput.build(eax=GUEST_MESSAGES_BITMAP)
    if not buffer.ecx_in:
        ecx = FeatureBit.ECX_VLEK | FeatureBit.ECX_X86_SHUTDOWN | FeatureBit.ECX_RAPL_DISABLE
        if knows_mitigations(platform_of(machine)):
            ecx |= FeatureBit.ECX_VERIFY_MITIGATION
        if turin:
            ecx |= FeatureBit.ECX_CIPHERTEXT_HIDING | FeatureBit.ECX_AES_256_XTS
        answer = FeatureInfoOutput.build(eax=1, ebx=FeatureBit.EBX_LEGACY_SEV, ecx=ecx)
    transfers.write(machine, address, answer)
    return Status.SUCCESS


def snp_page_set_state(machine: Machine, request: Request[SnpPageSetState]) -> Status:
    """Make listed Firmware pages HV-Fixed for good. Source: 56860, SNP_PAGE_SET_STATE; AMD-ASPFW sev_mcmd.c."""
    if request.buffer.length != SnpPageSetState.SIZE:
        return Status.INVALID_LENGTH
    ranges = read_ranges(machine, request.buffer.list_spa)
    if isinstance(ranges, Status):
        return ranges
    if any(not is_aligned(base, PAGE_2M_BYTES) for base, _ in ranges):
        return Status.INVALID_PARAM
    pages = [base + number * PAGE_BYTES for base, count in ranges for number in range(count)]
    if any(range_status(machine, spa, PAGE_BYTES) for spa in pages):
        return Status.INVALID_PARAM
    if any(state_of(machine, spa) is not PageState.FIRMWARE for spa in pages):
        return Status.INVALID_PAGE_STATE
    for spa in pages:
        change_state(machine, plain(machine, spa), PageEvent.SET_STATE)
    return Status.SUCCESS
