"""The demo chapter of SNP: a guest is launched, shares a page, attests itself; a hypervisor tries the old tricks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from sevlab.core.config import GuestConfig
from sevlab.core.events import Faulted, MemoryRead, MemoryWrite, NptEdit, Party, Space, VmExit
from sevlab.core.machine import Machine
from sevlab.core.testing import make_machine
from sevlab.plugins.sev import public_point
from sevlab.plugins.sev_es import GuestSetup, initial_vmsa
from sevlab.plugins.snp import driver, keys
from sevlab.plugins.snp.attestation import chip_id_of
from sevlab.plugins.snp.chain import ca_certificate, vcek_certificate
from sevlab.plugins.snp.driver import LaunchPage
from sevlab.plugins.snp.launch_digest import PageType
from sevlab.plugins.snp.messages import MessageType, ReportRequest, ReportResponse
from sevlab.plugins.snp.records import MessageAnswered, SendMessage, SetPages
from sevlab.plugins.snp.report import parse_report
from sevlab.plugins.snp.rmp import state_of
from sevlab.plugins.snp.states import snp_state
from sevlab.plugins.snp.tcb import Tcb
from sevlab.plugins.snp.verify import verify_report
from sevlab.plugins.snp.x509 import parse_der

SECRETS, GHCB, SHARED, PRIVATE = 0x3000, 0x8000, 0xA000, 0x20000
AT = datetime(2026, 1, 1, tzinfo=UTC)


def chapter(say: Callable[[str], object]) -> None:
    """Launch, share, attest, verify; then replay, remap and take a page away."""
    machine = make_machine(
        "snp",
        guests=(GuestConfig(name="confidential", memory_bytes=4 << 20),),
        memory_bytes=64 << 20,
        options={"sev_es": {"features": 3}},
    )
    guest = driver.begin_launch(machine, 0)
    for gpa, kind in ((SECRETS, PageType.SECRETS), (GHCB, PageType.ZERO), (PRIVATE, PageType.ZERO)):
        driver.load(machine, 0, guest, LaunchPage(gpa, kind))
    for gpa in (SHARED, SHARED + 0x1000):
        driver.load(machine, 0, guest, LaunchPage(gpa, PageType.ZERO))
    driver.load_vmsa(machine, 0, guest, initial_vmsa("qemu", sev_features=1))
    driver.finish(machine, guest)
    context = snp_state(machine).platform.guests[guest.gctx_spa]
    say(f"   The firmware has launched the guest under ASID {guest.asid}; its launch digest is")
    say(f"     {context.launch_digest.hex()}")

    machine.apply(SetPages(0, GHCB, 1, 0, False))
    machine.apply(GuestSetup(0, GHCB))
    machine.apply(SetPages(0, SHARED, 2, 0, False))
    spa = machine.hypervisor.vms[0].memory_spa
    say("\n   The guest rescinds and shares three pages (PVALIDATE, then a page state change):")
    for gpa in (GHCB, SHARED, PRIVATE):
        say(f"     {gpa:#7x}  {state_of(machine, spa + gpa).name}")

    _attest(machine, say)
    _attack(machine, say, spa)


def _attest(machine: Machine, say: Callable[[str], object]) -> None:
    wish = ReportRequest.build(report_data=b"a nonce of the verifier".ljust(64, b"."))
    answer = machine.apply(SendMessage(0, SECRETS, SHARED, 0, MessageType.REPORT_REQ, wish, 0)).first(MessageAnswered)
    assert answer is not None
    report = parse_report(ReportResponse.from_bytes(answer.payload).report)
    scalar = keys.signing_scalar(keys.vcek_stick(machine, report.reported_tcb))
    tcb = Tcb.of(report.reported_tcb, "milan")
    vcek = vcek_certificate("milan", public_point(scalar), tcb=tcb, chip_id=chip_id_of(machine))
    ders = {"vcek": vcek, "ask": ca_certificate("milan", "ask"), "ark": ca_certificate("milan", "ark")}
    chain = [parse_der(der, role) for role, der in ders.items()]
    say("\n   It asks the firmware for a report, through the hypervisor; the verifier checks it against the chain:")
    for check in verify_report(report, chain, at=AT, trusted_ark=chain[-1]):
        say(f"     {'ok  ' if check.passed else 'FAIL'} {check.subject:<7} {check.field:<28} {check.got}")


def _attack(machine: Machine, say: Callable[[str], object], spa: int) -> None:
    say("\n   The hypervisor tries what works on plain SEV:")
    machine.access.guest_physical_write(machine.vcpus[0], PRIVATE, b"secret", c_bit=True)
    step = MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, spa + PRIVATE, False, bytes(16))
    fault = machine.apply(step).first(Faulted)
    assert fault is not None
    say(f"     write old ciphertext back    #PF, error code {fault.error_code:#x}: the page is assigned")
    asid = machine.vcpus[0].vmcb.guest_asid
    driver.rmp_update(machine, spa + PRIVATE)
    driver.rmp_update(machine, spa + PRIVATE, gpa=PRIVATE, assigned=1, asid=asid)
    fault = machine.apply(MemoryRead(Party.GUEST, 0, Space.GPA, PRIVATE, True, 6)).first(Faulted)
    assert fault is not None
    say(f"     take it and give it back     #VC, error code {fault.error_code:#x}: the guest did not validate it")
    machine.apply(NptEdit(0, PRIVATE, spa + SECRETS, 4096, 3))
    exit_ = machine.apply(MemoryRead(Party.GUEST, 0, Space.GPA, PRIVATE, True, 6)).first(VmExit)
    assert exit_ is not None
    say(f"     map another page there       #NPF, EXITINFO1 {exit_.exit_info_1:#x}: it belongs to another address")
