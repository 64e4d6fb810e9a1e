"""The simulated chain behind a report: ARK, ASK, ASVK as certificates, and VCEK and VLEK for a chip or a provider.

Everything is deterministic: the vendor's keys are those of `sevlab.plugins.sev`, the endorsement keys are the
caller's, dates are fixed. Names and extensions are those of AMD's certificates, so that other tools read them; only
the root key tells them apart. Source: 57230; AMD's certificates of Milan, Genoa and Turin.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from sevlab.plugins.sev import RSA_EXPONENT, Algorithm, Point, RsaKey, rsa_pss_sign, sign_ecdsa, vendor_key
from sevlab.plugins.snp.report import SIGNED_BYTES, AttestationReport
from sevlab.plugins.snp.tcb import Tcb
from sevlab.plugins.snp.x509 import (
    CSP_ID,
    HWID,
    PRODUCT_NAME,
    PSS_DER_DEFAULT_TRAILER,
    SPL_OIDS,
    STRUCT_VERSION,
    assemble,
)

if TYPE_CHECKING:
    from cryptography.x509 import CertificateBuilder, ExtensionType

NOT_BEFORE = datetime(2024, 1, 1, tzinfo=UTC)
NOT_AFTER = datetime(2045, 1, 1, tzinfo=UTC)

PRODUCTS = {"milan": "Milan-B0", "genoa": "Genoa", "turin": "Turin"}
"""The product name in a VCEK. Source: AMD's certificates."""

CA_SERIALS = {"milan": 0x10000, "genoa": 0x20000, "turin": 0x30000}
"""Serial number of the ARK; the ASK's is one more, the ASVK's 101h more. Source: AMD's certificates."""

CA_NAMES = {"ark": "ARK-{}", "ask": "SEV-{}", "asvk": "SEV-VLEK-{}"}


@cache
def ca_certificate(generation: str, role: str) -> bytes:
    """DER of the simulated CA certificate of `role` ("ark", "ask", "asvk"), issued by the ARK.

    `generation`: "milan", "genoa" or "turin".
    """
    from cryptography import x509

    product = generation.title()
    serial = CA_SERIALS[generation] + {"ark": 0, "ask": 1, "asvk": 0x101}[role]
    builder = _builder(CA_NAMES[role].format(product), CA_NAMES["ark"].format(product), serial)
    public = _rsa_public(vendor_key(generation, role))
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=role == "ark",
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        builder.public_key(public)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None if role == "ark" else 0), critical=True)
    )
    return _signed(builder, vendor_key(generation, "ark"))


def vcek_certificate(generation: str, public: Point, *, tcb: Tcb, chip_id: bytes) -> bytes:
    """DER of the VCEK certificate of a chip at a TCB.

    `public`: the key derived for that TCB; `chip_id`: the 64 bytes of a report, of which Turin uses 8.
    """
    hwid = chip_id[:8] if generation == "turin" else chip_id
    return _endorsement(generation, "SEV-VCEK", "ask", public, tcb, {HWID: hwid})


def vlek_certificate(generation: str, public: Point, *, tcb: Tcb, csp_id: str) -> bytes:
    """DER of the VLEK certificate of a provider at a TCB; `csp_id` is ASCII of at most 127 letters."""
    return _endorsement(generation, "SEV-VLEK", "asvk", public, tcb, {CSP_ID: _ia5(csp_id)})


def sign_report(scalar: int, body: bytes) -> bytes:
    """The whole report: its first 2A0h bytes and the signature of the VCEK or VLEK whose private key is `scalar`."""
    report = AttestationReport.SIZE - SIGNED_BYTES
    return body[:SIGNED_BYTES] + sign_ecdsa(scalar, body[:SIGNED_BYTES], Algorithm.ECDSA_SHA384)[:report]


def _endorsement(generation: str, subject: str, issuer: str, public: Point, tcb: Tcb, last: dict[str, bytes]) -> bytes:
    from cryptography.hazmat.primitives.asymmetric import ec

    turin = generation == "turin"
    levels = dict.fromkeys(SPL_OIDS, 0) | {name: level or 0 for name, level in tcb._asdict().items()}
    del levels["spl4" if turin else "fmc"]
    values = {STRUCT_VERSION: _integer(int(turin)), PRODUCT_NAME: _ia5(PRODUCTS[generation])}
    values |= {SPL_OIDS[name]: _integer(level) for name, level in levels.items()}
    builder = _builder(subject, CA_NAMES[issuer].format(generation.title()), 1)
    key = ec.EllipticCurvePublicNumbers(public.x, public.y, ec.SECP384R1()).public_key()
    builder = builder.public_key(key)
    for oid, value in (values | last).items():
        builder = builder.add_extension(_amd_extension(oid, value), critical=False)
    return _signed(builder, vendor_key(generation, issuer), serial_zero=True)


def _builder(subject: str, issuer: str, serial: int) -> CertificateBuilder:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    def name(common: str) -> Any:
        parts = (
            (NameOID.ORGANIZATIONAL_UNIT_NAME, "Engineering"),
            (NameOID.COUNTRY_NAME, "US"),
            (NameOID.LOCALITY_NAME, "Santa Clara"),
            (NameOID.STATE_OR_PROVINCE_NAME, "CA"),
            (NameOID.ORGANIZATION_NAME, "Advanced Micro Devices"),
            (NameOID.COMMON_NAME, common),
        )
        return x509.Name([x509.NameAttribute(oid, text) for oid, text in parts])

    return (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .serial_number(serial)
        .not_valid_before(NOT_BEFORE)
        .not_valid_after(NOT_AFTER)
    )


def _amd_extension(oid: str, value: bytes) -> ExtensionType:
    from cryptography import x509

    return x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value)


def _integer(number: int) -> bytes:
    body = number.to_bytes(number.bit_length() // 8 + 1, "big")
    return bytes((2, len(body))) + body


def _ia5(text: str) -> bytes:
    return bytes((0x16, len(text))) + text.encode("ascii")


def _rsa_public(key: RsaKey) -> Any:
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.RSAPublicNumbers(RSA_EXPONENT, key.modulus).public_key()


VERSION_DER = bytes.fromhex("a003020102")


def _signed(builder: CertificateBuilder, issuer: RsaKey, *, serial_zero: bool = False) -> bytes:
    """The certificate with a deterministic signature in place of the library's, whose salt is random.

    `serial_zero` puts 0 in place of serial number 1: AMD's VCEKs have it, and the library refuses to make it.
    """
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    digest = hashes.SHA384()
    pss = padding.PSS(padding.MGF1(digest), digest.digest_size)
    certificate = builder.sign(_rsa_private(issuer), digest, rsa_padding=pss)
    signed = certificate.tbs_certificate_bytes
    assert PSS_DER_DEFAULT_TRAILER in signed
    start = signed.index(VERSION_DER) + len(VERSION_DER)
    if serial_zero:
        signed = signed[:start] + bytes.fromhex("020100") + signed[start + 3 :]
    return assemble(signed, PSS_DER_DEFAULT_TRAILER, rsa_pss_sign(issuer, signed, Algorithm.RSA_SHA384))


def _rsa_private(key: RsaKey) -> Any:
    from cryptography.hazmat.primitives.asymmetric import rsa

    p, q, d = key.p, key.q, key.private_exponent
    numbers = rsa.RSAPublicNumbers(RSA_EXPONENT, key.modulus)
    private = rsa.RSAPrivateNumbers(p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p), numbers)
    return private.private_key(unsafe_skip_rsa_key_validation=True)
