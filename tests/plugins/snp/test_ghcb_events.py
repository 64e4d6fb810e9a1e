"""Guest requests, AP creation, VMPLs, #HV: what the hypervisor answers, and what VMRUN demands."""

from __future__ import annotations

import pytest
from sevlab.core.events import Injected, MemoryWrite, Party, Resumed, Schedule, Space, Stopped, VmcbWrite, VmExit
from sevlab.core.svm import EVENT_VALID
from sevlab.plugins.sev import Status
from sevlab.plugins.sev_es import Ghcb, GhcbReply, MsrReply, NaeCode, Vmgexit, VmgexitIgnored, Vmsa
from sevlab.plugins.snp import driver
from sevlab.plugins.snp.guest_pages import HvDoorbell
from sevlab.plugins.snp.hypervisor import host_vcpu, snp_hypervisor
from sevlab.plugins.snp.messages import ReportRequest, seal
from sevlab.plugins.snp.records import CreateAp, MessageAnswered, SendMessage
from sevlab.plugins.snp.rmp import read_entry
from sevlab.plugins.snp.states import snp_state

from tests.plugins.snp.support import (
    GHCB_GPA,
    PRIVATE_GPA,
    SECRETS_GPA,
    SHARED_GPA,
    context,
    snp_vmsa,
    talking_machine,
)

AP_VMSA = PRIVATE_GPA + 0x1000
ALL_FEATURES = 0b111111


@pytest.fixture(scope="module")
def shared():
    machine, (guest,) = talking_machine(vcpus=3, features=ALL_FEATURES)
    return machine, guest


@pytest.fixture
def machine(shared):
    shared[0].reset()
    return shared[0]


@pytest.fixture
def guest(shared):
    return shared[1]


def event(machine, code, info_1=0, info_2=0, *, vcpu=0, **fields):
    """The hypervisor's reply to one event by the page."""
    page = Ghcb.build(sw_exit_code=code, sw_exit_info_1=info_1, sw_exit_info_2=info_2, protocol_version=2, **fields)
    return machine.apply(Vmgexit(vcpu, GHCB_GPA, page)).first(GhcbReply)


def spa_of(machine, gpa):
    return machine.hypervisor.vms[0].memory_spa + gpa


# Guest requests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_gpa", "response_gpa"),
    [(SHARED_GPA + 8, SHARED_GPA + 0x1000), (SHARED_GPA, SHARED_GPA + 0x1010), (SHARED_GPA, SHARED_GPA), (1 << 40, 0)],
)
def test_a_guest_request_needs_two_pages(machine, request_gpa, response_gpa):
    reply = event(machine, NaeCode.SNP_GUEST_REQUEST, request_gpa, response_gpa)
    assert (reply.info_1, reply.info_2) == (2, 5)


def test_a_guest_request_carries_the_firmware_s_error(machine):
    reply = event(machine, NaeCode.SNP_GUEST_REQUEST, SHARED_GPA, SHARED_GPA + 0x1000)
    assert (reply.info_1, reply.info_2) == (0, Status.INVALID_PARAM)


def test_a_response_into_a_private_page_is_refused(machine, guest):
    message = seal(context(machine, guest).vmpcks[0], ReportRequest.build(), seqno=1, kind=5, vmpck=0)
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, SHARED_GPA, False, message))
    reply = event(machine, NaeCode.SNP_GUEST_REQUEST, SHARED_GPA, PRIVATE_GPA)
    assert (reply.info_1, reply.info_2) == (2, 5)


def test_certificates_come_with_a_report_and_their_size_when_they_do_not_fit(machine, guest):
    snp_hypervisor(machine).certificates = b"c" * 5000
    message = seal(context(machine, guest).vmpcks[0], ReportRequest.build(), seqno=1, kind=5, vmpck=0)
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, SHARED_GPA, False, message))
    extended = NaeCode.SNP_EXTENDED_GUEST_REQUEST
    places = (SHARED_GPA, SHARED_GPA + 0x1000)
    reply = event(machine, extended, *places, rax=SHARED_GPA + 0x2000, rbx=1)
    assert (reply.info_1, reply.info_2, reply.rbx) == (0, 1 << 32, 2)
    assert context(machine, guest).message_counts[0] == 0
    assert event(machine, extended, *places, rax=SHARED_GPA + 0x2008, rbx=2).info_2 == 5
    assert event(machine, extended, *places, rax=SHARED_GPA + 0x2000).info_2 == 4
    reply = event(machine, extended, *places, rax=SHARED_GPA + 0x2000, rbx=2)
    assert (reply.info_1, reply.info_2) == (0, 0)
    assert machine.memory.read(spa_of(machine, SHARED_GPA + 0x2000), 5001, None) == b"c" * 5000 + b"\0"


def test_the_reference_guest_gets_certificates_or_learns_how_many_pages(machine):
    snp_hypervisor(machine).certificates = b"c" * 5000
    ask = lambda pages: machine.apply(SendMessage(0, SECRETS_GPA, SHARED_GPA, 0, 5, ReportRequest.build(), pages))
    assert ask(1).first(MessageAnswered).certificates == b""
    assert ask(2).first(MessageAnswered).certificates[:5001] == b"c" * 5000 + b"\0"
    assert ask(0).first(MessageAnswered).certificates == b""


# AP creation, VMRUN ---------------------------------------------------------------------------------------------------


def create(machine, **fields):
    step = {"vcpu": 0, "apic_id": 1, "vmsa_gpa": AP_VMSA, "request": 1, "vmpl": 0, "vmsa": snp_vmsa(rip=0x1234)}
    return machine.apply(CreateAp(**(step | fields)))


def test_an_ap_starts_where_its_save_area_says(machine):
    assert machine.vcpus[1].halted
    assert () in create(machine).records
    assert not machine.vcpus[1].halted
    outcome = machine.apply(Schedule())
    assert outcome.first(Resumed) == Resumed(1, 0x1234)
    assert snp_state(machine).vcpus[1].vmsa_spa == spa_of(machine, AP_VMSA)


def test_a_save_area_in_use_cannot_be_taken_until_the_ap_is_gone(machine):
    create(machine)
    machine.apply(Schedule())
    spa = spa_of(machine, AP_VMSA)
    assert driver.rmp_update(machine, spa) == 3
    assert () in create(machine, request=2, vmsa=b"").records
    assert machine.vcpus[1].halted
    assert driver.rmp_update(machine, spa) == 0


@pytest.mark.parametrize(
    ("info_1", "gpa", "rax"),
    [
        (9 << 32 | 1, AP_VMSA, 1),
        (1 << 32 | 3, AP_VMSA, 1),
        (1 << 32 | 4 << 16 | 1, AP_VMSA, 1),
        (1 << 32 | 1 << 20 | 1, AP_VMSA, 1),
        (1 << 32 | 1, AP_VMSA + 8, 1),
        (1 << 32 | 1, 0x20_0000, 1),
        (1 << 32 | 1, 1 << 40, 1),
        (1 << 32 | 1, AP_VMSA, 3),
        (1 << 32 | 1, AP_VMSA, 0),
    ],
    ids=["APIC id", "request", "VMPL", "reserved", "alignment", "2 MiB", "no memory", "features", "no features"],
)
def test_ap_creation_is_checked(machine, info_1, gpa, rax):
    reply = event(machine, NaeCode.SNP_AP_CREATION, info_1, gpa, rax=rax)
    assert (reply.info_1, reply.info_2) == (2, 5)
    assert machine.vcpus[1].halted


def test_create_on_init_waits_for_the_start_up_ipi(machine):
    assert () in create(machine, request=0).records
    assert machine.vcpus[1].halted
    assert machine.slots.start_vcpu(machine, machine.vcpus[1], 0x10)
    assert not machine.vcpus[1].halted
    assert machine.apply(Schedule()).first(Resumed).rip == 0x1234


@pytest.mark.parametrize("change", ["not a VMSA", "another guest's", "the hypervisor's", "immutable", "2 MiB"])
def test_vmrun_takes_only_a_save_area_of_the_guest_s(machine, change):
    create(machine)
    spa = spa_of(machine, AP_VMSA)
    if change == "not a VMSA":
        machine.vcpus[1].vmcb.vmsa_pa = spa_of(machine, PRIVATE_GPA)
    elif change == "another guest's":
        machine.vcpus[1].vmcb.guest_asid = 7
    elif change == "immutable":
        entry = read_entry(machine, spa)
        from sevlab.plugins.snp.rmp import write_entry

        write_entry(machine, spa, entry.low | 4, entry.high)
    elif change == "2 MiB":
        machine.vcpus[1].vmcb.vmsa_pa = spa + 1
    else:
        assert driver.rmp_update(machine, spa) == 0
    outcome = machine.apply(Schedule())
    assert outcome.first(VmExit).exit_code == (1 << 64) - 1
    assert outcome.first(Stopped)


@pytest.mark.parametrize(
    ("features", "allowed", "runs"),
    [
        (1, 0, True),
        (0, 0, False),
        (1 | 1 << 3 | 1 << 4, 0, False),
        (1 | 1 << 5, 1 << 63 | 1, False),
        (1 | 1 << 5, 1 << 63 | 1 | 1 << 5, True),
    ],
)
def test_features_of_a_save_area(machine, features, allowed, runs):
    machine.vcpus[1].vmcb.allowed_sev_features = allowed
    create(machine, vmsa=snp_vmsa(sev_features=features))
    assert (machine.apply(Schedule()).first(Resumed) is not None) is runs


# VMPLs ----------------------------------------------------------------------------------------------------------------


def test_a_vcpu_runs_at_another_vmpl_and_comes_back(machine):
    create(machine, apic_id=0, vmpl=1, vmsa=snp_vmsa(rip=0x5555, vmpl=1))
    assert host_vcpu(machine, 0).vmsas[1] == spa_of(machine, AP_VMSA)
    reply = event(machine, NaeCode.SNP_RUN_VMPL, 1)
    assert reply.info_1 == 0
    assert (machine.vcpus[0].vmpl, machine.vcpus[0].regs.rip) == (1, 0x5555)
    assert machine.apply(Vmgexit(0, 1 << 12 | GHCB_GPA & 0, b"")).first(VmgexitIgnored) is None
    assert machine.apply(Vmgexit(0, 0x016, b"")).first(MsrReply).value == 0x017
    assert machine.vcpus[0].vmpl == 0


@pytest.mark.parametrize("vmpl", [1, 2, 3, 4, 0xFFFF_FFFF])
def test_a_vmpl_without_save_area_is_refused_in_both_forms(machine, vmpl):
    reply = event(machine, NaeCode.SNP_RUN_VMPL, vmpl)
    assert (reply.info_1, reply.info_2) == (2, 5)
    assert machine.apply(Vmgexit(0, (vmpl & 0xFF) << 32 | 0x016, b"")).first(MsrReply).value == 1 << 32 | 0x017


def test_each_vmpl_registers_its_own_ghcb(machine):
    create(machine, apic_id=0, vmpl=1, vmsa=snp_vmsa(vmpl=1))
    event(machine, NaeCode.SNP_RUN_VMPL, 1)
    outcome = machine.apply(Vmgexit(0, GHCB_GPA, Ghcb.build(sw_exit_code=0x72, sw_exit_info_1=0, sw_exit_info_2=0)))
    assert (outcome.first(GhcbReply).info_1, outcome.first(GhcbReply).info_2) == (2, 1)


# Features -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [NaeCode.HV_DOORBELL, NaeCode.HV_IPI, NaeCode.APIC_ID_LIST, NaeCode.SNP_RUN_VMPL],
    ids=lambda code: code.name,
)
def test_an_event_behind_a_feature_that_is_not_offered_is_unknown(machine, code):
    machine.components["sev_es"].features = 0b11
    reply = event(machine, code)
    assert (reply.info_1, reply.info_2) == (2, 6)


def test_the_list_of_apic_ids(machine):
    assert event(machine, NaeCode.APIC_ID_LIST, 0).rax == 1
    assert event(machine, NaeCode.APIC_ID_LIST, SHARED_GPA, rax=1).info_1 == 0
    raw = machine.memory.read(spa_of(machine, SHARED_GPA), 16, None)
    assert [int.from_bytes(raw[n : n + 4], "little") for n in (0, 4, 8, 12)] == [3, 0, 1, 2]


# #HV ------------------------------------------------------------------------------------------------------------------

DOORBELL = SHARED_GPA + 0x3000


def test_the_doorbell_page_is_set_asked_and_cleared(machine):
    ones = (1 << 64) - 1
    assert event(machine, NaeCode.HV_DOORBELL, 0).info_2 == ones
    assert event(machine, NaeCode.HV_DOORBELL, 2).info_2 == ones
    assert event(machine, NaeCode.HV_DOORBELL, 1, DOORBELL).info_2 == DOORBELL
    assert event(machine, NaeCode.HV_DOORBELL, 2).info_2 == DOORBELL
    assert event(machine, NaeCode.HV_DOORBELL, 3).info_2 == 0
    assert event(machine, NaeCode.HV_DOORBELL, 2).info_2 == ones
    for operation, gpa in ((1, DOORBELL + 1), (1, 1 << 40), (4, 0)):
        assert event(machine, NaeCode.HV_DOORBELL, operation, gpa).info_2 == 5


def doorbell(machine):
    return HvDoorbell.from_bytes(machine.memory.read(spa_of(machine, DOORBELL), HvDoorbell.SIZE, None))


def test_an_ipi_is_posted_and_signalled_once(machine):
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, DOORBELL, False, bytes(64)))
    event(machine, NaeCode.HV_DOORBELL, 1, DOORBELL)
    page = Ghcb.build(sw_exit_code=NaeCode.HV_IPI, sw_exit_info_1=0x40, sw_exit_info_2=0, protocol_version=2)
    outcome = machine.apply(Vmgexit(0, GHCB_GPA, page))
    assert outcome.first(Injected).event == EVENT_VALID | 3 << 8 | 28
    assert (doorbell(machine).pending_vector, doorbell(machine).no_further_signal) == (0x40, 1)
    page = Ghcb.build(sw_exit_code=NaeCode.HV_IPI, sw_exit_info_1=0x80, sw_exit_info_2=0, protocol_version=2)
    assert machine.apply(Vmgexit(0, GHCB_GPA, page)).first(Injected) is None
    assert doorbell(machine).pending_vector == 0x80
    assert event(machine, NaeCode.HV_IPI, 9 << 32 | 0x40).info_2 == 5
    assert event(machine, NaeCode.HV_IPI, 3 << 18 | 0x40).info_1 == 0


def inject(machine, vcpu, word):
    machine.apply(VmcbWrite(vcpu, 0xA8, word.to_bytes(8, "little")))
    return machine.apply(Schedule())


@pytest.mark.unverified
def test_restricted_injection_lets_only_hv_in():
    machine, _ = talking_machine(vmsa=snp_vmsa(sev_features=1 | 1 << 3))
    assert inject(machine, 0, EVENT_VALID | 3 << 8 | 28).first(Injected)
    assert inject(machine, 0, EVENT_VALID | 0x30).first(VmExit).exit_code == (1 << 64) - 1


@pytest.mark.unverified
def test_alternate_injection_ignores_the_vmcb():
    machine, _ = talking_machine(vmsa=snp_vmsa(sev_features=1 | 1 << 4))
    outcome = inject(machine, 0, EVENT_VALID | 0x30)
    assert outcome.first(Injected) is None
    assert outcome.first(Resumed)


def test_without_either_the_hypervisor_injects_what_it_likes(machine):
    assert inject(machine, 0, EVENT_VALID | 0x30).first(Injected)


def test_the_save_area_keeps_the_registers_from_the_host(machine):
    machine.vcpus[0].regs.rbx = 0x1122_3344_5566_7788
    machine.apply(Schedule())
    spa = snp_state(machine).vcpus[0].vmsa_spa
    key = machine.access.key_of(machine.vcpus[0].asid, c_bit=True)
    assert Vmsa.from_bytes(machine.memory.read(spa, 4096, key)).rbx == 0x1122_3344_5566_7788
    assert (0x1122_3344_5566_7788).to_bytes(8, "little") not in machine.memory.dram(spa, 4096)
