"""The verification of a report as a list of checks."""

from __future__ import annotations

from sevlab.plugins.sev import Algorithm, Point, verify_ecdsa
from sevlab.plugins.snp.report import SIGNED_BYTES, AttestationReport
from sevlab.plugins.snp.x509 import SnpCertificate


def report_signature_verifies(report: AttestationReport, key: SnpCertificate) -> bool:
    """Whether the VCEK or VLEK `key` signed `report`. Source: 56860, ATTESTATION_REPORT.SIGNATURE."""
    from cryptography.hazmat.primitives.asymmetric import ec

    public = key.x509.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp384r1":
        return False
    numbers = public.public_numbers()
    data = report.to_bytes()
    signature = data[SIGNED_BYTES:]
    return verify_ecdsa(Point(numbers.x, numbers.y), data[:SIGNED_BYTES], signature, Algorithm.ECDSA_SHA384)
