"""Who signed whom: signatures between certificates, and the check of a platform's whole chain."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from sevlab.plugins.sev.certificates import (
    SIGNED_BYTES,
    Algorithm,
    AmdCertificate,
    Certificate,
    SevCertificate,
    Slot,
    Usage,
    slot_of,
    usage_of,
)
from sevlab.plugins.sev.checks import Check
from sevlab.plugins.sev.crypto import Point
from sevlab.plugins.sev.signatures import (
    pubkey_bytes,
    pubkey_point,
    rsa_pss_verifies,
    sign_ecdsa,
    verify_ecdsa,
)

SOURCE = "55766, appendix C"

ARK_ROOTS = {
    "9914e78ad0a8260245244d2580195e044a1bc1c9ef83d6bbc0c86d9b563abca0": "Naples",
    "063b4e93150fbe63e054a10fd0958e4948cff5af02e7acd5923fa23ce1395df3": "Rome",
    "87dbd40540237df39c072efc2ba91ec23a0ee57e2af074dde844a4614dc4577b": "Milan",
    "a18c064225a3d841a7c14a2b4835687972879ebebf468a890480faf1690e3152": "Genoa",
    "c9233c3de0a0cb2d48b2c6fefd4fd901413fcd0cd886cf91e03e2dbd06fa9266": "Turin",
}
"""SHA-256 of the modulus (little-endian bytes) of AMD's root keys. Source: AMD's certificates as in virtee/sev."""

ECDSA = (Algorithm.ECDSA_SHA256, Algorithm.ECDSA_SHA384)


def rsa_algorithm(modulus_bits: int) -> Algorithm:
    """What a key of AMD's signs with: SHA-256 for 2048 bits, SHA-384 for 4096. Source: AMD-ASPFW sev_cert.c."""
    return Algorithm.RSA_SHA384 if modulus_bits == 4096 else Algorithm.RSA_SHA256


def signature_verifies(signer: Certificate, subject: Certificate) -> bool:
    """Whether `signer`'s key made a signature of `subject`, in the role and with the algorithm that its slot says."""
    if isinstance(subject, AmdCertificate):
        return isinstance(signer, AmdCertificate) and _amd_signed_amd(signer, subject)
    return any(slot_verifies(signer, subject, slot) for slot in Slot)


def slot_verifies(signer: Certificate, subject: SevCertificate, slot: Slot) -> bool:
    """Whether the signature in `slot` of `subject` is one by `signer`."""
    usage, algorithm, signature = slot_of(subject, slot)
    signed = subject.to_bytes()[:SIGNED_BYTES]
    if usage != usage_of(signer):
        return False
    if isinstance(signer, AmdCertificate):
        if usage != Usage.ASK or algorithm != rsa_algorithm(signer.header.modulus_bits):
            return False
        width = signer.header.modulus_bits // 8
        big_endian = signature[:width][::-1]
        unused = not any(signature[width:])
        return unused and rsa_pss_verifies(signer.modulus, signer.exponent, signed, big_endian, algorithm)
    point = pubkey_point(signer.pubkey)
    return (
        point is not None
        and algorithm in ECDSA
        and algorithm == signer.pubkey_algo
        and verify_ecdsa(point, signed, signature, algorithm)
    )


def _amd_signed_amd(signer: AmdCertificate, subject: AmdCertificate) -> bool:
    return (
        signer.usage is Usage.ARK
        and subject.header.certifying_id == signer.header.key_id
        and len(subject.signature) == signer.header.modulus_bits // 8
        and rsa_pss_verifies(
            signer.modulus,
            signer.exponent,
            subject.signed_bytes,
            subject.signature[::-1],
            rsa_algorithm(signer.header.modulus_bits),
        )
    )


# Building ---------------------------------------------------------------------------------------------------------

KEY_ALGORITHM = {
    Usage.OCA: Algorithm.ECDSA_SHA256,
    Usage.CEK: Algorithm.ECDSA_SHA256,
    Usage.PEK: Algorithm.ECDSA_SHA256,
    Usage.PDH: Algorithm.ECDH_SHA256,
}


def make_certificate(usage: Usage, public: Point, *, api: tuple[int, int]) -> SevCertificate:
    """The certificate of a device's key with both slots unused, as PEK_CSR gives it for the PEK."""
    return SevCertificate.from_bytes(
        SevCertificate.build(
            certificate_version=1,
            api_major=api[0],
            api_minor=api[1],
            pubkey_usage=usage,
            pubkey_algo=KEY_ALGORITHM[usage],
            pubkey=pubkey_bytes(public),
            sig_1_usage=Usage.INVALID,
            sig_2_usage=Usage.INVALID,
        )
    )


def with_signature(
    certificate: SevCertificate, slot: Slot, usage: Usage, algorithm: int, signature: bytes
) -> SevCertificate:
    """`certificate` with a signature (0x200 bytes) in a slot."""
    if slot is Slot.FIRST:
        return certificate.replace(sig_1_usage=usage, sig_1_algo=algorithm, sig_1=signature)
    return certificate.replace(sig_2_usage=usage, sig_2_algo=algorithm, sig_2=signature)


def signed_by(certificate: SevCertificate, slot: Slot, usage: Usage, scalar: int) -> SevCertificate:
    """`certificate` with the ECDSA-SHA256 signature of the key `scalar`, whose role is `usage`, in a slot."""
    signature = sign_ecdsa(scalar, certificate.to_bytes()[:SIGNED_BYTES])
    return with_signature(certificate, slot, usage, Algorithm.ECDSA_SHA256, signature)


# Checking ---------------------------------------------------------------------------------------------------------

SIGNERS = {
    Usage.ARK: (Usage.ARK,),
    Usage.ASK: (Usage.ARK,),
    Usage.CEK: (Usage.ASK,),
    Usage.OCA: (Usage.OCA,),
    Usage.PEK: (Usage.CEK, Usage.OCA),
    Usage.PDH: (Usage.PEK,),
}
"""Who signs whom, in the order in which a chain is checked. Source: 55766, appendix C."""


def root_name(ark: AmdCertificate) -> str:
    """The generation whose root key `ark` holds, "" for a key that is not AMD's."""
    modulus = ark.modulus.to_bytes(ark.header.modulus_bits // 8, "little")
    return ARK_ROOTS.get(hashlib.sha256(modulus).hexdigest(), "")


def verify_chain(certificates: Iterable[Certificate], *, trusted_ark: AmdCertificate | None = None) -> list[Check]:
    """Check ARK, ASK, CEK, OCA, PEK and PDH of one platform: presence, key, every signature, and the root.

    The root must be AMD's, or be `trusted_ark`. A self-signed root proves nothing by itself.
    """
    by_usage: dict[Usage, Certificate] = {}
    checks = []
    for certificate in certificates:
        usage = usage_of(certificate)
        if usage in by_usage:
            checks.append(Check(usage.name, "certificate", "once", "given twice", False, SOURCE))
        by_usage[usage] = certificate
    for usage, signers in SIGNERS.items():
        subject = by_usage.get(usage)
        if subject is None:
            checks.append(Check(usage.name, "certificate", "present", "missing", False, SOURCE))
            continue
        if isinstance(subject, SevCertificate):
            checks += _key_checks(usage, subject)
        elif usage is Usage.ARK:
            checks.append(_root_check(subject, trusted_ark))
        for signer in signers:
            signed = signer in by_usage and signature_verifies(by_usage[signer], subject)
            got = "verifies" if signed else "does not verify" if signer in by_usage else "signer missing"
            checks.append(Check(usage.name, f"signature by {signer.name}", "verifies", got, signed, SOURCE))
    return checks


def _key_checks(usage: Usage, certificate: SevCertificate) -> list[Check]:
    expected = KEY_ALGORITHM[usage]
    algorithm = Check(
        usage.name,
        "pubkey_algo",
        f"{expected:#x} ({expected.name})",
        f"{certificate.pubkey_algo:#x}",
        certificate.pubkey_algo == expected,
        SOURCE,
    )
    on_curve = pubkey_point(certificate.pubkey) is not None
    key = Check(usage.name, "pubkey", "a point of P-384", "yes" if on_curve else "no", on_curve, SOURCE)
    return [algorithm, key]


def _root_check(ark: AmdCertificate, trusted: AmdCertificate | None) -> Check:
    name = root_name(ark)
    if trusted is not None:
        same = trusted == ark
        return Check("ARK", "root", "the given root", "the same" if same else "another", same, SOURCE)
    got = f"AMD's for {name}" if name else "an unknown key"
    return Check("ARK", "root", "a root key of AMD", got, bool(name), "AMD KDS; certificates published in virtee/sev")
