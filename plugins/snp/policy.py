"""The guest policy: its bits as the firmware tests them."""

from __future__ import annotations

from enum import IntFlag
from typing import TYPE_CHECKING

from sevlab.plugins.sev import sev_state

if TYPE_CHECKING:
    from sevlab.core.machine import Machine
    from sevlab.plugins.snp.context import SnpPlatform


class GuestPolicyBit(IntFlag):
    """Bits above the ABI version. Source: 56860, guest policy; Linux include/uapi/linux/sev-guest.h."""

    SMT = 1 << 16
    MUST_BE_ONE = 1 << 17
    MIGRATE_MA = 1 << 18
    DEBUG = 1 << 19
    SINGLE_SOCKET = 1 << 20
    CXL_ALLOW = 1 << 21
    MEM_AES_256_XTS = 1 << 22
    RAPL_DIS = 1 << 23
    CIPHERTEXT_HIDING = 1 << 24
    PAGE_SWAP_DISABLE = 1 << 25


RESERVED_OLD = ~((1 << 21) - 1)
RESERVED = ~((1 << 26) - 1)
"""What must be zero: firmware of API 1.55 knows no bit from 21 on."""


def policy_fits(machine: Machine, platform: SnpPlatform, policy: int) -> bool:
    """Whether the platform can hold to this policy.

    The newer bits are known from the firmware that writes reports of version 3 on; that is UNVERIFIED.
    Source: 56860, SNP_LAUNCH_START; AMD-ASPFW sev_uapp/src/sev_mcmd.c.
    """
    sev = sev_state(machine)
    newer = platform.report_version > 2
    api = policy >> 8 & 0xFF, policy & 0xFF
    broken = (
        not policy & GuestPolicyBit.MUST_BE_ONE
        or policy & (RESERVED if newer else RESERVED_OLD)
        or api > (sev.api_major, sev.api_minor)
        or (platform.smt and not policy & GuestPolicyBit.SMT)
        or (policy & GuestPolicyBit.SINGLE_SOCKET and sev.second_chip_key)
        or (policy & GuestPolicyBit.MEM_AES_256_XTS and machine.memory.key_bits != 256)
        or (policy & GuestPolicyBit.RAPL_DIS and not platform.rapl_dis)
        or (policy & GuestPolicyBit.CIPHERTEXT_HIDING and not platform.ciphertext_hiding)
    )
    return not broken
