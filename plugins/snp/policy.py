"""Whether a platform can hold to a guest's policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.plugins.sev import sev_state
from sevlab.plugins.snp.report import GuestPolicy

if TYPE_CHECKING:
    from sevlab.core.machine import Machine
    from sevlab.plugins.snp.context import SnpPlatform

RESERVED_OLD = ~((1 << 21) - 1)
RESERVED = ~((1 << 26) - 1)
"""What must be zero: firmware of API 1.55 knows no bit from 21 on."""


def policy_of(raw: int) -> GuestPolicy:
    """The policy taken apart."""
    return GuestPolicy.from_bytes(raw.to_bytes(GuestPolicy.SIZE, "little"))


def policy_fits(machine: Machine, platform: SnpPlatform, raw: int) -> bool:
    """Whether the platform can hold to this policy.

    The newer bits are known from the firmware that writes reports of version 3 on; that is UNVERIFIED.
    Source: 56860, SNP_LAUNCH_START; AMD-ASPFW sev_uapp/src/sev_mcmd.c.
    """
    sev, policy = sev_state(machine), policy_of(raw)
    newer = platform.report_version > 2
    broken = (
        not policy.must_be_one
        or raw & (RESERVED if newer else RESERVED_OLD)
        or (policy.abi_major, policy.abi_minor) > (sev.api_major, sev.api_minor)
        or (platform.smt and not policy.smt)
        or (policy.single_socket and sev.second_chip_key)
        or (policy.mem_aes_256_xts and machine.memory.key_bits != 256)
        or (policy.rapl_dis and not platform.rapl_dis)
        or (policy.ciphertext_hiding and not platform.ciphertext_hiding)
    )
    return not broken
