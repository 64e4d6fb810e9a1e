"""Reports of the simulated firmware verify against the certificates of the simulated key server, and no others."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from sevlab.plugins.snp.attestation import make_report
from sevlab.plugins.snp.cert_table import parse_cert_table
from sevlab.plugins.snp.key_server import certificate_table, vcek_certificates, vlek_certificates
from sevlab.plugins.snp.keys import STICK_BYTES, vlek_sticks
from sevlab.plugins.snp.report import SigningKey, parse_report
from sevlab.plugins.snp.states import snp_state
from sevlab.plugins.snp.tcb import Tcb
from sevlab.plugins.snp.verify import verify_report
from sevlab.plugins.snp.x509 import parse_der

from tests.plugins.snp.support import context, running, snp_machine

AT = datetime(2026, 6, 1, tzinfo=UTC)
SECRET = b"provider"


def failures(report, certificates):
    chain = {kind: parse_der(der, kind) for kind, der in certificates.items()}
    checks = verify_report(parse_report(report), list(chain.values()), at=AT, trusted_ark=chain["ark"])
    return [(check.subject, check.field) for check in checks if not check.passed]


def signed(machine, key=SigningKey.VCEK):
    guest = context(machine, running(machine))
    return make_report(machine, guest, report_data=b"n" * 64, vmpl=0, signing_key=key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("generation", "version"), [("milan", 2), ("milan", 3), ("genoa", 2), ("genoa", 4), ("turin", 3), ("turin", 5)]
)
def test_a_report_of_every_version_and_generation_verifies(generation, version):
    machine = snp_machine(generation=generation, options={"snp": {"report_version": version}})
    assert failures(signed(machine), vcek_certificates(machine)) == []


def test_the_key_follows_chip_and_tcb():
    machine, other = snp_machine(), snp_machine(seed=b"another chip")
    report = signed(machine)
    assert ("report", "signature by VCEK") in failures(report, vcek_certificates(other))
    platform = snp_state(machine).platform
    older = Tcb.of(platform.reported_tcb, "milan")._replace(snp=1).raw()
    assert failures(report, vcek_certificates(machine, older)) == [
        ("report", "signature by VCEK"),
        ("report", "reported_tcb"),
    ]
    platform.reported_tcb = older
    assert failures(signed(machine), vcek_certificates(machine)) == []


def test_a_loaded_vlek_signs_and_its_chain_ends_at_the_same_root():
    machine = snp_machine()
    platform = snp_state(machine).platform
    platform.vlek = vlek_sticks(SECRET, platform.reported_tcb)[-STICK_BYTES:]
    certificates = vlek_certificates("milan", SECRET, platform.reported_tcb, "cloud.example")
    assert failures(signed(machine, SigningKey.VLEK), certificates) == []
    assert failures(signed(machine, SigningKey.VCEK), certificates)[0] == ("VCEK", "certificate")
    assert parse_der(certificates["ark"]) == parse_der(vcek_certificates(machine)["ark"])


def test_the_table_holds_the_certificates_under_their_names():
    certificates = vcek_certificates(snp_machine())
    entries = parse_cert_table(certificate_table(certificates))
    assert {entry.kind: entry.data for entry in entries} == certificates
