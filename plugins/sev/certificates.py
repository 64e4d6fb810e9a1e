"""Certificates of SEV: the device's own format (0x824 bytes) and AMD's format for ARK and ASK.

All numbers of both formats are little-endian. Source: 55766, appendix C; AMDESE/sev-tool src/sevapi.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha256
from typing import Any, TypeAlias

from sevlab.core.errors import FormatError
from sevlab.core.layout import Layout, raw_bytes, u8, u16, u32
from sevlab.core.layout_tools import read_file_part, to_json

SOURCE = "55766, appendix C"

COORDINATE_BYTES = 72
"""A coordinate or half of a signature in a certificate, zero padded."""


class Usage(IntEnum):
    """What a key is for. Source: 55766, appendix C, table USAGE."""

    ARK = 0x0000
    ASK = 0x0013
    INVALID = 0x1000
    OCA = 0x1001
    PEK = 0x1002
    PDH = 0x1003
    CEK = 0x1004


class Algorithm(IntEnum):
    """How a key signs or agrees. Source: 55766, appendix C, table ALGO."""

    INVALID = 0
    RSA_SHA256 = 0x001
    ECDSA_SHA256 = 0x002
    ECDH_SHA256 = 0x003
    RSA_SHA384 = 0x101
    ECDSA_SHA384 = 0x102
    ECDH_SHA384 = 0x103


class Curve(IntEnum):
    """Curves of a certificate; the firmware uses P-384 only. Source: 55766, appendix C, table ECC curve."""

    INVALID = 0
    P256 = 1
    P384 = 2


class SevCertificate(Layout, size=0x824):
    """Certificate of a device's key: CEK, OCA, PEK, PDH. Signed are the bytes before `sig_1_usage`."""

    certificate_version = u32(0x000, values=(1,), source=SOURCE)
    api_major = u8(0x004, source=SOURCE)
    api_minor = u8(0x005, source=SOURCE)
    reserved_6 = u16(0x006, reserved=0xFFFF, source=SOURCE)
    pubkey_usage = u32(0x008, values=(Usage.OCA, Usage.PEK, Usage.PDH, Usage.CEK), source=SOURCE)
    pubkey_algo = u32(0x00C, values=tuple(Algorithm), source=SOURCE)
    pubkey = raw_bytes(0x010, 0x404, doc="`EcPublicKey` or an RSA key", source=SOURCE)
    sig_1_usage = u32(0x414, values=tuple(Usage), source=SOURCE)
    sig_1_algo = u32(0x418, values=tuple(Algorithm), source=SOURCE)
    sig_1 = raw_bytes(0x41C, 0x200, doc="`EcdsaSignature` or an RSA signature", source=SOURCE)
    sig_2_usage = u32(0x61C, values=tuple(Usage), source=SOURCE)
    sig_2_algo = u32(0x620, values=tuple(Algorithm), source=SOURCE)
    sig_2 = raw_bytes(0x624, 0x200, doc="as sig_1; an unused slot has usage 0x1000 and algorithm 0", source=SOURCE)


SIGNED_BYTES = 0x414


class EcPublicKey(Layout, size=0x404):
    """The public key of a curve, in a certificate."""

    curve = u32(0x000, values=(Curve.P256, Curve.P384), source=SOURCE)
    qx = raw_bytes(0x004, COORDINATE_BYTES, source=SOURCE)
    qy = raw_bytes(0x04C, COORDINATE_BYTES, source=SOURCE)
    reserved_94 = raw_bytes(0x094, 0x370, must_be_zero=True, source=SOURCE)


class EcdsaSignature(Layout, size=0x200):
    """An ECDSA signature in a slot of a certificate or in an attestation report."""

    r = raw_bytes(0x000, COORDINATE_BYTES, source=SOURCE)
    s = raw_bytes(0x048, COORDINATE_BYTES, source=SOURCE)
    reserved_90 = raw_bytes(0x090, 0x170, must_be_zero=True, source=SOURCE)


class AmdCertificateHeader(Layout, size=0x40):
    """What stands before the numbers of an ARK or ASK certificate."""

    certificate_version = u32(0x00, values=(1,), source=SOURCE)
    key_id = raw_bytes(0x04, 16, source=SOURCE)
    certifying_id = raw_bytes(0x14, 16, source=SOURCE)
    key_usage = u32(0x24, values=(Usage.ARK, Usage.ASK), source=SOURCE)
    reserved_28 = raw_bytes(0x28, 16, must_be_zero=True, source=SOURCE)
    pubexp_bits = u32(0x38, values=(2048, 4096), unit="bits", source=SOURCE)
    modulus_bits = u32(0x3C, values=(2048, 4096), unit="bits", source=SOURCE)


CERTIFICATE_LAYOUTS: tuple[type[Layout], ...] = (SevCertificate, EcPublicKey, EcdsaSignature, AmdCertificateHeader)


@dataclass(frozen=True, slots=True)
class AmdCertificate:
    """An ARK or ASK: the header, then exponent, modulus and signature as wide as the header says."""

    header: AmdCertificateHeader
    exponent: int
    modulus: int
    signature: bytes

    @property
    def usage(self) -> Usage:
        """ARK or ASK."""
        return Usage(self.header.key_usage)

    @property
    def signed_bytes(self) -> bytes:
        """Everything before the signature."""
        exponent = self.exponent.to_bytes(self.header.pubexp_bits // 8, "little")
        return self.header.to_bytes() + exponent + self.modulus.to_bytes(self.header.modulus_bits // 8, "little")

    def to_bytes(self) -> bytes:
        """The certificate as stored."""
        return self.signed_bytes + self.signature


Certificate: TypeAlias = SevCertificate | AmdCertificate


class Slot(IntEnum):
    """The two places of a `SevCertificate` for a signature."""

    FIRST = 1
    SECOND = 2


def slot_of(certificate: SevCertificate, slot: Slot) -> tuple[int, int, bytes]:
    """(usage of the signer, algorithm, signature) of a slot."""
    if slot is Slot.FIRST:
        return certificate.sig_1_usage, certificate.sig_1_algo, certificate.sig_1
    return certificate.sig_2_usage, certificate.sig_2_algo, certificate.sig_2


def usage_of(certificate: Certificate) -> Usage:
    """The role of a certificate's key; INVALID for a number that is none."""
    number = certificate.header.key_usage if isinstance(certificate, AmdCertificate) else certificate.pubkey_usage
    return Usage(number) if number in _USAGES else Usage.INVALID


_USAGES = frozenset(Usage)


def describe(certificate: Certificate) -> dict[str, Any]:
    """What a certificate says, by name; None for an unused slot."""
    known = {"role": usage_of(certificate).name, "sha256": sha256(certificate.to_bytes()).hexdigest()}
    if isinstance(certificate, AmdCertificate):
        header = to_json(AmdCertificateHeader, certificate.header.to_bytes())
        return known | header | {"exponent": certificate.exponent, "modulus": f"{certificate.modulus:#x}"}
    key = EcPublicKey.from_bytes(certificate.pubkey)
    fields: dict[str, Any] = known | {
        "api": f"{certificate.api_major}.{certificate.api_minor}",
        "algorithm": Algorithm(certificate.pubkey_algo).name,
        "curve": Curve(key.curve).name,
        "qx": f"{int.from_bytes(key.qx, 'little'):#x}",
        "qy": f"{int.from_bytes(key.qy, 'little'):#x}",
    }
    for slot in Slot:
        usage, algorithm, _ = slot_of(certificate, slot)
        signer = f"{Usage(usage).name}, {Algorithm(algorithm).name}"
        fields[f"signature_{slot.value}"] = signer if usage != Usage.INVALID else None
    return fields


# Reading files ----------------------------------------------------------------------------------------------------


def parse_certificate(data: bytes, name: str = "certificate") -> Certificate:
    """The one certificate in the bytes of file `name`. Raises `FormatError`."""
    ((_, certificate), *more) = parse_certificates(data, name)
    if more:
        offset = more[0][0]
        raise FormatError(name, offset, "end", expected="one certificate", found=f"{len(data) - offset:#x} bytes more")
    return certificate


def parse_certificates(data: bytes, name: str = "certificates") -> list[tuple[int, Certificate]]:
    """(offset, certificate) of each of the certificates that follow each other in file `name`.

    This is what platforms export (PDH, or PEK, OCA, CEK) and what AMD publishes (ASK, ARK). Raises `FormatError`,
    also for a byte that must be zero and is not.
    """
    if not data:
        raise FormatError(name, 0, "certificate_version", expected="a certificate", found="an empty file")
    return list(_parse(data, name))


def _parse(data: bytes, name: str) -> Iterator[tuple[int, Certificate]]:
    offset = 0
    while offset < len(data):
        start, certificate = offset, _parse_one(data, offset, name)
        offset += len(certificate.to_bytes())
        yield start, certificate


def _parse_one(data: bytes, offset: int, name: str) -> Certificate:
    if not _is_device_format(data[offset:]):
        return _parse_amd(data, offset, name)
    certificate = read_file_part(SevCertificate, data, name, offset)
    key = read_file_part(EcPublicKey, data[: offset + SIGNED_BYTES], name, offset + 0x10)
    _require_zero_padding(key.qx, name, offset + 0x14, "EcPublicKey.qx")
    _require_zero_padding(key.qy, name, offset + 0x5C, "EcPublicKey.qy")
    for slot, place in ((Slot.FIRST, 0x414), (Slot.SECOND, 0x61C)):
        _check_slot(certificate, slot, data, offset + place, name)
    return certificate


def _is_device_format(part: bytes) -> bool:
    """Tell the formats apart where AMD's has 16 reserved bytes; a shorter part by the usage of the device's."""
    reserved = part[0x28:0x38]
    return any(reserved) if len(reserved) == 16 else part[9:10] == b"\x10"


def _check_slot(certificate: SevCertificate, slot: Slot, data: bytes, offset: int, name: str) -> None:
    usage, algorithm, signature = slot_of(certificate, slot)
    field = f"SevCertificate.sig_{slot.value}"
    if (usage == Usage.INVALID) != (algorithm == Algorithm.INVALID):
        words = f"usage {usage:#x} with algorithm {algorithm:#x}"
        raise FormatError(name, offset, f"{field}_usage", expected="both or none of usage and algorithm", found=words)
    if usage == Usage.INVALID and any(signature):
        raise FormatError(name, offset + 8, field, expected="all zero in an unused slot", found="other bytes")
    if algorithm in (Algorithm.ECDSA_SHA256, Algorithm.ECDSA_SHA384):
        values = read_file_part(EcdsaSignature, data, name, offset + 8)
        _require_zero_padding(values.r, name, offset + 8, f"{field}.r")
        _require_zero_padding(values.s, name, offset + 8 + COORDINATE_BYTES, f"{field}.s")


def _require_zero_padding(number: bytes, name: str, offset: int, field: str) -> None:
    if any(number[48:]):
        raise FormatError(name, offset + 48, field, expected="zero above 384 bits", found=number[48:].hex())


def _parse_amd(data: bytes, offset: int, name: str) -> AmdCertificate:
    header = read_file_part(AmdCertificateHeader, data, name, offset)
    position = offset + AmdCertificateHeader.SIZE
    numbers = []
    for field, bits in (
        ("exponent", header.pubexp_bits),
        ("modulus", header.modulus_bits),
        ("signature", header.modulus_bits),
    ):
        part = data[position : position + bits // 8]
        if len(part) < bits // 8:
            raise FormatError(
                name,
                position + len(part),
                f"AmdCertificate.{field}",
                expected=f"{bits // 8:#x} bytes from offset {position:#x}",
                found=f"the end of the file after {len(part):#x}",
            )
        numbers.append(part)
        position += bits // 8
    exponent, modulus, signature = numbers
    return AmdCertificate(header, int.from_bytes(exponent, "little"), int.from_bytes(modulus, "little"), signature)
