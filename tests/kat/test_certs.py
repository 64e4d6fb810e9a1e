"""Real certificates: every parsed field, who signed whom, and every single changed bit."""

from __future__ import annotations

import hashlib

import pytest
from sevlab.core.errors import FormatError
from sevlab.plugins.sev.certificates import (
    Algorithm,
    AmdCertificate,
    EcPublicKey,
    Slot,
    Usage,
    parse_certificate,
    parse_certificates,
    slot_of,
    usage_of,
)
from sevlab.plugins.sev.chain import ARK_ROOTS, root_name, signature_verifies, verify_chain
from sevlab.plugins.snp.x509 import issued_by, modulus_digest, outer_parts, parse_der

from tests.vectors import load_json, vector_set

LEGACY = vector_set("certs") / "legacy"
EXPECTED = load_json(LEGACY / "expected.json")
SUBJECTS = EXPECTED["certs"]
DATA = {name: (LEGACY / fields["file"]).read_bytes() for name, fields in SUBJECTS.items()}

FLIPS = {
    "legacy/expected.json": ("signer", "subject", "qx", "key_id", "modulus_sha256_le", "api_minor", "sig1_algo"),
    "snp/expected.json": ("signer", "subject", "subject_cn", "serial", "not_after", "key", "hwid", "ucode_spl"),
}


def little(number):
    return int.from_bytes(number, "little")


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_field_of_a_legacy_certificate(name):
    expected, data = SUBJECTS[name], DATA[name]
    certificate = parse_certificate(data, name)
    assert certificate.to_bytes() == data
    assert len(data) == expected["size"]
    assert hashlib.sha256(data).hexdigest() == expected["sha256"]
    if isinstance(certificate, AmdCertificate):
        header = certificate.header
        modulus = certificate.modulus.to_bytes(header.modulus_bits // 8, "little")
        got = {
            "format": "amd_ca_cert",
            "version": header.certificate_version,
            "key_id": header.key_id.hex(),
            "certifying_id": header.certifying_id.hex(),
            "key_usage": hex(header.key_usage),
            "key_usage_name": certificate.usage.name.lower(),
            "pubexp_bits": header.pubexp_bits,
            "modulus_bits": header.modulus_bits,
            "reserved_zero": not any(header.reserved_28),
            "public_exponent": certificate.exponent,
            "modulus_sha256_le": hashlib.sha256(modulus).hexdigest(),
        }
    else:
        key = EcPublicKey.from_bytes(certificate.pubkey)
        slots = {}
        for slot in Slot:
            usage, algorithm, _ = slot_of(certificate, slot)
            slots[f"sig{slot.value}_usage"] = Usage(usage).name.lower()
            slots[f"sig{slot.value}_algo"] = Algorithm(algorithm).name.lower()
        got = slots | {
            "format": "sev_cert",
            "version": certificate.certificate_version,
            "api_major": certificate.api_major,
            "api_minor": certificate.api_minor,
            "usage": hex(certificate.pubkey_usage),
            "usage_name": usage_of(certificate).name.lower(),
            "pubkey_algo": Algorithm(certificate.pubkey_algo).name.lower(),
            "curve": {2: "p384"}[key.curve],
            "qx": hex(little(key.qx)),
            "qy": hex(little(key.qy)),
        }
    assert got == {field: value for field, value in expected.items() if field not in {"file", "sha256", "size"}}


def test_exactly_the_listed_pairs_of_legacy_certificates_verify():
    certificates = {name: parse_certificate(data, name) for name, data in DATA.items()}
    verified = {
        (signer, subject)
        for signer in certificates
        for subject in certificates
        if signature_verifies(certificates[signer], certificates[subject])
    }
    assert len(certificates) ** 2 == EXPECTED["n_pairs"]
    assert verified == {(pair["signer"], pair["subject"]) for pair in EXPECTED["verifies"]}


@pytest.mark.parametrize("case", EXPECTED["malformed"], ids=lambda case: case["file"])
def test_a_malformed_legacy_certificate_is_refused(case):
    data = (LEGACY / case["file"]).read_bytes()
    assert len(data) == case["size"]
    with pytest.raises(FormatError, match=rf"{case['file']}: offset {case['size']:#x}, AmdCertificate.signature"):
        parse_certificate(data, case["file"])


@pytest.mark.parametrize("generation", ["naples", "rome"])
def test_a_real_platform_chain_passes_every_check(generation):
    chain = [parse_certificate(DATA[f"{generation}-{role}"]) for role in ("pdh", "pek", "oca", "cek", "ask", "ark")]
    checks = verify_chain(chain)
    assert [check for check in checks if not check.passed] == []
    assert {(check.subject, check.field) for check in checks} >= {
        ("ARK", "root"),
        ("ARK", "signature by ARK"),
        ("ASK", "signature by ARK"),
        ("CEK", "signature by ASK"),
        ("PEK", "signature by CEK"),
        ("PEK", "signature by OCA"),
        ("OCA", "signature by OCA"),
        ("PDH", "signature by PEK"),
    }
    assert root_name(chain[-1]) == generation.title()


SIGNERS_OF = {
    subject: [pair["signer"] for pair in EXPECTED["verifies"] if pair["subject"] == subject] for subject in SUBJECTS
}


def survivors(name, places):
    """The bits of certificate `name` that may be changed without anybody noticing."""
    data = DATA[name]
    signers = {signer: parse_certificate(DATA[signer], signer) for signer in SIGNERS_OF[name]}
    left = []
    for byte, bit in places:
        changed = bytearray(data)
        changed[byte] ^= 1 << bit
        try:
            subject = parse_certificate(bytes(changed), name)
        except FormatError:
            continue
        # One's own signature is checked with the changed key.
        keys = [subject if signer == name else certificate for signer, certificate in signers.items()]
        if all(signature_verifies(key, subject) for key in keys):
            left.append((byte, bit))
    return left


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_changed_bit_in_any_field_of_a_legacy_certificate_is_noticed(name):
    step = 37  # every byte region and every bit position, in milliseconds; the long test takes all
    assert not survivors(name, [(number // 8, number % 8) for number in range(0, len(DATA[name]) * 8, step)])


@pytest.mark.long
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_changed_bit_of_a_legacy_certificate_is_noticed(name):
    assert not survivors(name, [(byte, bit) for byte in range(len(DATA[name])) for bit in range(8)])


@pytest.mark.parametrize("name", ["naples-ark", "rome-cek"])
def test_a_certificate_cut_at_any_byte_names_file_and_offset(name):
    data = DATA[name]
    for length in range(len(data)):
        with pytest.raises(FormatError) as error:
            parse_certificate(data[:length], "cut.cert")
        assert error.value.name == "cut.cert"
        assert error.value.offset == length
        assert error.value.field


def test_certificates_that_follow_each_other_are_found_with_their_offsets():
    data = DATA["rome-pdh"] + DATA["rome-ask"] + DATA["naples-ark"] + DATA["rome-pek"]
    found = parse_certificates(data)
    assert [(offset, usage_of(certificate)) for offset, certificate in found] == [
        (0, Usage.PDH),
        (0x824, Usage.ASK),
        (0x824 + 0x640, Usage.ARK),
        (0x824 + 0x640 + 0x340, Usage.PEK),
    ]
    with pytest.raises(FormatError, match=r"offset 0x824, end: expected one certificate"):
        parse_certificate(data)


# X.509 ------------------------------------------------------------------------------------------------------------

SNP = vector_set("certs") / "snp"
SNP_EXPECTED = load_json(SNP / "expected.json")
SNP_DATA = {name: (SNP / fields["file"]).read_bytes() for name, fields in SNP_EXPECTED["certs"].items()}
SPL_NAMES = {"bl_spl": "bootloader", "tee_spl": "tee", "snp_spl": "snp", "ucode_spl": "microcode", "fmc_spl": "fmc"}


@pytest.mark.parametrize("name", SNP_DATA)
def test_every_field_of_an_x509_certificate(name):
    expected = SNP_EXPECTED["certs"][name]
    certificate = parse_der(SNP_DATA[name], name)
    key = certificate.x509.public_key()
    assert hashlib.sha256(certificate.der).hexdigest() == expected["sha256"]
    assert certificate.subject == expected["subject_cn"]
    assert certificate.issuer == expected["issuer_cn"]
    assert certificate.x509.not_valid_before_utc.isoformat() == expected["not_before"]
    assert certificate.x509.not_valid_after_utc.isoformat() == expected["not_after"]
    assert certificate.serial == int(expected["serial"], 16)
    assert (f"rsa{key.key_size}" if key.key_size > 1000 else key.curve.name) == expected["key"]
    assert (expected["sig_alg"] == "rsassaPss") == (outer_parts(certificate) is not None)
    extensions = certificate.extensions
    if extensions is None:
        assert expected["amd_ext"] == {}
        return
    got = extensions.spl | {"struct_version": extensions.struct_version, "product_name": extensions.product_name}
    got["hwid"] = extensions.hwid.hex()
    assert got == {SPL_NAMES.get(field, field): value for field, value in expected["amd_ext"].items()}


def test_exactly_the_listed_pairs_of_x509_certificates_verify():
    certificates = {name: parse_der(data, name) for name, data in SNP_DATA.items()}
    verified = {
        (signer, subject)
        for signer in certificates
        for subject in certificates
        if issued_by(certificates[subject], certificates[signer])
    }
    assert verified == {(pair["signer"], pair["subject"]) for pair in SNP_EXPECTED["verifies"]}


@pytest.mark.parametrize("name", SNP_EXPECTED["chain_ok_openssl"])
def test_the_chain_of_a_real_vcek_ends_at_a_root_of_amd(name):
    generation = name.split("-")[0]
    vcek, ask, ark = (parse_der(SNP_DATA[part], part) for part in (name, f"{generation}-ask", f"{generation}-ark"))
    complete = issued_by(vcek, ask) and issued_by(ask, ark) and issued_by(ark, ark)
    assert complete == SNP_EXPECTED["chain_ok_openssl"][name]
    assert ARK_ROOTS[modulus_digest(ark)] == generation.title()


def x509_survivors(name, places):
    """The bits of certificate `name` that may be changed without anybody noticing."""
    (signer_name,) = {pair["signer"] for pair in SNP_EXPECTED["verifies"] if pair["subject"] == name}
    signer = parse_der(SNP_DATA[signer_name], signer_name)
    left = []
    for byte, bit in places:
        changed = bytearray(SNP_DATA[name])
        changed[byte] ^= 1 << bit
        try:
            subject = parse_der(bytes(changed), name)
        except FormatError:
            continue
        if issued_by(subject, subject if signer_name == name else signer):
            left.append((byte, bit))
    return left


@pytest.mark.parametrize("name", SNP_DATA)
def test_a_changed_bit_anywhere_in_an_x509_certificate_is_noticed(name):
    assert not x509_survivors(name, [(number // 8, number % 8) for number in range(0, len(SNP_DATA[name]) * 8, 43)])


@pytest.mark.long
@pytest.mark.parametrize("name", SNP_DATA)
def test_every_changed_bit_of_an_x509_certificate_is_noticed(name):
    assert not x509_survivors(name, [(byte, bit) for byte in range(len(SNP_DATA[name])) for bit in range(8)])


@pytest.mark.parametrize("name", ["milan-ark", "turin-vcek-a"])
def test_an_x509_certificate_cut_at_any_byte_names_file_and_offset(name):
    data = SNP_DATA[name]
    for length in range(len(data)):
        with pytest.raises(FormatError) as error:
            parse_der(data[:length], "cut.der")
        assert error.value.name == "cut.der"
        assert error.value.offset <= length
