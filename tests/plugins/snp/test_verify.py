"""The verification of reports: each thing that may be wrong has its failing line, and nothing else fails."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from functools import cache

import pytest
from sevlab.core.errors import ConfigError
from sevlab.plugins.sev import public_point
from sevlab.plugins.snp.chain import ca_certificate, sign_report, vcek_certificate, vlek_certificate
from sevlab.plugins.snp.report import AttestationReport, parse_report
from sevlab.plugins.snp.tcb import Tcb
from sevlab.plugins.snp.verify import check_policy, verify_report
from sevlab.plugins.snp.x509 import parse_der

AT = datetime(2026, 6, 1, tzinfo=UTC)
SCALAR = 777
CHIP_ID = bytes(range(1, 65))
TCB = Tcb(3, 0, 22, 213)
CPUID = {"milan": (0x19, 0x01), "genoa": (0x19, 0x11), "turin": (0x1A, 0x02)}


def tcb_of(generation):
    return TCB._replace(fmc=1) if generation == "turin" else TCB


@cache
def certificates(generation="genoa"):
    tcb, public = tcb_of(generation), public_point(SCALAR)
    made = {role: ca_certificate(generation, role) for role in ("ark", "ask", "asvk")}
    made["vcek"] = vcek_certificate(generation, public, tcb=tcb, chip_id=CHIP_ID)
    made["vlek"] = vlek_certificate(generation, public, tcb=tcb, csp_id="cloud.example")
    return {role: parse_der(der, role) for role, der in made.items()}


def report_of(generation="genoa", *, scalar=SCALAR, **fields):
    raw = tcb_of(generation).raw()
    family, model = CPUID[generation]
    chip_id = CHIP_ID[:8].ljust(64, b"\0") if generation == "turin" else CHIP_ID
    values = {
        "report_version": 5,
        "policy": 0x30000,
        "signature_algo": 1,
        "current_tcb": raw,
        "reported_tcb": raw,
        "committed_tcb": raw,
        "launch_tcb": raw,
        "cpuid_family": family,
        "cpuid_model": model,
        "chip_id": chip_id,
    }
    return parse_report(sign_report(scalar, AttestationReport.build(**values | fields)))


def failures(report, *, generation="genoa", without=(), trusted=True, at=AT, extra=()):
    chain = certificates(generation)
    given = [item for role, item in chain.items() if role not in without] + list(extra)
    checks = verify_report(report, given, at=at, trusted_ark=chain["ark"] if trusted else None)
    return [(check.subject, check.field) for check in checks if not check.passed]


@pytest.mark.parametrize("generation", CPUID)
@pytest.mark.parametrize("key_info", [0, 1 << 2], ids=["VCEK", "VLEK"])
def test_a_good_report_passes_every_check(generation, key_info):
    assert failures(report_of(generation, key_info=key_info), generation=generation) == []


def test_a_simulated_root_is_no_root_of_amd():
    assert failures(report_of(), trusted=False) == [("ARK", "root")]
    assert failures(report_of("milan"), generation="milan", extra=[certificates("genoa")["ark"]]) == []


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("vcek", [("VCEK", "certificate")]),
        ("ask", [("VCEK", "signature by ASK"), ("ASK", "certificate")]),
        ("ark", [("ASK", "signature by ARK"), ("ARK", "certificate")]),
    ],
)
def test_a_missing_certificate_is_named(missing, expected):
    found = failures(report_of(), without=(missing,))
    assert found[: len(expected)] == expected


def test_another_key_signed():
    assert failures(report_of(scalar=SCALAR + 1)) == [("report", "signature by VCEK")]


def test_of_several_keys_the_one_that_signed_is_taken():
    other = parse_der(vcek_certificate("genoa", public_point(5), tcb=TCB, chip_id=CHIP_ID), "other")
    assert failures(report_of(), extra=[other]) == []
    chain = certificates()
    mixed = [other, *chain.values()]
    assert all(check.passed for check in verify_report(report_of(), mixed, at=AT, trusted_ark=chain["ark"]))


def test_a_chain_of_another_product_does_not_fit():
    chain = certificates("milan") | {"vcek": certificates()["vcek"]}
    checks = verify_report(report_of(), list(chain.values()), at=AT, trusted_ark=chain["ark"])
    failed = [(check.subject, check.field) for check in checks if not check.passed]
    assert failed == [("VCEK", "signature by ASK")]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"reported_tcb": TCB._replace(snp=23).raw()}, [("report", "reported_tcb"), ("report", "reported TCB")]),
        ({"committed_tcb": TCB._replace(snp=23).raw()}, [("report", "committed TCB")]),
        ({"launch_tcb": TCB._replace(microcode=214).raw()}, [("report", "launch TCB")]),
        ({"chip_id": CHIP_ID[::-1]}, [("report", "chip_id")]),
        ({"chip_id": bytes(64)}, []),
        ({"cpuid_model": 0x01}, [("report", "processor")]),
        ({"cpuid_family": 0x17}, [("report", "processor")]),
        ({"report_version": 3}, []),
        ({"report_version": 2, "cpuid_family": 0, "cpuid_model": 0}, []),
        ({"key_info": 7 << 2}, [("report", "signing_key")]),
        ({"key_info": 1 << 2, "chip_id": bytes(64)}, []),
    ],
    ids=range(11),
)
def test_what_the_report_says_is_compared_with_its_key(fields, expected):
    assert failures(report_of(**fields)) == expected


@pytest.mark.parametrize(
    ("at", "valid"),
    [
        (datetime(2023, 12, 31, 23, 59, 59, tzinfo=UTC), False),
        (datetime(2024, 1, 1, tzinfo=UTC), True),
        (datetime(2045, 1, 1, tzinfo=UTC), True),
        (datetime(2045, 1, 1, 0, 0, 1, tzinfo=UTC), False),
    ],
)
def test_the_time_must_lie_in_each_validity(at, valid):
    expected = [] if valid else [("VCEK", "validity"), ("ASK", "validity"), ("ARK", "validity")]
    assert failures(report_of(), at=at) == expected


def test_an_endorsement_key_without_amds_extensions_is_refused():
    chain = certificates()
    bare = chain["vcek"]
    stripped = type(bare)(bare.name, bare.der, bare.x509, bare.serial, None)
    given = [stripped, chain["ask"], chain["ark"]]
    checks = verify_report(report_of(), given, at=AT, trusted_ark=chain["ark"])
    assert [(check.subject, check.field) for check in checks if not check.passed] == [("VCEK", "AMD's extensions")]


# The owner's rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "passed", "got"),
    [
        (("policy.debug", "=", "0"), True, "0"),
        (("policy.debug", "=", "1"), False, "0"),
        (("policy", "=", "0x30000"), True, "196608"),
        (("reported_tcb.snp", ">=", "22"), True, "22"),
        (("reported_tcb.snp", ">=", "23"), False, "22"),
        (("measurement", "=", "AB" * 48), True, "ab" * 48),
        (("measurement", "=", "ab" * 47), False, "ab" * 48),
        (("platform_info.tio_en", "=", "0"), True, "0"),
    ],
)
def test_rules_of_the_owner(rule, passed, got):
    (check,) = check_policy(report_of(measurement=b"\xab" * 48), [rule])
    assert (check.passed, check.got) == (passed, got)


@pytest.mark.parametrize("wanted", ["0", "1"])
@pytest.mark.parametrize("field", ["cpuid_family", "launch_mit_vector", "platform_info.tio_en", "reported_tcb.fmc"])
def test_an_absent_field_satisfies_no_rule(field, wanted):
    report = report_of(report_version=2, cpuid_family=0, cpuid_model=0)
    for relation in ("=", ">="):
        (check,) = check_policy(report, [(field, relation, wanted)])
        assert not check.passed
        assert check.got == "absent in version 2"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("policy.debugging", "=", "0"), "policy 'policy.debugging': no such field; there are .*policy.debug"),
        (("measurement", ">=", "00"), "policy 'measurement' holds bytes: use measurement=HEX"),
        (("guest_svn", "=", "x"), "policy 'guest_svn': 'x': expected a number"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(rule, message):
    with pytest.raises(ConfigError, match=message):
        check_policy(report_of(), [rule])


def test_every_line_has_a_source():
    chain = certificates()
    checks = verify_report(report_of(), list(chain.values()), at=AT)
    assert all(check.source and check.expected and check.got for check in checks)
    assert len({(check.subject, check.field) for check in checks}) == len(checks)
    assert len(list(itertools.filterfalse(lambda check: check.passed, checks))) == 1
