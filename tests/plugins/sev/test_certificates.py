"""Layout and strictness of both certificate formats, and chains made with the simulated vendor."""

from __future__ import annotations

from functools import cache

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.errors import ConfigError, FormatError
from sevlab.core.layout_tools import reserved_ranges
from sevlab.plugins.sev.certificates import (
    AmdCertificateHeader,
    EcdsaSignature,
    EcPublicKey,
    SevCertificate,
    Slot,
    Usage,
    parse_certificate,
    parse_certificates,
    usage_of,
)
from sevlab.plugins.sev.chain import make_certificate, root_name, signature_verifies, signed_by, verify_chain
from sevlab.plugins.sev.crypto import public_point
from sevlab.plugins.sev.signatures import RSA_EXPONENT
from sevlab.plugins.sev.vendor import PRIME_STEPS, key_bits, signed_by_vendor, vendor_certificate, vendor_key

SCALARS = {Usage.CEK: 11, Usage.OCA: 12, Usage.PEK: 13, Usage.PDH: 14}


@cache
def chain_of(generation):
    new = {usage: make_certificate(usage, public_point(scalar), api=(1, 55)) for usage, scalar in SCALARS.items()}
    cek = signed_by_vendor(new[Usage.CEK], generation)
    oca = signed_by(new[Usage.OCA], Slot.FIRST, Usage.OCA, SCALARS[Usage.OCA])
    pek = signed_by(new[Usage.PEK], Slot.FIRST, Usage.OCA, SCALARS[Usage.OCA])
    pek = signed_by(pek, Slot.SECOND, Usage.CEK, SCALARS[Usage.CEK])
    pdh = signed_by(new[Usage.PDH], Slot.FIRST, Usage.PEK, SCALARS[Usage.PEK])
    return [vendor_certificate(generation, Usage.ARK), vendor_certificate(generation, Usage.ASK), cek, oca, pek, pdh]


def platform(generation="rome"):
    return list(chain_of(generation))


def test_offsets_of_the_device_format_are_those_of_the_document():
    expected = {
        "certificate_version": (0x000, 4),
        "api_major": (0x004, 1),
        "api_minor": (0x005, 1),
        "reserved_6": (0x006, 2),
        "pubkey_usage": (0x008, 4),
        "pubkey_algo": (0x00C, 4),
        "pubkey": (0x010, 0x404),
        "sig_1_usage": (0x414, 4),
        "sig_1_algo": (0x418, 4),
        "sig_1": (0x41C, 512),
        "sig_2_usage": (0x61C, 4),
        "sig_2_algo": (0x620, 4),
        "sig_2": (0x624, 512),
    }
    assert {name: (i.offset, i.length_bytes) for name, i in SevCertificate.FIELDS.items()} == expected
    assert SevCertificate.SIZE == 2084


@pytest.mark.parametrize("layout", [SevCertificate, EcPublicKey, EcdsaSignature, AmdCertificateHeader])
def test_every_byte_of_a_certificate_is_named(layout):
    assert reserved_ranges(layout) == ()


@given(st.data())
def test_any_bytes_are_a_certificate_or_a_precise_refusal(data):
    base = bytearray(data.draw(st.sampled_from([item.to_bytes() for item in platform()])))
    for _ in range(data.draw(st.integers(0, 3))):
        base[data.draw(st.integers(0, len(base) - 1))] = data.draw(st.integers(0, 255))
    given_bytes = bytes(base)[: data.draw(st.integers(0, len(base)))] if data.draw(st.booleans()) else bytes(base)
    try:
        found = parse_certificates(given_bytes, "f")
    except FormatError as refusal:
        error = refusal
    else:
        assert b"".join(item.to_bytes() for _, item in found) == given_bytes
        return
    assert 0 <= error.offset <= len(given_bytes)
    assert str(error).startswith("f: offset 0x")


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0x000, 2, "certificate_version: expected one of 0x1, found 0x2"),
        (0x006, 1, "reserved_6: expected zero in these bits, found 0x1"),
        (0x008, 0x55, "pubkey_usage"),
        (0x00C, 9, "pubkey_algo"),
        (0x010, 7, "EcPublicKey.curve: expected one of 0x1, 0x2, found 0x7"),
        (0x014 + 48, 1, "EcPublicKey.qx: expected zero above 384 bits, found 01"),
        (0x05C + 71, 1, "EcPublicKey.qy"),
        (0x413, 1, "EcPublicKey.reserved_94: expected all zero"),
        (0x41C + 48, 1, "sig_1.r: expected zero above 384 bits"),
        (0x41C + 144, 1, "EcdsaSignature.reserved_90"),
        (0x620, 2, "sig_2_usage: expected both or none of usage and algorithm, found usage 0x1000 with algorithm 0x2"),
        (0x624, 1, "sig_2: expected all zero in an unused slot"),
    ],
)
def test_a_wrong_byte_is_refused_with_its_field(offset, value, message):
    data = bytearray(platform()[3].to_bytes())
    data[offset] = value
    with pytest.raises(FormatError, match=message) as error:
        parse_certificate(bytes(data), "oca.cert")
    assert error.value.name == "oca.cert"


def test_an_empty_file_is_no_certificate():
    with pytest.raises(FormatError, match=r"empty\.cert: offset 0x0, .* found an empty file"):
        parse_certificates(b"", "empty.cert")


@pytest.mark.parametrize("generation", ["naples", "rome", "milan"])
def test_a_simulated_chain_passes_when_its_root_is_given_and_only_then(generation):
    chain = platform(generation)
    assert [check for check in verify_chain(chain, trusted_ark=chain[0]) if not check.passed] == []
    refused = [check for check in verify_chain(chain) if not check.passed]
    assert [(check.subject, check.field, check.got) for check in refused] == [("ARK", "root", "an unknown key")]
    assert root_name(chain[0]) == ""
    other = vendor_certificate("turin", Usage.ARK)
    assert ("ARK", "root") in {(c.subject, c.field) for c in verify_chain(chain, trusted_ark=other) if not c.passed}


@pytest.mark.parametrize("place", range(6))
def test_a_missing_certificate_fails_itself_and_what_it_signs(place):
    chain = platform()
    gone = usage_of(chain.pop(place)).name
    failed = {(check.subject, check.field) for check in verify_chain(chain) if not check.passed}
    assert (gone, "certificate") in failed
    signs = {"ARK": "ASK", "ASK": "CEK", "CEK": "PEK", "OCA": "PEK", "PEK": "PDH"}
    if gone in signs:
        assert (signs[gone], f"signature by {gone}") in failed


def test_a_certificate_given_twice_is_noticed():
    chain = platform()
    failed = [check for check in verify_chain([*chain, chain[-1]], trusted_ark=chain[0]) if not check.passed]
    assert [(check.subject, check.got) for check in failed] == [("PDH", "given twice")]


def test_a_signature_counts_only_in_the_role_its_slot_names():
    *_, cek, oca, pek, _ = platform()
    assert signature_verifies(oca, pek)
    assert signature_verifies(cek, pek)
    assert not signature_verifies(oca.replace(pubkey_usage=Usage.CEK), pek)
    assert not signature_verifies(pek, pek)


def test_the_same_signer_gives_the_same_bytes():
    again = chain_of.__wrapped__("rome")
    assert [item.to_bytes() for item in again] == [item.to_bytes() for item in platform()]


@pytest.mark.parametrize(("generation", "role"), PRIME_STEPS)
def test_vendor_keys_have_their_width_and_fit_their_exponent(generation, role):
    key = vendor_key(generation, role)
    assert key.modulus.bit_length() == key_bits(generation)
    assert key.private_exponent * RSA_EXPONENT % ((key.p - 1) * (key.q - 1)) == 1


@pytest.mark.long
@pytest.mark.parametrize(("generation", "role"), PRIME_STEPS)
def test_vendor_keys_are_made_of_primes(generation, role):
    p, q = vendor_key(generation, role)
    d = vendor_key(generation, role).private_exponent
    numbers = rsa.RSAPublicNumbers(65537, p * q)
    private = rsa.RSAPrivateNumbers(p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p), numbers)
    assert private.private_key().key_size == key_bits(generation)  # OpenSSL checks that both are prime


def test_an_unknown_vendor_key_is_refused():
    with pytest.raises(ConfigError, match="vendor key 'asvk' of 'naples'"):
        vendor_key("naples", "asvk")
