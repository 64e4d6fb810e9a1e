"""How the firmware checks certificates, with its statuses and in its order.

Verification for people, with a line for each check, is `chain`; here is what a command answers.
Source: AMD-ASPFW sev_uapp/src/sev_cert.c, sev_cert_validate; amd_cert.c.
"""

from __future__ import annotations

from sevlab.core.errors import FormatError
from sevlab.plugins.sev.certificates import (
    Algorithm,
    AmdCertificate,
    Certificate,
    SevCertificate,
    Slot,
    Usage,
    parse_certificates,
    slot_of,
    usage_of,
)
from sevlab.plugins.sev.chain import SIGNERS, root_name, signature_verifies, slot_verifies
from sevlab.plugins.sev.numbers import Status
from sevlab.plugins.sev.signatures import pubkey_point
from sevlab.plugins.sev.vendor import vendor_certificate

EC_ALGORITHMS = (Algorithm.ECDSA_SHA256, Algorithm.ECDH_SHA256, Algorithm.ECDSA_SHA384, Algorithm.ECDH_SHA384)


def _key_is_valid(certificate: Certificate) -> bool:
    """The usage is one of the table's, and the key is on its curve."""
    if isinstance(certificate, AmdCertificate):
        return True
    if usage_of(certificate) is Usage.INVALID or certificate.pubkey_algo not in EC_ALGORITHMS:
        return False
    return pubkey_point(certificate.pubkey) is not None


def _algorithm(certificate: Certificate) -> int:
    if isinstance(certificate, AmdCertificate):
        return Algorithm.RSA_SHA384 if certificate.header.modulus_bits == 4096 else Algorithm.RSA_SHA256
    return certificate.pubkey_algo


def validate(certificate: SevCertificate, signer: Certificate) -> Status:
    """Check a device's certificate against its signer's key: signature first, then the body, then the roles."""
    if not _key_is_valid(signer):
        return Status.INVALID_CERTIFICATE
    status = _signature(certificate, signer)
    if status:
        return status
    if certificate.certificate_version != 1 or not _key_is_valid(certificate):
        return Status.INVALID_CERTIFICATE
    legal = usage_of(signer) in SIGNERS.get(usage_of(certificate), ())
    return Status.SUCCESS if legal else Status.INVALID_CERTIFICATE


def _signature(certificate: SevCertificate, signer: Certificate) -> Status:
    """The last slot that could be the signer's decides; a slot that is half used spoils the certificate."""
    status = Status.INVALID_CERTIFICATE
    for slot in Slot:
        usage, algorithm, _ = slot_of(certificate, slot)
        if (usage == Usage.INVALID) != (algorithm == Algorithm.INVALID):
            return Status.BAD_SIGNATURE
        if usage == usage_of(signer) and algorithm == _algorithm(signer):
            if algorithm in (Algorithm.ECDH_SHA256, Algorithm.ECDH_SHA384):
                return Status.UNSUPPORTED
            status = Status.SUCCESS if slot_verifies(signer, certificate, slot) else Status.BAD_SIGNATURE
    return status


AMD_CHAIN_BYTES = (2 * 0x340, 2 * 0x640)
"""ASK and ARK with keys of 2048 or of 4096 bits."""


def amd_chain(data: bytes, generation: str) -> AmdCertificate | Status:
    """The ASK of ASK ++ ARK, when the ARK is the root fused into parts of this generation and has signed it.

    A simulated platform trusts AMD's root of its generation and the simulated vendor's. Source: AMD-ASPFW
    sev_uapp/src/amd_cert.c, amd_cert_validate_ark.
    """
    try:
        parsed = [certificate for _, certificate in parse_certificates(data, "AMD chain")]
    except FormatError:
        return Status.INVALID_CERTIFICATE
    match parsed:
        case [AmdCertificate() as ask, AmdCertificate() as ark]:
            pass
        case _:
            return Status.INVALID_CERTIFICATE
    if ark.usage is not Usage.ARK or ask.usage is not Usage.ASK:
        return Status.INVALID_CERTIFICATE
    if not signature_verifies(ark, ark):
        return Status.BAD_SIGNATURE
    simulated = vendor_certificate(generation, Usage.ARK).modulus == ark.modulus
    if not simulated and root_name(ark).lower() != generation:
        return Status.INVALID_CERTIFICATE
    return ask if signature_verifies(ark, ask) else Status.BAD_SIGNATURE
