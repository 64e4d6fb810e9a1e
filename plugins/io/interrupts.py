"""From interrupt controllers to the guest: injection when the guest can take it, a window when it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.cpu import CONTROL_SEV_ES, INTERRUPT_SHADOW
from sevlab.core.svm import EVENT_VALID, EventType, ExitCode, Vector, event
from sevlab.plugins.io.devices.board import Devices, devices
from sevlab.plugins.io.devices.lapic import LVT_MASK
from sevlab.plugins.io.injection import reinjection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.events import CpuExit
    from sevlab.core.machine import Machine
    from sevlab.plugins.io.devices.lapic import Lapic

RFLAGS_IF = 1 << 9
GUEST_IF = 1 << 1
"""Bit of the VMCB's interrupt state."""
V_IRQ = 1 << 8
V_IGNORE_TPR = 1 << 20
LVT_LINT0 = 0x350
EXTINT = 7


def interrupts_enabled(vcpu: Vcpu) -> bool:
    """RFLAGS.IF; of an encrypted guest only the VMCB shows it."""
    if vcpu.vmcb.encryption_control & CONTROL_SEV_ES:
        return bool(vcpu.vmcb.interrupt_state & GUEST_IF)
    return bool(vcpu.regs.rflags & RFLAGS_IF)


def can_take(vcpu: Vcpu) -> bool:
    """Whether the guest takes an interrupt now: IF set and no shadow."""
    return not vcpu.vmcb.interrupt_state & INTERRUPT_SHADOW and interrupts_enabled(vcpu)


def pic_reaches(board: Devices, vcpu: Vcpu) -> bool:
    """Whether the PICs' output gets to `vcpu`: the boot CPU, with its APIC off or LINT0 open as ExtINT."""
    if vcpu.vcpu_id != board.boot_vcpu:
        return False
    apic = board.lapics[vcpu.vcpu_id]
    if not apic.enabled:
        return True
    lint0 = apic.register(LVT_LINT0)
    return not lint0 & LVT_MASK and lint0 >> 8 & 7 == EXTINT


def pending(machine: Machine, board: Devices, vcpu: Vcpu) -> bool:
    """Whether any interrupt waits for `vcpu`."""
    direct = machine.slots.direct_interrupt
    return (direct is not None and direct(machine, vcpu) is not None) or controllers_ask(board, vcpu)


def controllers_ask(board: Devices, vcpu: Vcpu) -> bool:
    """Whether an interrupt controller has something for `vcpu`."""
    return board.lapics[vcpu.vcpu_id].pending() is not None or (board.pics.pending() and pic_reaches(board, vcpu))


def make_prepare_entry(boards: Mapping[int, Devices]) -> Callable[[Machine, Vcpu], None]:
    """What is done before each VMRUN; `boards` are the machine's, by VM."""

    def prepare_entry(machine: Machine, vcpu: Vcpu) -> None:
        """Put back an interrupted event, else inject an NMI or the highest interrupt, or open a window."""
        vmcb = vcpu.vmcb
        board = boards.get(vcpu.vm_id) or devices(machine, vcpu)
        board.tick(machine)
        if vmcb.event_inj & EVENT_VALID:
            return
        if vmcb.exit_int_info:
            vmcb.event_inj = reinjection(vmcb.exit_int_info)
            vmcb.exit_int_info = 0
            if vmcb.event_inj:
                return
        apic = board.lapics[vcpu.vcpu_id]
        if apic.nmi_pending and _inject_nmi(vcpu, apic):
            return
        direct = machine.slots.direct_interrupt
        vector = None if direct is None else direct(machine, vcpu)
        pic = board.pics.master
        asked = apic.irr or pic.irr & ~pic.imr  # nobody asks: what nearly every entry finds
        if vector is None and not (asked and controllers_ask(board, vcpu)):
            if vmcb.vintr & V_IRQ:
                close_window(vcpu)
        elif can_take(vcpu):
            close_window(vcpu)
            if vector is None:
                vector = apic.acknowledge()
            if vector is None:
                vector = board.pics.acknowledge()
            vmcb.event_inj = event(vector, EventType.INTERRUPT)
        else:
            open_window(vcpu)

    return prepare_entry


# NMI --------------------------------------------------------------------------------------------------------------


def _inject_nmi(vcpu: Vcpu, apic: Lapic) -> bool:
    """Inject the NMI that waits, unless one is being handled; its IRET, intercepted, opens the window again."""
    encrypted = vcpu.vmcb.encryption_control & CONTROL_SEV_ES
    if apic.nmi_iret_rip >= 0 and not encrypted and vcpu.regs.rip != apic.nmi_iret_rip:
        apic.nmi_blocked, apic.nmi_iret_rip = False, -1  # the IRET is done
    if apic.nmi_blocked or vcpu.vmcb.interrupt_state & INTERRUPT_SHADOW:
        return False
    apic.nmi_pending, apic.nmi_blocked = False, True
    vcpu.vmcb.event_inj = event(Vector.NMI, EventType.NMI)
    if not encrypted:
        vcpu.vmcb.intercept(ExitCode.IRET)
    return True


def iret(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """IRET at the end of an NMI's handler: NMIs are open again once the guest has executed it.

    Source: Linux arch/x86/kvm/svm/svm.c, iret_interception.
    """
    vcpu.vmcb.intercepts &= ~(1 << ExitCode.IRET)
    devices(machine, vcpu).lapics[vcpu.vcpu_id].nmi_iret_rip = vcpu.regs.rip


def nmi_complete(machine: Machine, vcpu: Vcpu) -> None:
    """An encrypted guest says that its NMI is handled: no intercepted IRET would show it."""
    apic = devices(machine, vcpu).lapics[vcpu.vcpu_id]
    apic.nmi_blocked, apic.nmi_iret_rip = False, -1


# Windows and sleep ------------------------------------------------------------------------------------------------


def open_window(vcpu: Vcpu) -> None:
    """Ask for a VINTR exit as soon as the guest can take an interrupt."""
    vcpu.vmcb.vintr |= V_IRQ | V_IGNORE_TPR
    vcpu.vmcb.intercept(ExitCode.VINTR)


def close_window(vcpu: Vcpu) -> None:
    """Take the request for a VINTR exit back."""
    vmcb = vcpu.vmcb
    if vmcb.vintr & V_IRQ:
        vmcb.vintr &= ~(V_IRQ | V_IGNORE_TPR)
        vmcb.intercepts &= ~(1 << ExitCode.VINTR)


def wake(machine: Machine, vcpu: Vcpu) -> bool:
    """End HLT if an NMI or an interrupt that the guest takes waits; True if the vCPU runs."""
    if vcpu.halted:
        board = devices(machine, vcpu)
        board.tick(machine)
        apic = board.lapics[vcpu.vcpu_id]
        nmi = apic.nmi_pending and not apic.nmi_blocked
        if not apic.waits_for_startup and (nmi or (interrupts_enabled(vcpu) and pending(machine, board, vcpu))):
            vcpu.halted = False
    return not vcpu.halted


def register(builder: PluginBuilder, boards: Mapping[int, Devices]) -> None:
    """Look at the controllers before each entry, and at the end of an encrypted guest's NMI handler."""
    builder.at_entry(make_prepare_entry(boards))
    builder.slot("nmi_complete", nmi_complete)
