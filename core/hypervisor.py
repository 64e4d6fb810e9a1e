"""The hypervisor: VMs, their nested page tables, and the exit loop. It handles no exit itself: plugins do.

The hypervisor is untrusted for SEV and later, so nothing here is relied on by a guest's protection; it only does what
an honest one does by default. Steps of the fault boundary let it do anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.cpu import Vcpu, vmrun
from sevlab.core.events import CpuExit, Stopped, Unhandled
from sevlab.core.state import StateDict, Stateful, new
from sevlab.core.svm import exit_name
from sevlab.core.units import PAGE_BYTES

if TYPE_CHECKING:
    from sevlab.core.machine import Machine


class Vm(Stateful):
    """One virtual machine: its vCPUs (ids are machine-wide), its nested tables, its share of memory."""

    vm_id: int = 0
    name: str = ""
    vcpu_ids: tuple[int, ...] = ()
    npt_root: int = 0
    memory_spa: int = 0
    memory_bytes: int = 0
    c_bit_mask: int = 0
    """The C-bit in the guest's own page tables; 0 while the guest is not encrypted."""
    stopped: str = ""
    """Why the VM does not run any more."""


class Hypervisor(Stateful):
    """Allocates host pages, owns VMs and vCPUs, and runs the exit loop."""

    next_free_spa: int = PAGE_BYTES
    vms: StateDict[int, Vm] = new(StateDict)
    last_vcpu: int = 0

    def allocate_pages(self, count: int, *, alignment_bytes: int = PAGE_BYTES) -> int:
        """SPA of `count` fresh pages in a row, aligned (power of two); never handed out twice, page 0 never."""
        spa = (self.next_free_spa + alignment_bytes - 1) & -alignment_bytes
        self.next_free_spa = spa + count * PAGE_BYTES
        return spa

    def handle_exit(self, machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
        """Call the handler of the exit code, then enter the guest again unless the handler stopped it."""
        handler = machine.tables.exits.get(exit_.exit_code)
        if handler is None:
            machine.emit(Unhandled(exit_.vcpu, exit_.exit_code))
            self.stop(machine, vcpu.vm_id, f"no handler for exit {exit_name(exit_.exit_code)}")
            return
        handler(machine, vcpu, exit_)
        if not vcpu.stopped and not vcpu.halted:
            self.enter(machine, vcpu)

    def enter(self, machine: Machine, vcpu: Vcpu) -> None:
        """VMRUN; a VMCB that the processor refuses ends the VM."""
        for prepare in machine.at_entry:
            prepare(machine, vcpu)
        if vcpu.stopped or vcpu.halted:
            return
        if not vmrun(machine, vcpu):
            self.stop(machine, vcpu.vm_id, f"VMRUN failed with {exit_name(vcpu.vmcb.exit_code)}")

    def stop(self, machine: Machine, vm_id: int, reason: str) -> None:
        """End a VM: none of its vCPUs runs again."""
        vm = self.vms[vm_id]
        vm.stopped = reason
        for vcpu_id in vm.vcpu_ids:
            machine.vcpus[vcpu_id].stopped = True
        machine.emit(Stopped(vm_id, reason))

    def schedule(self, machine: Machine) -> Vcpu | None:
        """The vCPU to run next: what the slot `scheduler` says, else the next in turn that can run."""
        runnable = [vcpu for vcpu in machine.vcpus.values() if not (vcpu.stopped or vcpu.halted)]
        if not runnable:
            return None
        if machine.slots.scheduler is not None:
            chosen = machine.slots.scheduler(machine, tuple(runnable))
        else:
            chosen = next((vcpu for vcpu in runnable if vcpu.vcpu_id > self.last_vcpu), runnable[0])
        self.last_vcpu = chosen.vcpu_id
        return chosen
