"""The firmware itself: a live update, its commitment, and which mitigations it has verified."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.plugins.sev import PlatformState, Request, Status, firmware, sev_state, transfers
from sevlab.plugins.snp.attestation import MITIGATIONS_SINCE
from sevlab.plugins.snp.buffers import MitigationResult, SnpCommit, SnpDownloadFirmwareEx, SnpVerifyMitigation
from sevlab.plugins.snp.handlers.common import platform_of, range_status, writable_status
from sevlab.plugins.snp.tcb import Tcb

if TYPE_CHECKING:
    from sevlab.core.machine import Machine
    from sevlab.plugins.snp.context import SnpPlatform

MITIGATION_STATUS, MITIGATION_VERIFY = 0, 1
"""Subcommands. Source: patches on the kernel's list (SNP_VERIFY_MITIGATION)."""
NOT_VERIFIED = 1
"""Failure status of a vector that the firmware does not support. UNVERIFIED."""


def knows_mitigations(platform: SnpPlatform) -> bool:
    """Whether the firmware is new enough for mitigation vectors."""
    return platform.report_version >= MITIGATIONS_SINCE


def commit(machine: Machine) -> None:
    """Make the current firmware the oldest that may ever run again.

    A reported TCB that was the committed one follows it. UNVERIFIED. Source: 56860, SNP_COMMIT.
    """
    platform, sev = platform_of(machine), sev_state(machine)
    if platform.reported_tcb == platform.committed_tcb:
        platform.reported_tcb = platform.current_tcb
    platform.committed_tcb = platform.current_tcb
    platform.committed_version = (sev.api_major, sev.api_minor, sev.build)


def snp_commit(machine: Machine, request: Request[SnpCommit]) -> Status:
    """Commit the firmware that runs: no older one can be loaded from then on.

    Source: 56860, SNP_COMMIT; AMD-ASPFW sev_uapp/src/sev_mcmd.c.
    """
    if request.buffer.length != SnpCommit.SIZE:
        return Status.INVALID_PARAM
    commit(machine)
    return Status.SUCCESS


def snp_download_firmware_ex(machine: Machine, request: Request[SnpDownloadFirmwareEx]) -> Status:
    """Live update, guests and all: the image's version and patch level are current from then on.

    Legacy SEV must be uninitialised. An image is not older than what is committed: BAD_SVN by its patch level,
    BAD_VERSION by its version; which of them comes first is UNVERIFIED. Images are those of the simulated vendor.
    Source: 56860, DOWNLOAD_FIRMWARE_EX; AMD-ASPFW sev_uapp/src/sev_mcmd.c; Linux include/uapi/linux/psp-sev.h.
    """
    buffer, sev, platform = request.buffer, sev_state(machine), platform_of(machine)
    if sev.state != PlatformState.UNINIT:
        return Status.INVALID_PLATFORM_STATE
    if buffer.length != SnpDownloadFirmwareEx.SIZE:
        return Status.INVALID_PARAM
    header = firmware.read_image(machine, buffer.firmware_spa, buffer.firmware_bytes)
    if isinstance(header, Status):
        return header
    generation = machine.config.part.name
    level, version = (
        header.security_patch_level & 0xFF,
        (header.version_major, header.version_minor, header.version_build),
    )
    if level < Tcb.of(platform.committed_tcb, generation).snp:
        return Status.BAD_SVN
    if version < platform.committed_version:
        return Status.BAD_VERSION
    sev.api_major, sev.api_minor, sev.build = version
    platform.current_tcb = Tcb.of(platform.current_tcb, generation)._replace(snp=level).raw()
    if buffer.commit:
        commit(machine)
    return Status.SUCCESS


def snp_verify_mitigation(machine: Machine, request: Request[SnpVerifyMitigation]) -> Status:
    """Tell which mitigations the firmware supports and has verified, or verify some.

    What a bit stands for is published with each security bulletin; the model's are the option `mitigations`, and
    verifying one of them succeeds. Statuses and their order are UNVERIFIED.
    Source: patches on the kernel's list (SNP_VERIFY_MITIGATION), version 4 of 2026.
    """
    buffer, platform = request.buffer, platform_of(machine)
    if not knows_mitigations(platform):
        return Status.INVALID_COMMAND
    wrong = buffer.length != SnpVerifyMitigation.SIZE or buffer.src_en
    if wrong or buffer.subcommand > MITIGATION_VERIFY:
        return Status.INVALID_PARAM
    if buffer.dst_en:
        status = range_status(machine, buffer.dst_spa, MitigationResult.SIZE) or writable_status(
            machine, buffer.dst_spa
        )
        if status:
            return status
    failure = 0
    if buffer.subcommand == MITIGATION_VERIFY:
        if not buffer.vector or buffer.vector & ~platform.mitigations_supported:
            failure = NOT_VERIFIED
        else:
            platform.mitigations_verified |= buffer.vector
    if buffer.dst_en:
        result = MitigationResult.build(
            verified=platform.mitigations_verified, supported=platform.mitigations_supported, failure_status=failure
        )
        transfers.write(machine, buffer.dst_spa, result)
    return Status.SUCCESS
