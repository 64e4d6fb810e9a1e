"""The cryptography of SEV's sessions, measurements and packets; nothing here draws a random byte.

Traps that cost others days: the KDF's counter and length are little-endian while Z is big-endian; the wrap MAC does
not cover the IV; the launch measure starts with a context byte and the API version.

Source: 55766, appendix "Key derivation" and the commands' sections; sev-tool src/crypto.cpp; virtee/sev src/session.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache, lru_cache
from hmac import compare_digest, digest
from typing import TYPE_CHECKING, Any, NamedTuple

from sevlab.plugins.sev.layout import (
    FIELD_BYTES,
    KEY_BYTES,
    MAC_BYTES,
    PacketHeader,
    Session,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.hashes import HashAlgorithm

LABEL_MASTER_SECRET = b"sev-master-secret"
LABEL_KEK = b"sev-kek"
LABEL_KIK = b"sev-kik"
LABEL_CEK = b"sev-chip-endorsement-key"
LABEL_MEMORY_KEY = b"sev-vm-encryption-key-0\0"
"""Carries its own NUL, unlike the others. Source: AMD-ASPFW sev_uapp, UMC key."""

KEY_SEED_BYTES = 56
"""Bytes from which a P-384 scalar is made: 64 more bits than the order. Source: FIPS 186-4, B.4.1."""


class Context(IntEnum):
    """First byte of what a MAC covers. Source: 55766, context values."""

    LAUNCH_SECRET = 1
    DATA = 2
    VMSA = 3
    LAUNCH_MEASURE = 4


class TransportKeys(NamedTuple):
    """TEK (encrypts) and TIK (authenticates), 16 bytes each."""

    tek: bytes
    tik: bytes


class Point(NamedTuple):
    """Affine coordinates on P-384."""

    x: int
    y: int


def kdf(key: bytes, label: bytes, context: bytes, length_bytes: int) -> bytes:
    """`length_bytes` bytes from `key`: SP 800-108 in counter mode with HMAC-SHA256, counter and length little-endian.

    Source: NIST SP 800-108, 5.1; 55766, key derivation; published vector in virtee/sev src/session/key.rs.
    """
    fixed = label + b"\0" + context + (length_bytes * 8).to_bytes(4, "little")
    blocks = -(-length_bytes // MAC_BYTES)
    out = b"".join(digest(key, (n + 1).to_bytes(4, "little") + fixed, "sha256") for n in range(blocks))
    return out[:length_bytes]


def aes_ctr(key: bytes, iv: bytes, data: bytes) -> bytes:
    """AES in counter mode, both directions; `iv` is the first counter block (16 bytes, big-endian increment)."""
    cipher, aes, ctr = _cipher()
    return cipher(aes(key), ctr(iv)).encryptor().update(data)  # type: ignore[no-any-return]


@cache
def _cipher() -> tuple[Any, Any, Any]:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return Cipher, algorithms.AES, modes.CTR


# Sessions -----------------------------------------------------------------------------------------------------------


def master_secret(shared_x: bytes, nonce: bytes) -> bytes:
    """The 16-byte master secret of a session; `shared_x` is the ECDH result, 48 bytes big-endian for P-384."""
    return kdf(shared_x, LABEL_MASTER_SECRET, nonce, KEY_BYTES)


def policy_mac(tik: bytes, policy: int) -> bytes:
    """The owner's MAC of the guest policy (32 bits)."""
    return digest(tik, policy.to_bytes(4, "little"), "sha256")


def wrap_session(shared_x: bytes, nonce: bytes, wrap_iv: bytes, keys: TransportKeys, policy: int) -> bytes:
    """The 0x80-byte session buffer that carries `keys` to the platform. Source: 55766, LAUNCH_START."""
    master = master_secret(shared_x, nonce)
    wrap_tk = aes_ctr(kdf(master, LABEL_KEK, b"", KEY_BYTES), wrap_iv, keys.tek + keys.tik)
    return Session.build(
        nonce=nonce,
        wrap_tk=wrap_tk,
        wrap_iv=wrap_iv,
        wrap_mac=digest(kdf(master, LABEL_KIK, b"", KEY_BYTES), wrap_tk, "sha256"),
        policy_mac=policy_mac(keys.tik, policy),
    )


def unwrap_session(shared_x: bytes, session: Session) -> TransportKeys | None:
    """The transport keys of a session buffer, None when the wrap MAC is wrong; the policy MAC is checked apart."""
    master = master_secret(shared_x, session.nonce)
    mac = digest(kdf(master, LABEL_KIK, b"", KEY_BYTES), session.wrap_tk, "sha256")
    if not compare_digest(mac, session.wrap_mac):
        return None
    keys = aes_ctr(kdf(master, LABEL_KEK, b"", KEY_BYTES), session.wrap_iv, session.wrap_tk)
    return TransportKeys(keys[:KEY_BYTES], keys[KEY_BYTES:])


def policy_mac_is_right(tik: bytes, policy: int, mac: bytes) -> bool:
    """Whether `mac` is the owner's MAC of `policy`."""
    return compare_digest(policy_mac(tik, policy), mac)


# Measurement and packets --------------------------------------------------------------------------------------------


def launch_measure(
    tik: bytes, *, api: tuple[int, int], build: int, policy: int, launch_digest: bytes, mnonce: bytes
) -> bytes:
    """The 32-byte measure of LAUNCH_MEASURE; `launch_digest` is SHA-256 of everything loaded, in order.

    Firmware before API 0.17 left out context, version and build; no such firmware is modelled.
    Source: 55766, LAUNCH_MEASURE; AMDESE/sev-tool src/commands.cpp, calc_measurement.
    """
    head = bytes((Context.LAUNCH_MEASURE, *api, build))
    return digest(tik, head + policy.to_bytes(4, "little") + launch_digest + mnonce, "sha256")


def packet_mac(
    tik: bytes, context: Context, *, flags: int, iv: bytes, guest_bytes: int, ciphertext: bytes, measure: bytes = b""
) -> bytes:
    """The MAC of a packet header.

    `guest_bytes` is the length of the plaintext; a launch secret is bound to the guest's `measure`, data and VMSA
    packets are not. Source: 55766, LAUNCH_SECRET and SEND_UPDATE_DATA.
    """
    head = bytes((context,)) + flags.to_bytes(4, "little") + iv
    lengths = guest_bytes.to_bytes(4, "little") + len(ciphertext).to_bytes(4, "little")
    return digest(tik, head + lengths + ciphertext + measure, "sha256")


def seal_packet(
    keys: TransportKeys, context: Context, plaintext: bytes, *, iv: bytes, measure: bytes = b"", flags: int = 0
) -> tuple[bytes, bytes]:
    """(header, ciphertext) of a packet."""
    ciphertext = aes_ctr(keys.tek, iv, plaintext)
    mac = packet_mac(
        keys.tik, context, flags=flags, iv=iv, guest_bytes=len(plaintext), ciphertext=ciphertext, measure=measure
    )
    return flags.to_bytes(4, "little") + PacketHeader.build(iv=iv, mac=mac)[4:], ciphertext


def open_packet(
    keys: TransportKeys, context: Context, header: bytes, ciphertext: bytes, *, measure: bytes = b""
) -> bytes | None:
    """The plaintext of a packet, None when its MAC is wrong."""
    fields = PacketHeader.from_bytes(header)
    flags = int.from_bytes(header[:4], "little")
    mac = packet_mac(
        keys.tik,
        context,
        flags=flags,
        iv=fields.iv,
        guest_bytes=len(ciphertext),
        ciphertext=ciphertext,
        measure=measure,
    )
    return aes_ctr(keys.tek, fields.iv, ciphertext) if compare_digest(mac, fields.mac) else None


# Offline encryption -------------------------------------------------------------------------------------------------


def _nonce(iv: int) -> bytes:
    """The 96-bit nonce of a 64-bit counter; on which side the zeros stand is UNVERIFIED."""
    return iv.to_bytes(12, "little")


def gcm_seal(key: bytes, iv: int, associated: bytes, plaintext: bytes) -> tuple[bytes, bytes]:
    """(ciphertext, 16-byte tag) of AES-256-GCM with a counter as nonce. Source: AMD-ASPFW sev_mcmd.c, SWAP_OUT."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    sealed = AESGCM(key).encrypt(_nonce(iv), plaintext, associated)
    return sealed[:-16], sealed[-16:]


def gcm_open(key: bytes, iv: int, associated: bytes, ciphertext: bytes, tag: bytes) -> bytes | None:
    """The plaintext, None when the tag is wrong."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(key).decrypt(_nonce(iv), ciphertext + tag, associated)
    except InvalidTag:
        return None


# P-384 --------------------------------------------------------------------------------------------------------------


_remembered = lru_cache(maxsize=512)
"""For what depends on its arguments alone: a reset machine makes the same keys and meets the same points again, and a
fuzzer resets it thousands of times a second."""


@cache
def _ec() -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec


def _sha(hash_bits: int) -> HashAlgorithm:
    from cryptography.hazmat.primitives import hashes

    return hashes.SHA384() if hash_bits == 384 else hashes.SHA256()


ORDER = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973",
    16,
)
"""Order of P-384. Source: FIPS 186-4, D.1.2.4."""


def scalar_from_seed(seed: bytes) -> int:
    """A private scalar from 56 random bytes: (c mod (n - 1)) + 1. Source: FIPS 186-4, B.4.1 (extra random bits)."""
    return int.from_bytes(seed, "big") % (ORDER - 1) + 1


def private_key(scalar: int) -> EllipticCurvePrivateKey:
    """The key object of a scalar between 1 and the order."""
    return _ec().derive_private_key(scalar, _ec().SECP384R1())  # type: ignore[no-any-return]


@_remembered
def public_point(scalar: int) -> Point:
    """The public point of a private scalar."""
    numbers = private_key(scalar).public_key().public_numbers()
    return Point(numbers.x, numbers.y)


@_remembered
def public_key(point: Point) -> EllipticCurvePublicKey | None:
    """The key object of a point, None when it is not on the curve (or the point at infinity, written 0, 0)."""
    try:
        return _ec().EllipticCurvePublicNumbers(*point, _ec().SECP384R1()).public_key()  # type: ignore[no-any-return]
    except ValueError:
        return None


@_remembered
def ecdh(scalar: int, point: Point) -> bytes | None:
    """The shared x coordinate, 48 bytes big-endian; None when `point` is not on the curve.

    P-384 has cofactor 1, so that every point on it has the full order and no small-order check is needed.
    Source: NIST SP 800-56A, 5.7.1.2.
    """
    other = public_key(point)
    if other is None:
        return None
    shared = private_key(scalar).exchange(_ec().ECDH(), other)
    return shared.rjust(FIELD_BYTES, b"\0")


@_remembered
def ecdsa_sign(scalar: int, message: bytes, *, hash_bits: int = 256) -> tuple[int, int]:
    """(r, s) over SHA-256 (or, for `hash_bits` 384, SHA-384) of `message`; deterministic. Source: RFC 6979."""
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    algorithm = _ec().ECDSA(_sha(hash_bits), deterministic_signing=True)
    return decode_dss_signature(private_key(scalar).sign(message, algorithm))


@_remembered
def ecdsa_verify(point: Point, message: bytes, signature: tuple[int, int], *, hash_bits: int = 256) -> bool:
    """Whether (r, s) is a signature over the hash of `message` by the key of `point`."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    key = public_key(point)
    if key is None:
        return False
    try:
        key.verify(encode_dss_signature(*signature), message, _ec().ECDSA(_sha(hash_bits)))
    except InvalidSignature:
        return False
    return True
