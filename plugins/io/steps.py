"""The plugin's own steps: what devices outside the model do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.events import Done, Refused
from sevlab.plugins.io import interrupts
from sevlab.plugins.io.devices import uart
from sevlab.plugins.io.devices.board import Devices, devices
from sevlab.plugins.io.records import InterruptLine, SerialInput

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.machine import Machine


def register(builder: PluginBuilder) -> None:
    """Register the step handlers."""
    builder.steps.add(InterruptLine, interrupt_line)
    builder.steps.add(SerialInput, serial_input)


def _board(machine: Machine, vm_id: int) -> Devices | None:
    vm = machine.hypervisor.vms.get(vm_id)
    if vm is None:
        machine.emit(Refused(f"there is no VM {vm_id}"))
        return None
    return devices(machine, machine.vcpus[vm.vcpu_ids[0]])


def _wake(machine: Machine, vm_id: int) -> None:
    for vcpu_id in machine.hypervisor.vms[vm_id].vcpu_ids:
        interrupts.wake(machine, machine.vcpus[vcpu_id])


def interrupt_line(machine: Machine, step: InterruptLine) -> None:
    """A device raises or lowers its line; a sleeping vCPU that gets it wakes up."""
    if step.irq > 15:
        machine.emit(Refused(f"interrupt line {step.irq}: expected 0 to 15"))
        return
    board = _board(machine, step.vm)
    if board is not None:
        board.set_irq(machine, step.irq, level=step.level)
        _wake(machine, step.vm)
        machine.emit(Done())


def serial_input(machine: Machine, step: SerialInput) -> None:
    """Bytes arrive on the serial line."""
    board = _board(machine, step.vm)
    if board is not None:
        board.uart.receive(step.data)
        board.set_irq(machine, uart.COM1_IRQ, level=board.uart.interrupt)
        _wake(machine, step.vm)
        machine.emit(Done())
