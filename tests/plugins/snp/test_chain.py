"""The simulated chain: it verifies like a real one, says the same things, and is no chain of AMD's."""

from __future__ import annotations

import pytest
from sevlab.plugins.sev import public_point
from sevlab.plugins.sev.chain import ARK_ROOTS
from sevlab.plugins.snp.chain import PRODUCTS, ca_certificate, sign_report, vcek_certificate, vlek_certificate
from sevlab.plugins.snp.report import AttestationReport, parse_report
from sevlab.plugins.snp.tcb import Tcb
from sevlab.plugins.snp.verify import report_signature_verifies
from sevlab.plugins.snp.x509 import issued_by, modulus_digest, parse_der

SCALAR = 0x1234567
CHIP_ID = bytes(range(64))


def tcb_of(generation):
    return Tcb(3, 0, 22, 213, fmc=1 if generation == "turin" else None)


def vcek_of(generation):
    return parse_der(
        vcek_certificate(generation, public_point(SCALAR), tcb=tcb_of(generation), chip_id=CHIP_ID), "vcek"
    )


@pytest.mark.slow
@pytest.mark.parametrize("generation", PRODUCTS)
def test_everybody_is_issued_by_whom_amd_has_issue_it(generation):
    ark, ask, asvk = (parse_der(ca_certificate(generation, role)) for role in ("ark", "ask", "asvk"))
    vcek = vcek_of(generation)
    vlek = parse_der(vlek_certificate(generation, public_point(SCALAR), tcb=tcb_of(generation), csp_id="cloud.example"))
    assert [item.role for item in (ark, ask, asvk, vcek, vlek)] == ["ARK", "ASK", "ASVK", "VCEK", "VLEK"]
    pairs = [(subject, issuer) for subject in (ark, ask, asvk, vcek, vlek) for issuer in (ark, ask, asvk)]
    verified = [(subject.role, issuer.role) for subject, issuer in pairs if issued_by(subject, issuer)]
    assert verified == [("ARK", "ARK"), ("ASK", "ARK"), ("ASVK", "ARK"), ("VCEK", "ASK"), ("VLEK", "ASVK")]
    assert modulus_digest(ark) not in ARK_ROOTS
    assert vcek.serial == vlek.serial == 0
    assert vcek.extensions.tcb == vlek.extensions.tcb == tcb_of(generation)
    assert vcek.extensions.hwid == (CHIP_ID[:8] if generation == "turin" else CHIP_ID)
    assert (vcek.extensions.csp_id, vlek.extensions.csp_id) == (None, "cloud.example")
    assert vcek.extensions.product_name == PRODUCTS[generation]


def test_the_same_inputs_give_the_same_certificate():
    assert vcek_of("milan").der == vcek_of("milan").der


def test_a_report_signed_with_the_key_verifies_and_no_other_does():
    vcek = vcek_of("genoa")
    body = AttestationReport.build(report_version=3, policy=0x30000, signature_algo=1, cpuid_family=0x19)
    report = parse_report(sign_report(SCALAR, body))
    assert report_signature_verifies(report, vcek)
    assert not report_signature_verifies(parse_report(sign_report(SCALAR + 1, body)), vcek)
    assert sign_report(SCALAR, body) == report.to_bytes()
    assert not report_signature_verifies(report, parse_der(ca_certificate("genoa", "ark")))
