"""RSA-PSS and ECDSA as certificates and reports store them.

Signatures are deterministic: ECDSA nonces follow RFC 6979, and the salt of a PSS signature is derived from key and
message in the same spirit, because a random one would differ in each run.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import NamedTuple

from sevlab.plugins.sev.certificates import COORDINATE_BYTES, Algorithm, Curve, EcdsaSignature, EcPublicKey
from sevlab.plugins.sev.crypto import Point, ecdsa_sign, ecdsa_verify, public_key

RSA_EXPONENT = 65537


def hash_bits(algorithm: int) -> int:
    """Width of the hash that an algorithm number names."""
    return 384 if algorithm & 0x100 else 256


# Elliptic curves --------------------------------------------------------------------------------------------------


def sign_ecdsa(scalar: int, message: bytes, algorithm: int = Algorithm.ECDSA_SHA256) -> bytes:
    """The deterministic signature of `message`: 0x200 bytes, an `EcdsaSignature`. Source: RFC 6979."""
    r, s = ecdsa_sign(scalar, message, hash_bits=hash_bits(algorithm))
    return EcdsaSignature.build(r=r.to_bytes(COORDINATE_BYTES, "little"), s=s.to_bytes(COORDINATE_BYTES, "little"))


def verify_ecdsa(point: Point, message: bytes, signature: bytes, algorithm: int = Algorithm.ECDSA_SHA256) -> bool:
    """Whether `signature` (an `EcdsaSignature`) is the key's at `point` for `message`; bytes after s are ignored."""
    values = EcdsaSignature.from_bytes(signature)
    numbers = int.from_bytes(values.r, "little"), int.from_bytes(values.s, "little")
    return ecdsa_verify(point, message, numbers, hash_bits=hash_bits(algorithm))


def pubkey_bytes(point: Point) -> bytes:
    """The public key field of a certificate."""
    x, y = (number.to_bytes(COORDINATE_BYTES, "little") for number in point)
    return EcPublicKey.build(curve=Curve.P384, qx=x, qy=y)


def pubkey_point(pubkey: bytes) -> Point | None:
    """The point in a certificate's public key field; None when it names another curve or is not on P-384."""
    key = EcPublicKey.from_bytes(pubkey)
    point = Point(int.from_bytes(key.qx, "little"), int.from_bytes(key.qy, "little"))
    return point if key.curve == Curve.P384 and public_key(point) is not None else None


# RSA --------------------------------------------------------------------------------------------------------------


class RsaKey(NamedTuple):
    """A private RSA key by its primes; the public exponent is 65537."""

    p: int
    q: int

    @property
    def modulus(self) -> int:
        """The public number."""
        return self.p * self.q

    @property
    def private_exponent(self) -> int:
        """The inverse of the public exponent."""
        return pow(RSA_EXPONENT, -1, (self.p - 1) * (self.q - 1))


def rsa_pss_verifies(modulus: int, exponent: int, message: bytes, signature: bytes, algorithm: int) -> bool:
    """Whether `signature` (big-endian, as wide as the modulus) is a PSS signature of `message`.

    MGF1 and the salt's length follow the hash, as in AMD's certificates.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding, rsa

    try:
        key = rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except ValueError:
        return False
    digest = hashes.SHA384() if hash_bits(algorithm) == 384 else hashes.SHA256()
    try:
        key.verify(signature, message, padding.PSS(padding.MGF1(digest), digest.digest_size), digest)
    except InvalidSignature:
        return False
    return True


def rsa_pss_sign(key: RsaKey, message: bytes, algorithm: int) -> bytes:
    """The PSS signature of `message`, big-endian, with a salt derived from key and message.

    Source: RFC 8017, 8.1.1 and 9.1.1 (EMSA-PSS).
    """
    hash_name = f"sha{hash_bits(algorithm)}"
    hash_bytes = hashlib.new(hash_name).digest_size
    modulus_bits = key.modulus.bit_length()
    encoded_bytes = -(-(modulus_bits - 1) // 8)
    digest = hashlib.new(hash_name, message).digest()
    salt = hmac.digest(key.p.to_bytes(modulus_bits // 8, "big"), digest, hash_name)
    salted = hashlib.new(hash_name, bytes(8) + digest + salt).digest()
    block = bytes(encoded_bytes - 2 * hash_bytes - 2) + b"\1" + salt
    masked = bytearray(a ^ b for a, b in zip(block, _mgf1(salted, len(block), hash_name), strict=True))
    masked[0] &= 0xFF >> 8 * encoded_bytes - (modulus_bits - 1)
    number = int.from_bytes(masked + salted + b"\xbc", "big")
    return _rsa_private(key, number).to_bytes(modulus_bits // 8, "big")


def _mgf1(seed: bytes, length_bytes: int, hash_name: str) -> bytes:
    blocks = range(-(-length_bytes // hashlib.new(hash_name).digest_size))
    mask = b"".join(hashlib.new(hash_name, seed + block.to_bytes(4, "big")).digest() for block in blocks)
    return mask[:length_bytes]


def _rsa_private(key: RsaKey, number: int) -> int:
    """`number` to the private exponent, by the Chinese remainder theorem."""
    exponent = key.private_exponent
    at_p = pow(number, exponent % (key.p - 1), key.p)
    at_q = pow(number, exponent % (key.q - 1), key.q)
    return at_q + key.q * ((at_p - at_q) * pow(key.q, -1, key.p) % key.p)
