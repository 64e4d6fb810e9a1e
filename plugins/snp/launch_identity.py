"""What the firmware makes of an ID block and its authentication at SNP_LAUNCH_FINISH.

Source: 56860, SNP_LAUNCH_FINISH, ID block and ID authentication; AMD-ASPFW sev_uapp/src/sev_mcmd.c.
"""

from __future__ import annotations

from typing import NamedTuple

from sevlab.plugins.sev import Algorithm, Status, pubkey_point, verify_ecdsa
from sevlab.plugins.snp.id_block import ECDSA_P384_SHA384, IdAuth, IdBlock, key_digest


class LaunchIdentity(NamedTuple):
    """What the firmware remembers of a good ID block."""

    block: bytes
    id_key_digest: bytes
    author_key_digest: bytes


def _signed_by(key: bytes, message: bytes, signature: bytes) -> bool:
    point = pubkey_point(key)
    return point is not None and verify_ecdsa(point, message, signature, Algorithm.ECDSA_SHA384)


def check_identity(
    block: bytes, auth: bytes, *, launch_digest: bytes, policy: int, author_key_en: bool
) -> LaunchIdentity | Status:
    """The identity of a launch, or why it is refused.

    Order: launch digest, policy, algorithms, signatures; the block's version is not looked at. Source: AMD-ASPFW
    sev_uapp/src/sev_mcmd.c.
    """
    expected, keys = IdBlock.from_bytes(block), IdAuth.from_bytes(auth)
    if expected.launch_digest != launch_digest:
        return Status.BAD_MEASUREMENT
    if expected.policy != policy:
        return Status.POLICY_FAILURE
    if keys.id_key_algo != ECDSA_P384_SHA384 or (author_key_en and keys.auth_key_algo != ECDSA_P384_SHA384):
        return Status.INVALID_PARAM
    if not _signed_by(keys.id_key, block, keys.id_block_sig):
        return Status.BAD_SIGNATURE
    if author_key_en and not _signed_by(keys.author_key, keys.id_key, keys.id_key_sig):
        return Status.BAD_SIGNATURE
    author = key_digest(keys.author_key) if author_key_en else bytes(48)
    return LaunchIdentity(block, key_digest(keys.id_key), author)
