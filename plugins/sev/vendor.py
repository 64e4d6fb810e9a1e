"""The simulated vendor: ARK, ASK and ASVK keys of each generation, in the place of AMD's.

The keys protect nothing and everybody can compute them: each prime is the first suitable one from a number that
SHA-256 makes of the key's name, and the table holds how far it lies from there. A chain made with them is told apart
from AMD's by its root.
"""

from __future__ import annotations

import hashlib
from functools import cache

from sevlab.core.errors import ConfigError
from sevlab.plugins.sev.certificates import (
    SIGNED_BYTES,
    AmdCertificate,
    AmdCertificateHeader,
    SevCertificate,
    Slot,
    Usage,
)
from sevlab.plugins.sev.chain import rsa_algorithm, with_signature
from sevlab.plugins.sev.signatures import RSA_EXPONENT, RsaKey, rsa_pss_sign

PRIME_STEPS = {
    ("naples", "ark"): (122, 326),
    ("naples", "ask"): (1098, 141),
    ("rome", "ark"): (52, 473),
    ("rome", "ask"): (1248, 1091),
    ("milan", "ark"): (268, 873),
    ("milan", "ask"): (709, 1056),
    ("milan", "asvk"): (843, 182),
    ("genoa", "ark"): (122, 1355),
    ("genoa", "ask"): (620, 875),
    ("genoa", "asvk"): (744, 184),
    ("turin", "ark"): (1683, 295),
    ("turin", "ask"): (1872, 992),
    ("turin", "asvk"): (154, 282),
}
"""How many odd numbers before each key's primes p and q, counted from the number that their name gives."""


def key_bits(generation: str) -> int:
    """Width of the vendor's keys. Source: 55766, appendix C; certificates of Naples and Rome."""
    return 2048 if generation == "naples" else 4096


@cache
def vendor_key(generation: str, role: str) -> RsaKey:
    """The simulated key of `role` ("ark", "ask", "asvk"). Raises `ConfigError` for one that does not exist."""
    steps = PRIME_STEPS.get((generation, role))
    if steps is None:
        raise ConfigError(f"vendor key {role!r} of {generation!r}: expected one of {sorted(PRIME_STEPS)}")
    bits = key_bits(generation) // 2
    primes = [
        _first_number(f"sevlab simulated {generation} {role} {name}", bits) + 2 * step
        for name, step in zip("pq", steps, strict=True)
    ]
    return RsaKey(*primes)


def _first_number(label: str, bits: int) -> int:
    """An odd number of `bits` bits with the two highest set, made of SHA-256 of the label."""
    blocks = (hashlib.sha256(f"{label}:{number}".encode()).digest() for number in range(bits // 256))
    return int.from_bytes(b"".join(blocks), "big") | 3 << bits - 2 | 1


@cache
def vendor_certificate(generation: str, usage: Usage) -> AmdCertificate:
    """The simulated ARK (signed by itself) or ASK (signed by the ARK) in AMD's format."""
    ark = vendor_key(generation, "ark")
    subject = ark if usage is Usage.ARK else vendor_key(generation, "ask")
    bits = key_bits(generation)
    header = AmdCertificateHeader.build(
        certificate_version=1,
        key_id=_key_id(subject),
        certifying_id=_key_id(ark),
        key_usage=usage,
        pubexp_bits=bits,
        modulus_bits=bits,
    )
    unsigned = AmdCertificate(AmdCertificateHeader.from_bytes(header), RSA_EXPONENT, subject.modulus, b"")
    signature = rsa_pss_sign(ark, unsigned.signed_bytes, rsa_algorithm(bits))
    return AmdCertificate(unsigned.header, unsigned.exponent, unsigned.modulus, signature[::-1])


def _key_id(key: RsaKey) -> bytes:
    return hashlib.sha256(key.modulus.to_bytes(512, "little")).digest()[:16]


def signed_by_vendor(cek: SevCertificate, generation: str, slot: Slot = Slot.FIRST) -> SevCertificate:
    """`cek` with the ASK's signature, as AMD's key server gives it; the device itself exports it without."""
    bits = key_bits(generation)
    algorithm = rsa_algorithm(bits)
    signature = rsa_pss_sign(vendor_key(generation, "ask"), cek.to_bytes()[:SIGNED_BYTES], algorithm)
    return with_signature(cek, slot, Usage.ASK, algorithm, signature[::-1].ljust(0x200, b"\0"))
