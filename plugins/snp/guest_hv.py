"""The reference guest with restricted injection: its doorbell page, its #HV handler, the IPIs that it sends.

The page is the hypervisor's to write: the guest takes a vector by a swap, dispatches only what can be an interrupt, and
believes nothing else.
Source: coconut-svsm kernel/src/sev/hv_doorbell.rs (process_pending_events, no_eoi_required); 56421, #HV doorbell page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from sevlab.core.cpu import FaultUnwind
from sevlab.core.events import Refused
from sevlab.core.state import StateDict, Stateful, new
from sevlab.core.steps import deliver_fault
from sevlab.core.units import PAGE_MASK
from sevlab.plugins.sev_es import GuestFailed, Outcome, ReferenceGuest, guest_side
from sevlab.plugins.snp.guest_agent import conclude, snp_vcpu
from sevlab.plugins.snp.guest_pages import HvDoorbell
from sevlab.plugins.snp.guest_protocol import (
    GENERAL_REASON,
    GHCB_SET,
    end_of_interrupt,
    send_hv_ipi,
    set_doorbell,
    terminate,
)
from sevlab.plugins.snp.records import HvTaken, SendHvIpi, SetDoorbell, TakeHv

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine
    from sevlab.plugins.sev_es import VcHandler, VcResult

COMPONENT = "snp.guest"
FIRST_INTERRUPT = 32
"""Vectors below it are exceptions: a hypervisor that posts one is not to be believed. The number is the model's own."""
MOST_INTERRUPTS = 256
"""That one #HV dispatches; the model's own limit for a hypervisor that posts without end."""

_VECTOR = HvDoorbell.FIELDS["pending_vector"].offset
_FLAGS = HvDoorbell.FIELDS["nmi_pending"].offset
_NO_EOI = HvDoorbell.FIELDS["no_eoi_required"].offset
NMI, MACHINE_CHECK, NO_FURTHER_SIGNAL = 1 << 0, 1 << 1, 1 << 7


class Doorbells(Stateful):
    """Where the guest of each vCPU has its doorbell page."""

    gpas: StateDict[int, int] = new(StateDict)


class HvGuest:
    """Runs the guest's steps around #HV."""

    __slots__ = ("_guest",)

    def __init__(self) -> None:
        self._guest = ReferenceGuest("linux")

    def _converse(self, machine: Machine, vcpu: Vcpu, handler: VcHandler) -> VcResult | None:
        return self._guest.converse(machine, vcpu, guest_side(machine, vcpu), handler)

    def set_doorbell(self, machine: Machine, step: SetDoorbell) -> None:
        """Clear the page, which is shared already, and register it."""
        vcpu = snp_vcpu(machine, step.vcpu)
        if vcpu is None:
            return
        if step.gpa & PAGE_MASK or step.gpa >> 51 or guest_side(machine, vcpu).ghcb_gpa < 0:
            machine.emit(Refused("a doorbell page is a page, and is registered by the GHCB"))
            return
        try:
            machine.access.guest_physical_write(vcpu, step.gpa, bytes(HvDoorbell.SIZE), c_bit=False)
        except FaultUnwind as unwind:
            deliver_fault(machine, vcpu, unwind.fault)
            return
        result = self._converse(machine, vcpu, set_doorbell(step.gpa))
        if result is not None and result.outcome is Outcome.DONE:
            cast("Doorbells", machine.components[COMPONENT]).gpas[vcpu.vcpu_id] = step.gpa
        conclude(machine, vcpu, result)

    def send_ipi(self, machine: Machine, step: SendHvIpi) -> None:
        """Ask for an IPI."""
        vcpu = snp_vcpu(machine, step.vcpu)
        if vcpu is None:
            return
        if step.icr >> 64 or guest_side(machine, vcpu).ghcb_gpa < 0:
            machine.emit(Refused("an IPI that this guest cannot send"))
            return
        conclude(machine, vcpu, self._converse(machine, vcpu, send_hv_ipi(step.icr)))

    def take(self, machine: Machine, step: TakeHv) -> None:
        """The #HV handler; also run where the guest looks for what it may have missed."""
        vcpu = snp_vcpu(machine, step.vcpu)
        if vcpu is None:
            return
        gpa = cast("Doorbells", machine.components[COMPONENT]).gpas.get(vcpu.vcpu_id)
        if gpa is None:
            machine.emit(Refused(f"the guest of vCPU {step.vcpu} has no doorbell page"))
            return
        try:
            self._take(machine, vcpu, gpa, step.tpr)
        except FaultUnwind as unwind:
            deliver_fault(machine, vcpu, unwind.fault)

    def _take(self, machine: Machine, vcpu: Vcpu, gpa: int, tpr: int) -> None:
        """A machine check ends the guest, as nothing can be done about one. An interrupt that the priority holds back
        stays in the page, so that the hypervisor knows that it is not in service.
        """

        def fetch_and(offset: int, keep: int) -> int:
            """One byte of the page, of which only the bits of `keep` stay."""
            value = machine.access.guest_physical_read(vcpu, gpa + offset, 1, c_bit=False)[0]
            if value & ~keep:
                machine.access.guest_physical_write(vcpu, gpa + offset, bytes((value & keep,)), c_bit=False)
            return value

        flags = fetch_and(_FLAGS, 0xFF & ~(NO_FURTHER_SIGNAL | NMI))
        if flags & MACHINE_CHECK:
            machine.emit(GuestFailed(vcpu.vcpu_id, "a machine check by #HV"))
            self._converse(machine, vcpu, terminate(GENERAL_REASON, "machine check", reason_set=GHCB_SET))
            return
        taken: list[int] = []
        wrong: list[int] = []
        for _ in range(MOST_INTERRUPTS):
            waiting = fetch_and(_VECTOR, 0xFF)
            if not waiting or (waiting >= FIRST_INTERRUPT and waiting >> 4 <= tpr >> 4):
                break
            if machine.access.guest_physical_read(vcpu, gpa + _VECTOR, 1, c_bit=False)[0] != waiting:
                continue  # the compare-and-swap fails: another one was posted meanwhile
            machine.access.guest_physical_write(vcpu, gpa + _VECTOR, b"\0", c_bit=False)
            if waiting < FIRST_INTERRUPT:
                wrong.append(waiting)
                continue
            taken.append(waiting)
            if fetch_and(_NO_EOI, 0xFE) & 1:
                continue
            result = self._converse(machine, vcpu, end_of_interrupt())
            if result is None:
                return
            if result.outcome is not Outcome.DONE:
                conclude(machine, vcpu, result)
                break
        machine.emit(HvTaken(vcpu.vcpu_id, tuple(taken), tuple(wrong), bool(flags & NMI)))


def register(builder: PluginBuilder) -> None:
    """Add the guest's steps and state."""
    guest = HvGuest()
    builder.component(Doorbells(), COMPONENT)
    builder.steps.add(SetDoorbell, guest.set_doorbell)
    builder.steps.add(SendHvIpi, guest.send_ipi)
    builder.steps.add(TakeHv, guest.take)
