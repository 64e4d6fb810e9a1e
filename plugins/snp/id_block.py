"""The guest owner's ID block and its authentication: made, and checked line by line.

Source: 56860, SNP_LAUNCH_FINISH, ID block and ID authentication information structures; virtee/sev src/launch/idblock.
"""

from __future__ import annotations

import hashlib

from sevlab.core.layout import Layout, raw_bytes, u32, u64
from sevlab.core.layout_tools import read_file_part, validate
from sevlab.plugins.sev import (
    Algorithm,
    Check,
    EcPublicKey,
    Point,
    pubkey_bytes,
    public_point,
    sign_ecdsa,
    verify_ecdsa,
)

SOURCE = "56860, ID block"
ECDSA_P384_SHA384 = 1
P384 = 2
KEY_BYTES, SIGNATURE_BYTES = 0x404, 0x200


class IdBlock(Layout, size=0x60):
    """What the owner expects of a launch; the ID key signs it."""

    launch_digest = raw_bytes(0x00, 48, source=SOURCE)
    family_id = raw_bytes(0x30, 16, source=SOURCE)
    image_id = raw_bytes(0x40, 16, source=SOURCE)
    block_version = u32(0x50, values=(1,), source=SOURCE)
    guest_svn = u32(0x54, source=SOURCE)
    policy = u64(0x58, doc="see GuestPolicy", source=SOURCE)


class IdAuth(Layout, size=0x1000):
    """Keys and signatures of an ID block; the author key, if there is one, signs the ID key."""

    id_key_algo = u32(0x000, values=(ECDSA_P384_SHA384,), source=SOURCE)
    auth_key_algo = u32(0x004, values=(0, ECDSA_P384_SHA384), source=SOURCE)
    reserved_8 = raw_bytes(0x008, 0x38, must_be_zero=True, source=SOURCE)
    id_block_sig = raw_bytes(0x040, SIGNATURE_BYTES, source=SOURCE)
    id_key = raw_bytes(0x240, KEY_BYTES, source=SOURCE)
    reserved_644 = raw_bytes(0x644, 0x3C, must_be_zero=True, source=SOURCE)
    id_key_sig = raw_bytes(0x680, SIGNATURE_BYTES, source=SOURCE)
    author_key = raw_bytes(0x880, KEY_BYTES, source=SOURCE)
    reserved_c84 = raw_bytes(0xC84, 0x37C, must_be_zero=True, source=SOURCE)


def key_digest(key: bytes) -> bytes:
    """What a report says of an ID or author key: SHA-384 of its 404h bytes."""
    return hashlib.sha384(key).digest()


def make_id_auth(block: bytes, *, id_key: int, author_key: int | None = None) -> bytes:
    """The authentication of ID block `block` by the private keys `id_key` and, if given, `author_key`."""
    public = pubkey_bytes(public_point(id_key))
    fields: dict[str, int | bytes] = {
        "id_key_algo": ECDSA_P384_SHA384,
        "id_block_sig": sign_ecdsa(id_key, block, Algorithm.ECDSA_SHA384),
        "id_key": public,
    }
    if author_key is not None:
        fields |= {
            "auth_key_algo": ECDSA_P384_SHA384,
            "id_key_sig": sign_ecdsa(author_key, public, Algorithm.ECDSA_SHA384),
            "author_key": pubkey_bytes(public_point(author_key)),
        }
    return IdAuth.build(**fields)


def read_id_block(data: bytes, name: str = "ID block") -> IdBlock:
    """The ID block in file `name`. Raises `FormatError`."""
    return read_file_part(IdBlock, data, name)


def read_id_auth(data: bytes, name: str = "ID authentication") -> IdAuth:
    """The ID authentication in file `name`, reserved bytes zero. Raises `FormatError`."""
    return read_file_part(IdAuth, data, name)


def check_id_block(block: bytes, auth: bytes) -> list[Check]:
    """Algorithms, curves, signatures and reserved bytes of an ID block and its authentication.

    A signature's line says whether the numbers verify, whatever the curve's number beside them; that has its own line.
    """
    keys = IdAuth.from_bytes(auth)
    checks = [
        Check("ID authentication", problem.field, problem.expected, f"{problem.found:#x}"[:34], False, SOURCE)
        for problem in validate(IdAuth, auth)
        if problem.rule == "reserved"
    ]
    checks += _key_checks("ID key", keys.id_key_algo, keys.id_key, "ID block", block, keys.id_block_sig)
    if keys.auth_key_algo or any(keys.author_key):
        checks += _key_checks("author key", keys.auth_key_algo, keys.author_key, "ID key", keys.id_key, keys.id_key_sig)
    return checks


def _key_checks(key_name: str, algorithm: int, key: bytes, what: str, message: bytes, signature: bytes) -> list[Check]:
    fields = EcPublicKey.from_bytes(key)
    point = Point(int.from_bytes(fields.qx, "little"), int.from_bytes(fields.qy, "little"))
    verified = verify_ecdsa(point, message, signature, Algorithm.ECDSA_SHA384)
    fill = not any(signature[144:]) and not any(fields.reserved_94)
    return [
        Check(key_name, "algorithm", "1 (ECDSA P-384 SHA-384)", str(algorithm), algorithm == ECDSA_P384_SHA384, SOURCE),
        Check(key_name, "curve", "2 (P-384)", str(fields.curve), fields.curve == P384, SOURCE),
        Check(what, f"signature by {key_name}", "verifies", _says(verified), verified, SOURCE),
        Check(what, "unused bytes", "zero", "zero" if fill else "others", fill, SOURCE),
    ]


def _says(verified: bool) -> str:  # noqa: FBT001  # one word for one result
    return "verifies" if verified else "does not verify"
