"""Real attestation reports: every parsed field, who signed them, strictness, and every single changed bit."""

from __future__ import annotations

import hashlib

import pytest
from sevlab.core.errors import FormatError
from sevlab.plugins.snp.report import (
    SIGNED_BYTES,
    AttestationReport,
    PlatformInfo,
    SigningKey,
    decode_report,
    generation_of,
    parse_report,
)
from sevlab.plugins.snp.verify import report_signature_verifies
from sevlab.plugins.snp.x509 import parse_der

from tests.vectors import load_json, vector_set

FOLDER = vector_set("reports")
CERTIFICATES = vector_set("certs") / "snp"
REPORTS = load_json(FOLDER / "expected.json")["reports"]
STRICTNESS = load_json(FOLDER / "strictness.json")
DATA = {name: (FOLDER / case["file"]).read_bytes() for name, case in REPORTS.items()}

FLIPS = {
    "expected.json": ("signed_by", "policy", "measurement", "chip_id", "reported_tcb", "cpuid_model", "sig_r"),
    "strictness.json": ("set", "ok"),
}

OLDER_NAMES = {"ciphertext_hiding_dram": "ciphertext_hiding"}


def vcek(name):
    path = CERTIFICATES / f"{name}.der"
    return parse_der(path.read_bytes(), name) if path.exists() else None


@pytest.mark.parametrize("name", REPORTS)
def test_every_field_of_a_report(name):
    expected, data = REPORTS[name]["fields"], DATA[name]
    report = parse_report(data, name)
    assert report.to_bytes() == data
    assert hashlib.sha256(data).hexdigest() == REPORTS[name]["sha256"]
    fields = decode_report(report)
    derived = {
        "size": len(data),
        "version": report.report_version,
        "signed_sha384": hashlib.sha384(data[:SIGNED_BYTES]).hexdigest(),
        "sig_r": hex(int.from_bytes(report.sig_r, "little")),
        "sig_s": hex(int.from_bytes(report.sig_s, "little")),
        "tail_zero": not any(report.reserved_330),
        "reserved_after_0x208_zero": not any(report.reserved_208),
        "tcb_layout": "turin" if generation_of(report) == "turin" else "milan_genoa",
    }
    for field, value in expected.items():
        got = derived[field] if field in derived else fields[field]
        if isinstance(value, dict):
            for part, item in value.items():
                assert_part(field, part, item, got)
        elif field.endswith("mit_vector"):
            assert got == int(value, 16)
        else:
            assert got == value, field


def assert_part(field, part, value, got):
    if part == "raw":
        assert got["raw"] == int(value, 16)
    elif part == "signing_key":
        assert SigningKey(got[part]).name.lower() == value
    elif part == "reserved_mbo":
        assert got["must_be_one"] == value
    else:
        assert bool(got[part]) == bool(value) if isinstance(value, bool) else got[part] == value, (field, part)


@pytest.mark.parametrize("name", REPORTS)
def test_what_a_version_does_not_define_is_absent_and_not_false(name):
    fields = decode_report(parse_report(DATA[name], name))
    version = fields["report_version"]
    assert (fields["cpuid_family"] is None) == (version < 3)
    assert (fields["launch_mit_vector"] is None) == (version < 5)
    assert (fields["platform_info"]["alias_check_complete"] is None) == (version < 3)
    assert (fields["platform_info"]["tio_en"] is None) == (version < 5)
    assert fields["platform_info"]["tsme_en"] is not None


@pytest.mark.parametrize("name", REPORTS)
def test_exactly_the_named_keys_signed_a_report(name):
    case = REPORTS[name]
    report = parse_report(DATA[name], name)
    keys = {other: vcek(other) for other in case["signed_by"] + case["not_signed_by"]}
    verified = {other for other, key in keys.items() if key and report_signature_verifies(report, key)}
    assert verified == {other for other in case["signed_by"] if keys[other]}
    assert verified


@pytest.mark.parametrize("name", REPORTS)
def test_the_bare_signature_result_of_each_listed_mutation(name):
    case = REPORTS[name]
    key = vcek(next(other for other in case["signed_by"] if vcek(other)))
    for mutation in case["mutations"]:
        changed = bytearray(DATA[name])
        changed[int(mutation["offset"], 16)] ^= int(mutation["xor"], 16)
        report = AttestationReport.from_bytes(bytes(changed))
        assert report_signature_verifies(report, key) == mutation["ecdsa_verifies"], mutation


def survivors(name, places):
    """The bits of report `name` that may be changed without anybody noticing."""
    key = vcek(next(other for other in REPORTS[name]["signed_by"] if vcek(other)))
    left = []
    for byte, bit in places:
        changed = bytearray(DATA[name])
        changed[byte] ^= 1 << bit
        try:
            report = parse_report(bytes(changed), name)
        except FormatError:
            continue
        if report_signature_verifies(report, key):
            left.append((byte, bit))
    return left


@pytest.mark.parametrize("name", REPORTS)
def test_a_changed_bit_anywhere_in_a_report_is_noticed(name):
    assert not survivors(name, [(number // 8, number % 8) for number in range(0, 0x4A0 * 8, 41)])


@pytest.mark.long
@pytest.mark.parametrize("name", REPORTS)
def test_every_changed_bit_of_a_report_is_noticed(name):
    assert not survivors(name, [(byte, bit) for byte in range(0x4A0) for bit in range(8)])


def strict_base():
    return bytearray(AttestationReport.build(report_version=2, policy=0xA0000, signature_algo=1))


@pytest.mark.parametrize("case", STRICTNESS["must_reject_byte_changes"], ids=lambda case: case["name"])
def test_a_byte_that_must_be_zero_is_refused_with_its_offset(case):
    parse_report(bytes(strict_base()))
    changed = strict_base()
    offset = int(case["offset"], 16)
    changed[offset] = case["value"]
    with pytest.raises(FormatError) as error:
        parse_report(bytes(changed), "base")
    field = next(
        info
        for info in AttestationReport.FIELDS.values()
        if info.offset <= error.value.offset < info.offset + info.length_bytes
    )
    assert field.offset <= offset < field.offset + field.length_bytes


def test_the_processor_bytes_are_allowed_from_version_3_on():
    changed = strict_base()
    changed[0x188:0x18B] = b"\xcc\xcc\xcc"
    with pytest.raises(FormatError, match=r"offset 0x188, cpuid_family: expected zero in a report of version 2"):
        parse_report(bytes(changed))
    changed[0] = 3
    report = parse_report(bytes(changed))
    assert (report.cpuid_family, report.cpuid_model, report.cpuid_stepping) == (0xCC, 0xCC, 0xCC)


@pytest.mark.parametrize("case", STRICTNESS["platform_info"], ids=lambda case: str(case["raw"]))
def test_platform_info(case):
    changed = strict_base()
    changed[0x40:0x48] = case["raw"].to_bytes(8, "little")
    if not case["ok"]:
        with pytest.raises(FormatError, match="platform_info"):
            parse_report(bytes(changed))
        return
    parse_report(bytes(changed))
    flags = PlatformInfo.from_bytes(bytes(changed[0x40:0x48]))
    names = {
        "smt": flags.smt_en,
        "tsme": flags.tsme_en,
        "ecc": flags.ecc_en,
        "rapl_dis": flags.rapl_dis,
        "ciphertext_hiding": flags.ciphertext_hiding_dram_en,
        "alias_check": flags.alias_check_complete,
        "tio": flags.tio_en,
    }
    assert {name for name, value in names.items() if value} == set(case.get("set", ()))


@pytest.mark.parametrize("case", STRICTNESS["cpuid_eax_product"], ids=lambda case: case[0])
def test_the_processor_bytes_tell_the_generation(case):
    eax, product, stepping = int(case[0], 16), case[1], case[2]
    family = (eax >> 20 & 0xFF) + (eax >> 8 & 0xF)
    model = (eax >> 16 & 0xF) << 4 | eax >> 4 & 0xF
    data = AttestationReport.build(report_version=3, cpuid_family=family, cpuid_model=model, cpuid_stepping=eax & 0xF)
    report = AttestationReport.from_bytes(data, version=3)
    assert generation_of(report) == product.lower()
    assert report.cpuid_stepping == stepping
