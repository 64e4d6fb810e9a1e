"""Alternate injection: the more privileged VMPL injects through the save area, and the hypervisor cannot."""

from __future__ import annotations

import pytest
from sevlab.core.cpu import FaultUnwind
from sevlab.core.events import Done, Injected, Resumed, Schedule, Stopped, VmcbWrite, VmExit
from sevlab.core.svm import EVENT_VALID
from sevlab.plugins.sev_es import MsrReply, Vmgexit, Vmsa
from sevlab.plugins.snp.injection import VintrCtrl
from sevlab.plugins.snp.records import CreateAp, RmpAdjust

from tests.plugins.snp.support import PRIVATE_GPA, snp_vmsa, talking_machine

pytestmark = pytest.mark.unverified
VMSA_GPA = PRIVATE_GPA + 0x1000
ALTERNATE = 1 | 1 << 4
IF = 1 << 9
INVALID = (1 << 64) - 1


@pytest.fixture(scope="module")
def booted():
    """At VMPL0, with a VMPL1 of alternate injection whose save area is ready."""
    machine, _ = talking_machine(features=0b111111)
    assert machine.apply(RmpAdjust(0, PRIVATE_GPA, 0, 1 | 0xF << 8)).records[0].rax == 0
    area = snp_vmsa(vmpl=1, sev_features=ALTERNATE, rflags=2 | IF, rip=0x5555)
    assert Done() in machine.apply(CreateAp(0, 0, VMSA_GPA, 1, 1, area)).records
    machine.mark()
    return machine


@pytest.fixture
def machine(booted):
    booted.reset()
    return booted


def area(machine):
    return Vmsa.from_bytes(machine.access.guest_physical_read(machine.vcpus[0], VMSA_GPA, 4096, c_bit=True))


def inject(machine, **fields):
    """VMPL0 writes the save area of VMPL1 and lets it run."""
    vintr = VintrCtrl.build(**{name: fields.pop(name) for name in list(fields) if name in VintrCtrl.FIELDS})
    changed = area(machine).replace(vintr_ctrl=int.from_bytes(vintr, "little"), **fields)
    machine.access.guest_physical_write(machine.vcpus[0], VMSA_GPA, changed.to_bytes(), c_bit=True)
    return machine.apply(Vmgexit(0, 1 << 32 | 0x016, b""))


def back(machine):
    """VMPL1 hands back to VMPL0."""
    assert machine.apply(Vmgexit(0, 0x016, b"")).first(MsrReply).value == 0x017
    assert machine.vcpus[0].vmpl == 0


def control(machine):
    return VintrCtrl.from_bytes(area(machine).vintr_ctrl.to_bytes(8, "little"))


@pytest.mark.parametrize("word", [0x30, 2 << 8 | 2, 3 << 8 | 14 | 1 << 11 | 5 << 32, 4 << 8 | 0x80], ids=hex)
def test_an_event_of_the_save_area_is_taken_once(machine, word):
    outcome = inject(machine, event_inj=EVENT_VALID | word)
    assert outcome.first(Injected) == Injected(0, EVENT_VALID | word)
    assert outcome.first(Resumed).rip == 0x5555
    assert machine.apply(Schedule()).first(Injected) is None
    back(machine)
    assert area(machine).event_inj == 0


@pytest.mark.parametrize("word", [1 << 8, 5 << 8, 7 << 8, 3 << 8 | 2, 3 << 8 | 32], ids=hex)
def test_an_illegal_event_makes_vmrun_fail(machine, word):
    outcome = inject(machine, event_inj=EVENT_VALID | word)
    assert outcome.first(Injected) is None
    assert any(isinstance(record, VmExit) and record.exit_code == INVALID for record in outcome.records)
    assert outcome.first(Stopped)


def test_an_event_that_is_not_valid_is_none(machine):
    assert inject(machine, event_inj=0x30).first(Injected) is None


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({}, False),
        ({"v_irq": 1, "v_intr_prio": 3}, True),
        ({"v_irq": 1, "v_intr_prio": 3, "v_tpr": 2}, True),
        ({"v_irq": 1, "v_intr_prio": 3, "v_tpr": 3}, False),
        ({"v_irq": 1, "v_intr_prio": 3, "v_tpr": 0xF3, "v_ign_tpr": 1}, True),
        ({"v_irq": 1, "v_intr_prio": 0}, False),
        ({"v_irq": 1, "v_intr_prio": 3, "int_shadow": 1}, False),
        ({"v_irq": 1, "v_intr_prio": 3, "rflags": 2}, False),
    ],
    ids=str,
)
def test_a_virtual_interrupt_needs_priority_and_an_open_guest(machine, fields, taken):
    outcome = inject(machine, v_intr_vector=0x41, **fields)
    assert (outcome.first(Injected) == Injected(0, EVENT_VALID | 0x41)) is taken
    back(machine)
    assert control(machine).v_irq == (fields.get("v_irq", 0) and not taken)


def test_a_virtual_interrupt_waits_until_the_guest_opens(machine):
    assert inject(machine, v_irq=1, v_intr_prio=4, v_intr_vector=0x41, rflags=2).first(Injected) is None
    assert machine.apply(Schedule()).first(Injected) is None
    machine.vcpus[0].regs.rflags |= IF
    assert machine.apply(Schedule()).first(Injected) == Injected(0, EVENT_VALID | 0x41)
    assert machine.apply(Schedule()).first(Injected) is None
    machine.vcpus[0].regs.rflags &= ~IF
    back(machine)
    assert not control(machine).v_irq
    assert area(machine).rflags == 2


def test_a_virtual_nmi_masks_the_next(machine):
    nmi = {"v_nmi": 1, "v_nmi_enable": 1}
    assert inject(machine, rflags=2, **nmi).first(Injected) == Injected(0, EVENT_VALID | 2 << 8 | 2)
    back(machine)
    assert (control(machine).v_nmi, control(machine).v_nmi_mask) == (0, 1)
    assert inject(machine, v_nmi_mask=1, **nmi).first(Injected) is None
    back(machine)
    assert inject(machine, v_nmi=1).first(Injected) is None
    back(machine)


def test_an_event_goes_before_a_virtual_interrupt(machine):
    word = EVENT_VALID | 3 << 8 | 6
    assert inject(machine, event_inj=word, v_irq=1, v_intr_prio=4, v_intr_vector=0x41).first(Injected).event == word
    assert machine.apply(Schedule()).first(Injected) == Injected(0, EVENT_VALID | 0x41)


def test_the_hypervisor_injects_nothing_and_reaches_no_save_area(machine):
    inject(machine)
    machine.apply(VmcbWrite(0, 0xA8, (EVENT_VALID | 0x30).to_bytes(8, "little")))
    outcome = machine.apply(Schedule())
    assert outcome.first(Injected) is None
    assert outcome.first(Resumed)
    spa = machine.hypervisor.vms[0].memory_spa + VMSA_GPA
    with pytest.raises(FaultUnwind):
        machine.access.hypervisor_write(spa + 0x3E0, (EVENT_VALID | 0x30).to_bytes(8, "little"))


def test_without_the_feature_the_fields_of_the_save_area_mean_nothing():
    machine, _ = talking_machine(
        vmsa=snp_vmsa(event_inj=EVENT_VALID | 0x30, vintr_ctrl=1 << 8 | 15 << 16, rflags=2 | IF)
    )
    assert machine.apply(Schedule()).first(Injected) is None
