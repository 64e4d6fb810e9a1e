"""One lie in each reply that `test_hostile` has not: certificates, run VMPL, #HV, CPUID."""

from __future__ import annotations

import pytest
from sevlab.core.errors import FormatError
from sevlab.core.events import CpuExit, Done, Injected, MemoryWrite, Party, Schedule, Space, VmcbWrite, VmExit
from sevlab.core.svm import EVENT_VALID, ExitCode
from sevlab.plugins.sev_es import DONE, Ghcb, GhcbReply, GuestFailed, NaeCode, Reply, Terminated, Vmgexit
from sevlab.plugins.snp.cert_table import parse_cert_table
from sevlab.plugins.snp.hypervisor import host_vcpu, make_private, snp_hypervisor, write_guest
from sevlab.plugins.snp.messages import MessageType, ReportRequest
from sevlab.plugins.snp.records import CreateAp, MessageAnswered, MessageFailed, RmpAdjust, SendMessage
from sevlab.plugins.snp.rmp import state_of
from sevlab.plugins.snp.states import PageState
from sevlab.plugins.snp.svsm import SvsmAnswered, SvsmCall, SvsmPvalidate, SvsmPvalidateEntry

from tests.plugins.snp.support import GHCB_GPA, PRIVATE_GPA, SECRETS_GPA, SHARED_GPA, snp_vmsa, talking_machine
from tests.plugins.snp.test_hostile import LIES, answer, leaks, lying_machine, msr_liar, no_nonce_twice

SECRET = b"what only the guest may know ..."


def private_bytes(machine, gpa, count):
    return machine.access.guest_physical_read(machine.vcpus[0], gpa, count, c_bit=True)


# Extended guest requests ----------------------------------------------------------------------------------------------

ASK = SendMessage(0, SECRETS_GPA, SHARED_GPA, 0, MessageType.REPORT_REQ, ReportRequest.build(report_data=b"d" * 64), 2)


@pytest.fixture(scope="module")
def extended():
    machine, liar = lying_machine(NaeCode.SNP_EXTENDED_GUEST_REQUEST)
    snp_hypervisor(machine).certificates = b"c" * 5000
    machine.mark()
    return machine, liar


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_lie_about_an_extended_request_costs_the_key_and_nothing_else(extended, lie):
    machine, liar = extended
    machine.reset()
    liar.seen.clear()
    key = private_bytes(machine, SECRETS_GPA + 0x20, 32)
    liar.lie = lie
    assert machine.apply(ASK).first(MessageFailed).key_gone
    assert machine.apply(ASK).first(MessageFailed).reason == "the VMPCK is gone"
    assert no_nonce_twice(liar.seen)
    assert not leaks(machine, key)


@pytest.mark.parametrize("pages", [0, 1, 3, 1 << 40, (1 << 64) - 1])
def test_a_wrong_number_of_pages_costs_the_certificates_only(extended, pages):
    """The same message goes once more without them, so that no number is used for two messages."""
    machine, liar = extended
    machine.reset()
    liar.lie = answer(Reply(info_2=1 << 32, rbx=pages))
    got = machine.apply(ASK).first(MessageAnswered)
    assert got.payload
    assert got.certificates == b""


def test_forged_certificates_reach_the_guest_and_do_not_pass_as_a_table(extended):
    machine, liar = extended
    machine.reset()

    def forge(honest, machine, vcpu, ghcb, scratch):
        reply = honest(machine, vcpu, ghcb, scratch)
        assert write_guest(machine, vcpu, SHARED_GPA + 0x2000, b"\xff" * 8192)
        return reply

    liar.lie = forge
    got = machine.apply(ASK).first(MessageAnswered)
    assert got.certificates == b"\xff" * 8192
    with pytest.raises(FormatError):
        parse_cert_table(got.certificates)


# Run VMPL -------------------------------------------------------------------------------------------------------------

VMSA_GPA, CAA, LIST, FRESH = PRIVATE_GPA + 0x1000, PRIVATE_GPA, PRIVATE_GPA + 0x2000, 0x18_0000


def svsm_machine():
    """A guest at VMPL1 under an SVSM, and the lies that wait for its next run-VMPL requests (None: the truth)."""
    lies = []

    def lie(honest, *arguments):
        chosen = lies.pop(0) if lies else None
        return honest(*arguments) if chosen is None else chosen(honest, *arguments)

    machine, _ = talking_machine(features=0b111111, given={"liar": msr_liar(0x016, lie)})
    for gpa in (CAA, LIST):
        assert machine.apply(RmpAdjust(0, gpa, 0, 1 | 0xF << 8)).records[0].rax == 0
    assert Done() in machine.apply(CreateAp(0, 0, VMSA_GPA, 1, 1, snp_vmsa(vmpl=1))).records
    make_private(machine, 0, FRESH, large=False)
    machine.apply(Vmgexit(0, 1 << 32 | 0x016, b""))
    entry = SvsmPvalidateEntry.build(page=FRESH >> 12, validate=1)
    machine.access.guest_physical_write(machine.vcpus[0], LIST, SvsmPvalidate.build(entries=1) + entry, c_bit=True)
    machine.mark()
    return machine, lies


@pytest.fixture(scope="module")
def svsm():
    return svsm_machine()


def says(value):
    return lambda _honest, _machine, _vcpu, _value: value


RUN_LIES = {
    "done, and nothing was run": [says(0x017)],
    "an error": [says(1 << 32 | 0x017)],
    "another response": [says(0x013)],
    "all ones": [says((1 << 64) - 1)],
    "zero": [says(0)],
    "VMPL1 instead of VMPL0": [lambda honest, machine, vcpu, _value: honest(machine, vcpu, 1 << 32 | 0x016)],
    "VMPL3 instead of VMPL0": [lambda honest, machine, vcpu, _value: honest(machine, vcpu, 3 << 32 | 0x016)],
}


@pytest.mark.parametrize("lie", RUN_LIES.values(), ids=RUN_LIES)
def test_an_svsm_that_was_not_run_did_nothing_and_the_caller_knows(svsm, lie):
    machine, lies = svsm
    machine.reset()
    lies[:] = lie
    outcome = machine.apply(SvsmCall(0, CAA, VMSA_GPA, 1, LIST, 0, 0))
    got = outcome.first(SvsmAnswered)
    assert outcome.first(Terminated) or not got.taken
    assert state_of(machine, machine.hypervisor.vms[0].memory_spa + FRESH) is PageState.GUEST_INVALID


@pytest.mark.parametrize("value", [0x017, 1 << 32 | 0x017], ids=["done", "an error"])
def test_a_caller_that_is_not_run_again_takes_no_answer(svsm, value):
    """The SVSM did its work; the hypervisor never comes back to VMPL1."""
    machine, lies = svsm
    machine.reset()
    lies[:] = [None, says(value)]
    assert not machine.apply(SvsmCall(0, CAA, VMSA_GPA, 1, LIST, 0, 0)).first(SvsmAnswered).taken
    assert state_of(machine, machine.hypervisor.vms[0].memory_spa + FRESH) is PageState.GUEST_VALID


def test_the_host_reads_no_answer_of_the_svsm(svsm):
    machine, lies = svsm
    machine.reset()
    lies.clear()
    machine.access.guest_physical_write(machine.vcpus[0], LIST + 0x800, SECRET, c_bit=True)
    assert machine.apply(SvsmCall(0, CAA, VMSA_GPA, 1, LIST, 0, 0)).first(SvsmAnswered).taken
    assert not leaks(machine, SECRET)


# #HV ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def restricted():
    machine, _ = talking_machine(features=0b111111, vmsa=snp_vmsa(sev_features=1 | 1 << 3))
    machine.access.guest_physical_write(machine.vcpus[0], PRIVATE_GPA, SECRET, c_bit=True)
    machine.mark()
    return machine


def event(machine, code, info_1=0, info_2=0):
    page = Ghcb.build(sw_exit_code=code, sw_exit_info_1=info_1, sw_exit_info_2=info_2, protocol_version=2)
    return machine.apply(Vmgexit(0, GHCB_GPA, page))


def test_a_doorbell_in_a_private_page_rings_nothing_and_spoils_nothing(restricted):
    """The hypervisor may take any address for the doorbell page: it cannot write to what is not shared."""
    machine = restricted
    machine.reset()
    host_vcpu(machine, 0).doorbell_gpa = PRIVATE_GPA
    outcome = event(machine, NaeCode.HV_IPI, 0x40)
    assert outcome.first(Injected) is None
    assert private_bytes(machine, PRIVATE_GPA, 32) == SECRET


def test_an_ipi_to_the_wrong_or_no_doorbell_leaves_private_memory_alone(restricted):
    machine = restricted
    machine.reset()
    other = SHARED_GPA + 0x3000
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, other, False, bytes(64)))
    assert event(machine, NaeCode.HV_DOORBELL, 1, other).first(GhcbReply).info_2 == other
    host_vcpu(machine, 0).doorbell_gpa = SHARED_GPA + 0x4000
    event(machine, NaeCode.HV_IPI, 0x40)
    assert machine.memory.dram(machine.hypervisor.vms[0].memory_spa + other, 64) == bytes(64)
    assert private_bytes(machine, PRIVATE_GPA, 32) == SECRET
    assert not leaks(machine, SECRET)


@pytest.mark.unverified
@pytest.mark.parametrize("word", [0x30, 2 << 8 | 2, 3 << 8 | 13, 3 << 8 | 29, 4 << 8 | 0x80], ids=hex)
def test_with_restricted_injection_a_forged_event_never_reaches_the_guest(restricted, word):
    machine = restricted
    machine.reset()
    machine.apply(VmcbWrite(0, 0xA8, (EVENT_VALID | word).to_bytes(8, "little")))
    outcome = machine.apply(Schedule())
    assert outcome.first(Injected) is None
    assert outcome.first(VmExit).exit_code == (1 << 64) - 1


# CPUID ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cpuid():
    machine, liar = lying_machine(ExitCode.CPUID, options={"sev_es": {"features": 3, "guest": "linux"}})
    system = machine.vcpus[0].system
    system.cs, system.efer = (8, 0xA9B, 0xFFFF_FFFF, 0), 0x1500
    machine.access.guest_physical_write(machine.vcpus[0], PRIVATE_GPA, SECRET, c_bit=True)
    machine.mark()
    return machine, liar


CPUID_STEP = CpuExit(0, ExitCode.CPUID, 0, 0, b"\x0f\xa2", 0)


@pytest.mark.parametrize(
    ("lie", "ends"),
    [
        (DONE, True),
        (Reply(rax=1), True),
        (Reply(info_1=2, info_2=5), True),
        (Reply(info_1=1, info_2=0x8000_0306), False),
        (Reply(info_1=7, info_2=1), True),
        (Reply(rax=(1 << 64) - 1, rbx=(1 << 64) - 1, rcx=(1 << 64) - 1, rdx=(1 << 64) - 1), False),
    ],
    ids=["no registers", "one register", "refused", "an exception", "no such answer", "other values"],
)
def test_a_lie_about_cpuid_ends_the_guest_or_is_believed(cpuid, lie, ends):
    """Values are what remains of the attack without the CPUID table; nothing else of the guest changes by them."""
    machine, liar = cpuid
    machine.reset()
    liar.lie = answer(lie)
    outcome = machine.apply(CPUID_STEP)
    assert liar.lie is None
    assert bool(outcome.first(Terminated) or outcome.first(GuestFailed)) is ends, outcome
    assert private_bytes(machine, PRIVATE_GPA, 32) == SECRET
    assert not leaks(machine, SECRET)
