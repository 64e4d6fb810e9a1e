"""What happens when an exit cannot be served: it is said, and the VM ends; never a guess."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.svm import exit_name
from sevlab.plugins.io.records import Unserved

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.events import CpuExit
    from sevlab.core.machine import Machine


def unserved(machine: Machine, vcpu: Vcpu, exit_: CpuExit, reason: str) -> None:
    """Report that `exit_` cannot be served, and end the VM."""
    machine.emit(Unserved(vcpu.vcpu_id, exit_.exit_code, reason))
    machine.hypervisor.stop(machine, vcpu.vm_id, f"{exit_name(exit_.exit_code)} cannot be served: {reason}")
