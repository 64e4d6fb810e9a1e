"""Restricted injection, both sides: interrupts are posted in the doorbell page, and the guest takes them by #HV."""

from __future__ import annotations

import pytest
from sevlab.core.events import Done, Injected, Refused, Schedule, VmcbWrite
from sevlab.core.hookspecs import hookimpl
from sevlab.core.memory import TAG_HYPERVISOR
from sevlab.core.svm import EVENT_VALID
from sevlab.plugins.sev_es import DONE, ForgeReply, GhcbRequest, GuestFailed, NaeCode, Terminated
from sevlab.plugins.snp.doorbell import post_interrupt, post_nmi
from sevlab.plugins.snp.guest_pages import HvDoorbell
from sevlab.plugins.snp.hypervisor import host_vcpu
from sevlab.plugins.snp.records import HvTaken, SendHvIpi, SetDoorbell, TakeHv

from tests.plugins.snp.support import PRIVATE_GPA, SHARED_GPA, snp_vmsa, talking_machine
from tests.plugins.snp.test_hostile import plugin_of

DOORBELL = SHARED_GPA + 0x3000
HV = EVENT_VALID | 3 << 8 | 28
SELF, ALL, OTHERS = 1 << 18, 2 << 18, 3 << 18


@pytest.fixture(scope="module")
def booted():
    machine, _ = talking_machine(features=0b111111, vmsa=snp_vmsa(sev_features=1 | 1 << 3))
    assert Done() in machine.apply(SetDoorbell(0, DOORBELL)).records
    machine.mark()
    return machine


@pytest.fixture
def machine(booted):
    booted.reset()
    return booted


def page(machine):
    return HvDoorbell.from_bytes(
        machine.memory.read(machine.hypervisor.vms[0].memory_spa + DOORBELL, HvDoorbell.SIZE, None)
    )


def host_writes(machine, offset, data):
    machine.memory.write(machine.hypervisor.vms[0].memory_spa + DOORBELL + offset, data, None, TAG_HYPERVISOR)


def take(machine, tpr=0):
    return machine.apply(TakeHv(0, tpr))


@pytest.mark.unverified
def test_an_ipi_to_itself_comes_by_hv_and_needs_no_eoi(machine):
    outcome = machine.apply(SendHvIpi(0, SELF | 0x40))
    assert outcome.first(GhcbRequest).exit_code == NaeCode.HV_IPI
    assert outcome.first(Injected).event == HV
    taken = take(machine)
    assert taken.first(HvTaken) == HvTaken(0, (0x40,), (), False)
    assert taken.first(GhcbRequest) is None
    assert page(machine).to_bytes() == bytes(HvDoorbell.SIZE)


def test_the_second_waits_for_the_first_and_neither_is_lost(machine):
    for vector in (0x40, 0x80, 0x60):
        machine.apply(SendHvIpi(0, SELF | vector))
    assert page(machine).pending_vector == 0x80
    assert take(machine).first(HvTaken).vectors == (0x80,)
    outcome = machine.apply(Schedule())
    assert outcome.first(Injected).event == HV
    assert take(machine).first(HvTaken).vectors == (0x60,)
    machine.apply(Schedule())
    assert take(machine).first(HvTaken).vectors == (0x40,)
    assert machine.apply(Schedule()).first(Injected) is None


@pytest.mark.parametrize(("tpr", "taken"), [(0x3F, (0x40,)), (0x40, ()), (0x4F, ()), (0xF0, ())])
def test_an_interrupt_below_the_task_priority_stays_in_the_page(machine, tpr, taken):
    machine.apply(SendHvIpi(0, SELF | 0x40))
    assert take(machine, tpr).first(HvTaken).vectors == taken
    assert page(machine).pending_vector == (0 if taken else 0x40)
    assert not page(machine).no_further_signal
    if not taken:
        assert take(machine, 0).first(HvTaken).vectors == (0x40,)


def test_hv_is_injected_once_until_the_guest_has_looked(machine):
    assert machine.apply(SendHvIpi(0, SELF | 0x40)).first(Injected)
    assert machine.apply(SendHvIpi(0, SELF | 0x50)).first(Injected) is None
    take(machine, 0xF0)
    assert machine.apply(SendHvIpi(0, SELF | 0x60)).first(Injected)


def test_what_an_interrupt_controller_injects_is_posted_and_ends_with_an_eoi(machine):
    machine.apply(VmcbWrite(0, 0xA8, (EVENT_VALID | 0x31).to_bytes(8, "little")))
    assert machine.apply(Schedule()).first(Injected).event == HV
    outcome = take(machine)
    request = outcome.first(GhcbRequest)
    assert (request.exit_code, request.info_1, dict(request.fields)["rcx"]) == (0x7C, 1, 0x80B)


def test_an_eoi_that_the_hypervisor_refuses_ends_the_handler(machine):
    post_interrupt(machine, machine.vcpus[0], 0x31, needs_eoi=True)
    outcome = take(machine)  # nobody has an x2APIC here: #GP
    assert "EOI" in outcome.first(GuestFailed).reason
    assert outcome.first(HvTaken).vectors == (0x31,)


def test_an_nmi_is_a_flag(machine):
    machine.apply(SendHvIpi(0, SELF | 4 << 8))
    assert page(machine).nmi_pending == 1
    assert take(machine).first(HvTaken) == HvTaken(0, (), (), True)
    assert take(machine).first(HvTaken) == HvTaken(0, (), (), False)
    assert post_nmi(machine, machine.vcpus[0])


def test_an_injected_nmi_is_posted_too(machine):
    machine.apply(VmcbWrite(0, 0xA8, (EVENT_VALID | 2 << 8 | 2).to_bytes(8, "little")))
    assert machine.apply(Schedule()).first(Injected).event == HV
    assert take(machine).first(HvTaken).nmi


@pytest.mark.unverified
@pytest.mark.parametrize(
    "icr", [SELF | 15, SELF | 1 << 8 | 0x40, SELF | 5 << 8, 1 << 11 | 0x40, 7 << 32 | 0x40], ids=hex
)
def test_an_ipi_of_another_kind_is_refused_and_the_guest_told(machine, icr):
    assert "#HV IPI: 0x2, 0x5" in machine.apply(SendHvIpi(0, icr)).first(GuestFailed).reason


def test_an_ipi_to_all_and_to_others():
    machine, _ = talking_machine(vcpus=2, features=0b111111, vmsa=snp_vmsa(sev_features=1 | 1 << 3))
    machine.apply(SetDoorbell(0, DOORBELL))
    host_vcpu(machine, 1).doorbell_gpa = SHARED_GPA + 0x4000
    other = machine.hypervisor.vms[0].memory_spa + SHARED_GPA + 0x4000
    machine.memory.write(other, bytes(HvDoorbell.SIZE), None, TAG_HYPERVISOR)
    machine.apply(SendHvIpi(0, OTHERS | 0x41))
    assert (page(machine).pending_vector, machine.memory.read(other, 1, None)) == (0, b"\x41")
    machine.apply(SendHvIpi(0, ALL | 0x42))
    assert (page(machine).pending_vector, machine.memory.read(other, 1, None)) == (0x42, b"\x42")
    machine.apply(SendHvIpi(0, 1 << 32 | 0x51))
    assert machine.memory.read(other, 1, None) == b"\x51"


# A hypervisor that lies -----------------------------------------------------------------------------------------------


@pytest.mark.unverified
@pytest.mark.parametrize("vector", [1, 13, 29, 31])
def test_an_exception_cannot_be_posted_as_an_interrupt(machine, vector):
    host_writes(machine, 0, bytes((vector, 0x80)))
    assert take(machine).first(HvTaken) == HvTaken(0, (), (vector,), False)
    assert page(machine).pending_vector == 0


def test_the_lowest_interrupt_is_dispatched(machine):
    host_writes(machine, 0, b"\x20\x80\x01")
    assert take(machine).first(HvTaken).vectors == (0x20,)


def test_a_machine_check_ends_the_guest(machine):
    host_writes(machine, 0, b"\x40\x82")
    ended = take(machine).first(Terminated)
    assert (ended.reason_set, ended.reason_code) == (0, 0)


def test_vectors_without_end_do_not_hold_the_guest_for_ever():
    """The hypervisor answers each EOI with the next interrupt."""

    @hookimpl
    def sevlab_register(builder):
        def repost(machine, vcpu, _ghcb, _scratch):
            host_writes(machine, 0, b"\x40")
            return DONE

        builder.nae_events.replace(0x7C, lambda event: event._replace(handler=repost))

    machine, _ = talking_machine(
        features=0b111111, vmsa=snp_vmsa(sev_features=1 | 1 << 3), given={"liar": plugin_of(sevlab_register)}
    )
    machine.apply(SetDoorbell(0, DOORBELL))
    host_writes(machine, 0, b"\x40\x80")
    assert take(machine).first(HvTaken).vectors == (0x40,) * 256


@pytest.mark.unverified
@pytest.mark.parametrize("info_2", [0, DOORBELL + 0x1000, PRIVATE_GPA, (1 << 64) - 1], ids=hex)
def test_a_doorbell_page_that_is_not_echoed_ends_the_guest(machine, info_2):
    machine.apply(ForgeReply(0, 0x3A0, info_2.to_bytes(8, "little")))
    ended = machine.apply(SetDoorbell(0, DOORBELL)).first(Terminated)
    assert (ended.reason_set, ended.reason_code) == (0, 0)


def test_the_rest_of_the_page_means_nothing(machine):
    before = machine.access.guest_physical_read(machine.vcpus[0], PRIVATE_GPA, 4096, c_bit=True)
    host_writes(machine, 0, b"\x40\xfd\x01" + b"\xff" * 61)
    assert take(machine).first(HvTaken).vectors == (0x40,)
    assert machine.access.guest_physical_read(machine.vcpus[0], PRIVATE_GPA, 4096, c_bit=True) == before


def test_steps_that_make_no_sense_are_refused(machine):
    for step in (SetDoorbell(0, DOORBELL + 8), SetDoorbell(7, DOORBELL), SendHvIpi(7, 0), TakeHv(7, 0)):
        assert machine.apply(step).first(Refused)
    fresh, _ = talking_machine()
    assert fresh.apply(TakeHv(0, 0)).first(Refused)
