"""From interrupt controllers to the guest: injection when the guest can take it, a window when it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.cpu import CONTROL_SEV_ES
from sevlab.core.svm import EVENT_VALID, EventType, ExitCode, event
from sevlab.plugins.io.devices.board import Devices, devices
from sevlab.plugins.io.devices.lapic import LVT_MASK, SVR, SVR_ENABLE
from sevlab.plugins.io.injection import reinjection

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

RFLAGS_IF = 1 << 9
SHADOW, GUEST_IF = 1 << 0, 1 << 1
"""Bits of the VMCB's interrupt state."""
V_IRQ = 1 << 8
V_IGNORE_TPR = 1 << 20
LVT_LINT0 = 0x350
EXTINT = 7


def can_take(vcpu: Vcpu) -> bool:
    """Whether the guest takes an interrupt now: IF set and no shadow. Encrypted guests show IF in the VMCB only."""
    state = vcpu.vmcb.interrupt_state
    if state & SHADOW:
        return False
    if vcpu.vmcb.encryption_control & CONTROL_SEV_ES:
        return bool(state & GUEST_IF)
    return bool(vcpu.regs.rflags & RFLAGS_IF)


def pic_reaches(board: Devices, vcpu: Vcpu) -> bool:
    """Whether the PICs' output gets to `vcpu`: the boot CPU, with its APIC off or LINT0 open as ExtINT."""
    if vcpu.vcpu_id != board.boot_vcpu:
        return False
    apic = board.lapics[vcpu.vcpu_id]
    if not apic.register(SVR) & SVR_ENABLE:
        return True
    lint0 = apic.register(LVT_LINT0)
    return not lint0 & LVT_MASK and lint0 >> 8 & 7 == EXTINT


def pending(machine: Machine, board: Devices, vcpu: Vcpu) -> bool:
    """Whether any interrupt waits for `vcpu`."""
    direct = machine.slots.direct_interrupt
    if direct is not None and direct(machine, vcpu) is not None:
        return True
    return board.lapics[vcpu.vcpu_id].pending() is not None or (pic_reaches(board, vcpu) and board.pics.pending())


def prepare_entry(machine: Machine, vcpu: Vcpu) -> None:
    """Before VMRUN: put back an interrupted event, else inject the highest interrupt or open a window for it."""
    vmcb = vcpu.vmcb
    board = devices(machine, vcpu)
    board.tick(machine.tsc())
    if vmcb.event_inj & EVENT_VALID:
        return
    if vmcb.exit_int_info:
        vmcb.event_inj = reinjection(vmcb.exit_int_info)
        vmcb.exit_int_info = 0
        if vmcb.event_inj:
            return
    if not pending(machine, board, vcpu):
        close_window(vcpu)
    elif can_take(vcpu):
        close_window(vcpu)
        direct = machine.slots.direct_interrupt
        vector = direct(machine, vcpu) if direct is not None else None
        if vector is None:
            vector = board.lapics[vcpu.vcpu_id].acknowledge()
        if vector is None:
            vector = board.pics.acknowledge()
        vmcb.event_inj = event(vector, EventType.INTERRUPT)
    else:
        open_window(vcpu)


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
    """End HLT if an interrupt waits; True if the vCPU runs."""
    if vcpu.halted:
        board = devices(machine, vcpu)
        board.tick(machine.tsc())
        if pending(machine, board, vcpu):
            vcpu.halted = False
    return not vcpu.halted
