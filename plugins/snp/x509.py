"""The X.509 certificates of SNP: ARK, ASK, ASVK, VCEK, VLEK, with AMD's extensions in the last two.

Source: 57230 (VCEK certificate and KDS interface); google/go-sev-guest kds/kds.go; AMD's certificates themselves.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from sevlab.core.errors import FormatError
from sevlab.plugins.snp.tcb import Tcb

if TYPE_CHECKING:
    from cryptography import x509 as library

SOURCE = "57230"

AMD_OID = "1.3.6.1.4.1.3704.1"
STRUCT_VERSION, PRODUCT_NAME, HWID, CSP_ID = f"{AMD_OID}.1", f"{AMD_OID}.2", f"{AMD_OID}.4", f"{AMD_OID}.5"
SPL_OIDS = {
    "bootloader": f"{AMD_OID}.3.1",
    "tee": f"{AMD_OID}.3.2",
    "snp": f"{AMD_OID}.3.3",
    "spl4": f"{AMD_OID}.3.4",
    "spl5": f"{AMD_OID}.3.5",
    "spl6": f"{AMD_OID}.3.6",
    "spl7": f"{AMD_OID}.3.7",
    "microcode": f"{AMD_OID}.3.8",
    "fmc": f"{AMD_OID}.3.9",
}
"""Security patch levels; `fmc` since Turin, `spl4` before it."""

RSA_BITS = 4096

PSS_DER = bytes.fromhex(
    "304606092a864886f70d01010a3039a00f300d06096086480165030402020500a11c301a06092a864886f70d010108"
    "300d06096086480165030402020500a203020130a303020101"
)
"""AlgorithmIdentifier of RSA-PSS with SHA-384, MGF1 of it, 48 bytes of salt, and the trailer spelt out."""

PSS_DER_DEFAULT_TRAILER = bytes.fromhex(
    "304106092a864886f70d01010a3034a00f300d06096086480165030402020500a11c301a06092a864886f70d010108"
    "300d06096086480165030402020500a203020130"
)
"""The same with the trailer left at its default, as newer certificates have it."""


class AmdExtensions(NamedTuple):
    """What AMD's extensions of a VCEK or VLEK say. `hwid`: the chip, None in a VLEK; `csp_id` the other way round."""

    struct_version: int
    product_name: str
    spl: dict[str, int]
    hwid: bytes | None
    csp_id: str | None

    @property
    def tcb(self) -> Tcb:
        """The TCB for which the key was derived."""
        levels = self.spl
        return Tcb(levels["bootloader"], levels["tee"], levels["snp"], levels["microcode"], levels.get("fmc"))


@dataclass(frozen=True, slots=True)
class SnpCertificate:
    """One certificate: where it came from, its DER bytes, and the library's view of them."""

    name: str
    der: bytes
    x509: library.Certificate = field(repr=False, compare=False)
    serial: int
    extensions: AmdExtensions | None
    """AMD's, of a VCEK or VLEK; None for a certificate that has none."""

    @property
    def subject(self) -> str:
        """The subject's common name."""
        return common_name(self.x509.subject)

    @property
    def issuer(self) -> str:
        """The issuer's common name."""
        return common_name(self.x509.issuer)

    @property
    def role(self) -> str:
        """ARK, ASK, ASVK, VCEK or VLEK by the subject's name; empty for none of them."""
        for pattern, role in ROLE_BY_NAME:
            if pattern.fullmatch(self.subject):
                return role
        return ""


ROLE_BY_NAME = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        ("ARK-.*", "ARK"),
        ("SEV-VCEK", "VCEK"),
        ("SEV-VLEK", "VLEK"),
        ("SEV-VLEK-.*", "ASVK"),
        ("SEV-.*", "ASK"),
    )
)


def common_name(name: Any) -> str:
    """The common name in an X.509 name, "" when it has not exactly one."""
    from cryptography.x509.oid import NameOID

    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else ""


# Reading ----------------------------------------------------------------------------------------------------------

PEM = re.compile(rb"-----BEGIN CERTIFICATE-----\s*([A-Za-z0-9+/=\s]*?)-----END CERTIFICATE-----\s*")


def parse_certificates(data: bytes, name: str = "certificate") -> list[SnpCertificate]:
    """The certificates in file `name`: one in DER, or any number in PEM. Raises `FormatError`."""
    if b"-----BEGIN" in data[:200]:
        return list(_from_pem(data, name))
    return [parse_der(data, name)]


def _from_pem(data: bytes, name: str) -> Iterator[SnpCertificate]:
    import base64
    import binascii

    position = data.index(b"-----BEGIN")
    while position < len(data):
        block = PEM.match(data, position)
        if block is None:
            found = data[position : position + 24].decode("ascii", "replace")
            raise FormatError(name, position, "PEM", expected="a certificate in PEM to its END line", found=repr(found))
        try:
            der = base64.b64decode(b"".join(block[1].split()), validate=True)
        except binascii.Error as error:
            raise FormatError(name, block.start(1), "PEM", expected="base64", found=str(error)) from None
        yield parse_der(der, f"{name}, PEM at {position:#x}")
        position = block.end()


def parse_der(der: bytes, name: str = "certificate") -> SnpCertificate:
    """The certificate in `der`, the bytes of file `name`. Raises `FormatError`.

    Endorsement keys have serial number 0, which X.509 does not allow and the library warns about.
    """
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm

    errors = (x509.InvalidVersion, x509.UnsupportedGeneralNameType, x509.DuplicateExtension)
    problem = der_problem(der)
    if problem:
        where, expected, found = problem
        raise FormatError(name, where, "DER", expected=expected, found=found)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            certificate = x509.load_der_x509_certificate(der)
            _read_everything(certificate)
            serial = certificate.serial_number
    except (ValueError, TypeError, UnsupportedAlgorithm, *errors) as error:
        raise FormatError(name, 0, "Certificate", expected="X.509", found=_short(str(error))) from None
    values = {item.oid.dotted_string: item for item in certificate.extensions}
    amd = {oid: item.value.value for oid, item in values.items() if oid.startswith(f"{AMD_OID}.")}
    parsed = _amd_extensions(amd, der, name) if amd else None
    return SnpCertificate(name, der, certificate, serial, parsed)


def _read_everything(certificate: library.Certificate) -> None:
    """The library decodes a part when it is asked for; ask for all, so that what is wrong comes up here."""
    for part in ("subject", "issuer", "extensions", "not_valid_before_utc", "not_valid_after_utc"):
        getattr(certificate, part)
    for part in ("signature_hash_algorithm", "signature_algorithm_parameters"):
        getattr(certificate, part)
    certificate.public_key()


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}..."


def _amd_extensions(amd: dict[str, bytes], der: bytes, name: str) -> AmdExtensions:
    def value_of(oid: str, tag: int, what: str) -> bytes:
        data = amd.get(oid)
        if data is None or len(data) < 2 or data[0] != tag or data[1] != len(data) - 2 or not data[2:]:
            place = der.find(data) if data else 0
            found = data.hex() if data is not None else "nothing"
            raise FormatError(name, max(place, 0), f"extension {oid}", expected=what, found=found)
        return data[2:]

    def number(oid: str) -> int:
        return int.from_bytes(value_of(oid, 0x02, "a DER integer from 0 to 255"), "big")

    optional = ("fmc", "spl4")
    spl = {part: number(oid) for part, oid in SPL_OIDS.items() if part not in optional or oid in amd}
    for part, level in spl.items():
        if level > 0xFF:
            where = f"extension {SPL_OIDS[part]}"
            raise FormatError(name, 0, where, expected="a number up to 255", found=str(level))
    unknown = set(amd) - {STRUCT_VERSION, PRODUCT_NAME, HWID, CSP_ID, *SPL_OIDS.values()}
    if unknown:
        raise FormatError(name, 0, f"extension {min(unknown)}", expected="one that 57230 names", found="another")
    hwid = amd.get(HWID)
    if hwid is not None and hwid[:1] == b"\x04" and len(hwid) in (66, 10):
        hwid = hwid[2:]  # some issues wrap the bytes in an OCTET STRING
    if hwid is not None and len(hwid) not in (64, 8):
        raise FormatError(
            name, max(der.find(hwid), 0), f"extension {HWID}", expected="64 or 8 bytes", found=f"{len(hwid)} bytes"
        )
    return AmdExtensions(
        struct_version=number(STRUCT_VERSION),
        product_name=_text(value_of(PRODUCT_NAME, 0x16, "a DER IA5String")),
        spl=spl,
        hwid=hwid,
        csp_id=_text(value_of(CSP_ID, 0x16, "a DER IA5String")) if CSP_ID in amd else None,
    )


def _text(data: bytes) -> str:
    return data.decode("ascii", "replace")


def der_problem(der: bytes) -> tuple[int, str, str] | None:
    """(offset, expected, found) of the first element of `der` that does not fit in its surroundings, None for none."""
    if not der:
        return 0, "a certificate", "an empty file"
    return _problem_in(der, 0, len(der), 0)


MAX_DEPTH = 32
"""How deep elements may nest; a certificate needs about ten levels."""


def _problem_in(der: bytes, start: int, end: int, depth: int) -> tuple[int, str, str] | None:
    if depth > MAX_DEPTH:
        return start, f"at most {MAX_DEPTH} elements inside each other", "more"
    position = start
    while position < end:
        header = der[position : min(position + 6, end)]
        size = 2 + (header[1] & 0x7F if len(header) > 1 and header[1] & 0x80 else 0)
        if len(header) < min(size, 6) or size > 6:
            return position, "the tag and length of an element", f"{len(header)} bytes"
        length = int.from_bytes(header[2:size], "big") if size > 2 else header[1]
        body, position = position + size, position + size + length
        if position > end:
            return end, f"{length} bytes from offset {body:#x}", f"the end after {end - body}"
        if header[0] & 0x20:
            problem = _problem_in(der, body, position, depth + 1)
            if problem:
                return problem
        if depth == 0:
            return None if position == end else (position, "the end", f"{end - position} bytes more")
    return None


# Who signed whom --------------------------------------------------------------------------------------------------


def issued_by(subject: SnpCertificate, issuer: SnpCertificate) -> bool:
    """Whether `issuer` signed `subject`: the names match, and the signature in exactly AMD's form verifies.

    What stands outside the signed part is compared with what it must be, so that no changed bit passes.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding, rsa

    key = issuer.x509.public_key()
    if not isinstance(key, rsa.RSAPublicKey) or subject.x509.issuer != issuer.x509.subject:
        return False
    parts = outer_parts(subject)
    if parts is None:
        return False
    signed, signature = parts
    digest = hashes.SHA384()
    try:
        key.verify(signature, signed, padding.PSS(padding.MGF1(digest), digest.digest_size), digest)
    except InvalidSignature:
        return False
    return True


def outer_parts(certificate: SnpCertificate) -> tuple[bytes, bytes] | None:
    """(signed bytes, signature) of a certificate in exactly the form of AMD's, None for another form."""
    signed, signature = certificate.x509.tbs_certificate_bytes, certificate.x509.signature
    for algorithm in (PSS_DER, PSS_DER_DEFAULT_TRAILER):
        if certificate.der == assemble(signed, algorithm, signature) and algorithm in signed[:128]:
            return signed, signature
    return None


def assemble(signed: bytes, algorithm: bytes, signature: bytes) -> bytes:
    """The DER of a certificate from its signed part, AlgorithmIdentifier and signature."""
    tail = algorithm + b"\x03\x82" + (len(signature) + 1).to_bytes(2, "big") + b"\0" + signature
    return b"\x30\x82" + (len(signed) + len(tail)).to_bytes(2, "big") + signed + tail


def modulus_digest(certificate: SnpCertificate) -> str:
    """SHA-256 of an RSA key's modulus as little-endian bytes, as `ARK_ROOTS` lists them; "" for another key."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = certificate.x509.public_key()
    if not isinstance(key, rsa.RSAPublicKey):
        return ""
    number = key.public_numbers().n
    return hashlib.sha256(number.to_bytes(-(-number.bit_length() // 8), "little")).hexdigest()
