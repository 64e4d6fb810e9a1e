"""Signatures: deterministic, as the standards say, and refused for anything else."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from hypothesis import given
from hypothesis import strategies as st
from sevlab.plugins.sev.certificates import Algorithm, EcdsaSignature
from sevlab.plugins.sev.crypto import KEY_SEED_BYTES, ORDER, Point, public_key, public_point, scalar_from_seed
from sevlab.plugins.sev.signatures import (
    RSA_EXPONENT,
    pubkey_bytes,
    pubkey_point,
    rsa_pss_sign,
    rsa_pss_verifies,
    sign_ecdsa,
    verify_ecdsa,
)
from sevlab.plugins.sev.vendor import vendor_key

# RFC 6979, A.2.6: P-384, messages "sample", both hashes.
SCALAR = 0x6B9D3DAD2E1B8C1C05B19875B6659F4DE23C3B667BF297BA9AA47740787137D896D5724E4C70A825F872C9EA60D2EDF5
PUBLIC = Point(
    0xEC3A4E415B4E19A4568618029F427FA5DA9A8BC4AE92E02E06AAE5286B300C64DEF8F0EA9055866064A254515480BC13,
    0x8015D9B72D7D57244EA8EF9AC0C621896708A59367F9DFB9F54CA84B3F1C9DB1288B231C3AE0D4FE7344FD2533264720,
)
SAMPLE = {
    Algorithm.ECDSA_SHA256: (
        0x21B13D1E013C7FA1392D03C5F99AF8B30C570C6F98D4EA8E354B63A21D3DAA33BDE1E888E63355D92FA2B3C36D8FB2CD,
        0xF3AA443FB107745BF4BD77CB3891674632068A10CA67E3D45DB2266FA7D1FEEBEFDC63ECCD1AC42EC0CB8668A4FA0AB0,
    ),
    Algorithm.ECDSA_SHA384: (
        0x94EDBB92A5ECB8AAD4736E56C691916B3F88140666CE9FA73D64C4EA95AD133C81A648152E44ACF96E36DD1E80FABE46,
        0x99EF4AEB15F178CEA1FE40DB2603138F130E740A19624526203B6351D0A3A94FA329C145786E679E7B82C71A38628AC8,
    ),
}


@pytest.mark.parametrize("algorithm", SAMPLE)
def test_sign_ecdsaatures_are_those_of_rfc_6979(algorithm):
    values = EcdsaSignature.from_bytes(sign_ecdsa(SCALAR, b"sample", algorithm))
    assert (int.from_bytes(values.r, "little"), int.from_bytes(values.s, "little")) == SAMPLE[algorithm]
    assert public_point(SCALAR) == PUBLIC
    assert verify_ecdsa(PUBLIC, b"sample", values.to_bytes(), algorithm)
    assert not verify_ecdsa(PUBLIC, b"samplf", values.to_bytes(), algorithm)


def test_ecdsa_refuses_another_hash_and_numbers_of_zero():
    signature = sign_ecdsa(SCALAR, b"sample", Algorithm.ECDSA_SHA256)
    assert not verify_ecdsa(PUBLIC, b"sample", signature, Algorithm.ECDSA_SHA384)
    assert not verify_ecdsa(PUBLIC, b"sample", bytes(0x200))
    assert not verify_ecdsa(Point(PUBLIC.x, PUBLIC.y ^ 1), b"sample", signature)


@given(st.binary(min_size=KEY_SEED_BYTES, max_size=KEY_SEED_BYTES))
def test_every_seed_gives_a_key_of_the_curve(seed):
    scalar = scalar_from_seed(seed)
    assert 1 <= scalar < ORDER
    point = public_point(scalar)
    assert public_key(point) is not None
    assert pubkey_point(pubkey_bytes(point)) == point


@pytest.mark.parametrize(
    ("seed", "scalar"),
    [(bytes(56), 1), (bytes(55) + b"\1", 2), ((ORDER - 2).to_bytes(56, "big"), ORDER - 1)],
    ids=["zero", "one", "largest"],
)
def test_seeds_map_to_the_numbers_below_the_order(seed, scalar):
    assert scalar_from_seed(seed) == scalar
    assert scalar_from_seed((ORDER - 1).to_bytes(56, "big")) == 1


def test_a_key_off_the_curve_or_of_another_curve_is_none():
    assert pubkey_point(pubkey_bytes(Point(PUBLIC.x, PUBLIC.y + 1))) is None
    assert pubkey_point(pubkey_bytes(Point(0, 0))) is None
    assert pubkey_point(bytes([1]) + pubkey_bytes(PUBLIC)[1:]) is None


@pytest.mark.parametrize("generation", ["naples", "rome"])
def test_pss_signatures_verify_with_the_library_and_are_deterministic(generation):
    key = vendor_key(generation, "ark")
    digest, algorithm = {
        "naples": (hashes.SHA256(), Algorithm.RSA_SHA256),
        "rome": (hashes.SHA384(), Algorithm.RSA_SHA384),
    }[generation]
    signature = rsa_pss_sign(key, b"message", algorithm)
    public = rsa.RSAPublicNumbers(RSA_EXPONENT, key.modulus).public_key()
    public.verify(signature, b"message", padding.PSS(padding.MGF1(digest), digest.digest_size), digest)
    assert rsa_pss_sign(key, b"message", algorithm) == signature
    assert rsa_pss_sign(key, b"other", algorithm) != signature
    assert rsa_pss_verifies(key.modulus, RSA_EXPONENT, b"message", signature, algorithm)
    assert not rsa_pss_verifies(key.modulus, RSA_EXPONENT, b"messagf", signature, algorithm)
    assert not rsa_pss_verifies(key.modulus, RSA_EXPONENT, b"message", signature, algorithm ^ 0x100)
    assert not rsa_pss_verifies(key.modulus, 4, b"message", signature, algorithm)  # no exponent of RSA
    with pytest.raises(InvalidSignature):
        public.verify(signature, b"message", padding.PSS(padding.MGF1(digest), 0), digest)


def test_pss_salts_differ_between_messages():
    key = vendor_key("naples", "ark")
    numbers = [rsa_pss_sign(key, hashlib.sha256(bytes([n])).digest(), Algorithm.RSA_SHA256) for n in range(3)]
    assert len(set(numbers)) == 3
