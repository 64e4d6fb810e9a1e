"""Interrupts that the log says came."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.svm import ExitCode
from sevlab.plugins.captured.records import InterruptEnded
from sevlab.plugins.captured.state import captured
from sevlab.plugins.io import devices

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.events import GuestExit
    from sevlab.core.machine import Machine

ISA_LINES = 16
BEFORE, AFTER = 1, 2
"""Kinds of arrivals at the board's lines: before and after the port access of the exit was served."""


def arrive(machine: Machine, vcpu: Vcpu, step: GuestExit) -> None:
    """Bring the interrupts of the log. What the model's own devices raised meanwhile does not count."""
    board = devices(machine, vcpu)
    apic = board.lapics[step.vcpu]
    requested = captured(machine).requested.get(step.vcpu, 0)
    at_once = step.exit_code != ExitCode.IOIO
    for kind, number, level in step.arrivals:
        if kind:
            if (kind == BEFORE or at_once) and number < ISA_LINES:
                board.set_irq(machine, number, level=bool(level))
        else:
            requested |= 1 << (number & 0xFF)
            apic.tmr = apic.tmr & ~(1 << number) | bool(level) << number
    apic.irr = requested
    apic.waits_for_startup = False
    if step.ended:
        machine.emit(InterruptEnded(apic.end_of_interrupt() or 0))


def late_lines(machine: Machine, vcpu: Vcpu, step: GuestExit) -> None:
    """The lines of the board that changed after a port access was served."""
    for kind, number, level in step.arrivals:
        if kind == AFTER and number < ISA_LINES:
            devices(machine, vcpu).set_irq(machine, number, level=bool(level))
