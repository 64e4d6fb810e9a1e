"""Reading X.509 files: DER and PEM, refusals with offsets, AMD's extensions."""

from __future__ import annotations

import base64
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.errors import FormatError
from sevlab.plugins.sev import public_point
from sevlab.plugins.snp.chain import ca_certificate, vcek_certificate
from sevlab.plugins.snp.tcb import Tcb
from sevlab.plugins.snp.x509 import der_problem, parse_certificates, parse_der

ARK = ca_certificate("milan", "ark")
ASK = ca_certificate("milan", "ask")
VCEK = vcek_certificate("milan", public_point(7), tcb=Tcb(3, 0, 22, 213), chip_id=bytes(range(64)))


def pem(der):
    body = "\n".join(textwrap.wrap(base64.b64encode(der).decode(), 64))
    return f"-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n".encode()


def test_a_pem_file_holds_any_number_of_certificates():
    found = parse_certificates(pem(ASK) + pem(ARK), "cert_chain")
    assert [item.role for item in found] == ["ASK", "ARK"]
    assert [item.der for item in found] == [ASK, ARK]
    assert [item.role for item in parse_certificates(ARK, "ark.der")] == ["ARK"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"f: offset 0x0, DER: expected a certificate, found an empty file"),
        (ARK[:100], r"f: offset 0x64, DER: expected \d+ bytes from offset 0x4, found the end after 96"),
        (ARK + b"\0", r"f: offset 0x[0-9a-f]+, DER: expected the end, found 1 bytes more"),
        (pem(ASK)[:-30], r"f: offset 0x0, PEM: expected a certificate in PEM to its END line"),
        (
            pem(ASK) + b"rest",
            r"f: offset 0x[0-9a-f]+, PEM: expected a certificate in PEM .*, found 'rest'",
        ),
        (pem(ASK).replace(b"MII", b"M"), r"f: offset 0x1c, PEM: expected base64"),
        (b"\x30\x03\x02\x01\x05", r"f: offset 0x0, Certificate: expected X\.509, found error parsing"),
        (VCEK.replace(b"\x02\x02\x00\xd5", b"\x04\x02\x00\xd5"), "1.3.6.1.4.1.3704.1.3.8: expected a DER integer"),
        (VCEK.replace(b"\x02\x02\x00\xd5", b"\x02\x02\x01\xd5"), "expected a number up to 255, found 469"),
        (VCEK.replace(b"\x16\x08Milan-B0", b"\x0c\x08Milan-B0"), r"1\.3\.6\.1\.4\.1\.3704\.1\.2: expected a DER IA5"),
    ],
    ids=range(10),
)
def test_a_file_that_is_no_certificate_is_refused_with_its_offset(data, message):
    with pytest.raises(FormatError, match=message):
        parse_certificates(data, "f")


def test_elements_that_nest_without_end_are_refused():
    nested = b""
    for _ in range(3000):
        length = len(nested)
        nested = b"\x30" + (bytes((length,)) if length < 128 else b"\x83" + length.to_bytes(3, "big")) + nested
    with pytest.raises(FormatError, match="DER: expected at most 32 elements inside each other, found more"):
        parse_der(nested, "f")


def test_a_wrong_certificate_in_pem_is_named_by_its_place():
    with pytest.raises(FormatError, match=r"f, PEM at 0x[1-9a-f][0-9a-f]+: offset 0x64, DER"):
        parse_certificates(pem(ASK) + pem(ARK[:100]), "f")


@given(st.data())
def test_any_change_of_a_certificate_reads_or_is_refused(data):
    changed = bytearray(data.draw(st.sampled_from([ARK, VCEK])))
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        parse_der(bytes(changed), "f")
    except FormatError as refusal:
        assert str(refusal).startswith("f: offset 0x")  # noqa: PT017  # both ends are right


@given(st.binary(max_size=200))
def test_any_bytes_are_walked_to_an_end(data):
    problem = der_problem(data)
    assert problem is None or 0 <= problem[0] <= len(data)
    with pytest.raises(FormatError):
        parse_certificates(data, "f")
