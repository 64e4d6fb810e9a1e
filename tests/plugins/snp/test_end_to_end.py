"""A guest's whole life: launch with two vCPUs, shared pages, AP creation, a verified report, keys, certificates."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from sevlab.core.events import Done, Resumed, Schedule
from sevlab.plugins.sev import public_point
from sevlab.plugins.snp import driver, keys
from sevlab.plugins.snp.attestation import chip_id_of
from sevlab.plugins.snp.cert_table import GUIDS, build_cert_table, parse_cert_table
from sevlab.plugins.snp.chain import ca_certificate, vcek_certificate
from sevlab.plugins.snp.driver import LaunchPage
from sevlab.plugins.snp.hypervisor import snp_hypervisor
from sevlab.plugins.snp.launch_digest import NO_DIGEST, VMSA_GPA, PageType, extend, page_contents
from sevlab.plugins.snp.messages import KeyRequest, KeyResponse, MessageType, ReportRequest, ReportResponse
from sevlab.plugins.snp.records import CreateAp, MessageAnswered, SendMessage, SetPages
from sevlab.plugins.snp.report import parse_report
from sevlab.plugins.snp.rmp import asid_pages, state_of
from sevlab.plugins.snp.states import PageState, snp_state
from sevlab.plugins.snp.tcb import Tcb
from sevlab.plugins.snp.verify import verify_report
from sevlab.plugins.snp.x509 import parse_der

from tests.plugins.snp.support import (
    GHCB_GPA,
    PRIVATE_GPA,
    SECRETS_GPA,
    SHARED_GPA,
    context,
    snp_vmsa,
    talking_machine,
)

CODE = b"\xf4" * 4096
CODE_GPA = 0x6000
AT = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def running():
    machine, (guest,) = talking_machine(vcpus=2, pages=(LaunchPage(CODE_GPA, PageType.NORMAL, CODE),))
    snp_hypervisor(machine).certificates = certificates(machine)
    machine.mark()
    return machine, guest


def certificates(machine):
    """What a host gets from AMD's key server: the table of VCEK, ASK and ARK."""
    platform = snp_state(machine).platform
    scalar = keys.signing_scalar(keys.vcek_stick(machine, platform.reported_tcb))
    tcb = Tcb.of(platform.reported_tcb, "milan")
    vcek = vcek_certificate("milan", public_point(scalar), tcb=tcb, chip_id=chip_id_of(machine))
    rows = (("vcek", vcek), ("ask", ca_certificate("milan", "ask")), ("ark", ca_certificate("milan", "ark")))
    return build_cert_table([(GUIDS[name], der) for name, der in rows])


def ask(machine, kind, payload, *, vcpu=0, vmpck=0, pages=0):
    outcome = machine.apply(SendMessage(vcpu, SECRETS_GPA, SHARED_GPA, vmpck, kind, payload, pages))
    return outcome.first(MessageAnswered)


def expected_digest():
    digest = NO_DIGEST
    digest = extend(digest, PageType.SECRETS, SECRETS_GPA, NO_DIGEST)
    for gpa in (GHCB_GPA, *range(SHARED_GPA, SHARED_GPA + 6 * 4096, 4096)):
        digest = extend(digest, PageType.ZERO, gpa, NO_DIGEST)
    digest = extend(digest, PageType.NORMAL, CODE_GPA, page_contents(PageType.NORMAL, CODE))
    return extend(digest, PageType.VMSA, VMSA_GPA, page_contents(PageType.VMSA, snp_vmsa()))


@pytest.mark.slow
def test_launch_attest_derive_and_start_an_ap(running):
    machine, guest = running
    machine.reset()
    assert context(machine, guest).launch_digest == expected_digest()
    assert machine.access.guest_physical_read(machine.vcpus[0], CODE_GPA, 4096, c_bit=True) == CODE

    answer = ask(machine, MessageType.REPORT_REQ, ReportRequest.build(report_data=b"nonce".ljust(64)), pages=4)
    report = parse_report(ReportResponse.from_bytes(answer.payload).report)
    assert report.measurement == expected_digest()
    assert report.report_data == b"nonce".ljust(64)
    chain = {entry.kind: parse_der(entry.data, entry.kind) for entry in parse_cert_table(answer.certificates)}
    checks = verify_report(report, list(chain.values()), at=AT, trusted_ark=chain["ark"])
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    broken = report.replace(measurement=b"x" * 48)
    assert not all(
        check.passed for check in verify_report(broken, list(chain.values()), at=AT, trusted_ark=chain["ark"])
    )

    wish = KeyRequest.build(guest_field_select=0b1011)
    first, second = (KeyResponse.from_bytes(ask(machine, MessageType.KEY_REQ, wish).payload) for _ in range(2))
    assert first.status == second.status == 0
    assert first.key == second.key != bytes(32)

    assert Done() in machine.apply(CreateAp(0, 1, PRIVATE_GPA, 1, 0, snp_vmsa(rip=0x9000))).records
    assert machine.apply(Schedule()).first(Resumed) == Resumed(1, 0x9000)

    assert Done() in machine.apply(SetPages(0, PRIVATE_GPA + 0x1000, 2, 0, False)).records
    shared = machine.hypervisor.vms[0].memory_spa + PRIVATE_GPA + 0x1000
    assert state_of(machine, shared) is PageState.HYPERVISOR


def test_the_end_gives_everything_back(running):
    machine, guest = running
    machine.reset()
    vm = machine.hypervisor.vms[0]
    machine.hypervisor.stop(machine, 0, "the owner has enough")
    for spa in (*range(vm.memory_spa, vm.memory_spa + vm.memory_bytes, 4096), snp_state(machine).vcpus[0].vmsa_spa):
        driver.rmp_update(machine, spa)
    assert asid_pages(machine, guest.asid) == 0
    driver.stop(machine, guest)
    driver.flush(machine)
    assert driver.begin_launch(machine, 0).asid == guest.asid
