"""What the firmware makes of an ID block and its authentication at SNP_LAUNCH_FINISH.

Source: 56860, SNP_LAUNCH_FINISH, ID block and ID authentication; AMD-ASPFW sev_uapp/src/sev_mcmd.c.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from sevlab.core.layout import Layout, raw_bytes, u32, u64
from sevlab.plugins.sev import Algorithm, Status, pubkey_point, verify_ecdsa

SOURCE = "56860, ID block"
ECDSA_P384_SHA384 = 1
KEY_BYTES, SIGNATURE_BYTES = 0x404, 0x200


class IdBlockFields(Layout, size=0x60):
    """The ID block: what the owner expects, signed."""

    launch_digest = raw_bytes(0x00, 48, source=SOURCE)
    family_id = raw_bytes(0x30, 16, source=SOURCE)
    image_id = raw_bytes(0x40, 16, source=SOURCE)
    block_version = u32(0x50, values=(1,), source=SOURCE)
    guest_svn = u32(0x54, source=SOURCE)
    policy = u64(0x58, source=SOURCE)


class IdAuthFields(Layout, size=0x1000):
    """The signatures of an ID block and of its key."""

    id_key_algo = u32(0x000, values=(1,), source=SOURCE)
    auth_key_algo = u32(0x004, source=SOURCE)
    id_block_sig = raw_bytes(0x040, SIGNATURE_BYTES, source=SOURCE)
    id_key = raw_bytes(0x240, KEY_BYTES, source=SOURCE)
    id_key_sig = raw_bytes(0x680, SIGNATURE_BYTES, source=SOURCE)
    author_key = raw_bytes(0x880, KEY_BYTES, source=SOURCE)


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
    expected, keys = IdBlockFields.from_bytes(block), IdAuthFields.from_bytes(auth)
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
    author = hashlib.sha384(keys.author_key).digest() if author_key_en else bytes(48)
    return LaunchIdentity(block, hashlib.sha384(keys.id_key).digest(), author)
