"""The engines' own step: a vCPU that sleeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.events import AdvanceClock, Refused
from sevlab.core.vocabulary import Boundary, Input, step
from sevlab.plugins import io

if TYPE_CHECKING:
    from sevlab.core.machine import Machine


@step("engines.idle", Boundary.SCHEDULER)
class Idle(NamedTuple):
    """With every vCPU asleep, `ticks` pass; if a timer then wakes `vcpu`, the hypervisor enters it."""

    vcpu: Input[int]
    ticks: Input[int]


def idle(machine: Machine, step: Idle) -> None:
    """Let time pass for a vCPU in HLT."""
    vcpu = machine.vcpus.get(step.vcpu)
    if vcpu is None or not vcpu.halted:
        machine.emit(Refused(f"vCPU {step.vcpu} does not sleep"))
        return
    machine.tables.steps[AdvanceClock](machine, AdvanceClock(step.ticks))
    if io.wake(machine, vcpu):
        machine.hypervisor.enter(machine, vcpu)
