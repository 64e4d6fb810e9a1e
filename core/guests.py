"""Make a VM: memory, nested page tables, permission maps, vCPUs as an honest hypervisor sets them up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.config import GuestConfig
from sevlab.core.cpu import Vcpu
from sevlab.core.errors import ConfigError
from sevlab.core.hypervisor import Vm
from sevlab.core.memory import TAG_HYPERVISOR
from sevlab.core.svm import ExitCode
from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

IOPM_BYTES = 3 * PAGE_BYTES
MSRPM_BYTES = 2 * PAGE_BYTES
"""Sizes of the permission maps. Source: spec 24593, 15.10.1 and 15.11."""

FIRST_GUEST_ASID = 1


def create_guest(machine: Machine, guest: GuestConfig) -> Vm:
    """Add a VM that owns `guest.memory_bytes` from guest-physical 0, mapped one to one in order.

    The VMCBs intercept VMRUN (the processor demands it) and, where the permission maps say so, every port and MSR;
    plugins add what they handle. The ASID is the VM's number plus 1 until a plugin gives it another.
    Raises `ConfigError` when the machine's memory is too small.
    """
    hypervisor = machine.hypervisor
    vm_id = len(hypervisor.vms)
    large = guest.memory_bytes >= PAGE_2M_BYTES
    alignment_bytes = PAGE_2M_BYTES if large else PAGE_BYTES
    memory_spa = hypervisor.allocate_pages(guest.memory_bytes // PAGE_BYTES, alignment_bytes=alignment_bytes)
    maps_spa = hypervisor.allocate_pages((IOPM_BYTES + MSRPM_BYTES) // PAGE_BYTES)
    tables = machine.access.new_nested_tables()
    mapped = 0
    while mapped < guest.memory_bytes:
        page_bytes = PAGE_2M_BYTES if guest.memory_bytes - mapped >= PAGE_2M_BYTES else PAGE_BYTES
        tables.map(mapped, memory_spa + mapped, page_bytes)
        mapped += page_bytes
    if hypervisor.next_free_spa > machine.memory.size_bytes:
        raise ConfigError(
            f"guest {guest.name!r}: {guest.memory_bytes} bytes do not fit: the machine has"
            f" {machine.memory.size_bytes}, the hypervisor would need {hypervisor.next_free_spa}"
        )
    machine.memory.write(maps_spa, b"\xff" * (IOPM_BYTES + MSRPM_BYTES), None, TAG_HYPERVISOR)
    first = len(machine.vcpus)
    vm = Vm(
        vm_id=vm_id,
        name=guest.name,
        vcpu_ids=tuple(range(first, first + guest.vcpus)),
        npt_root=tables.root_spa,
        memory_spa=memory_spa,
        memory_bytes=guest.memory_bytes,
    )
    hypervisor.vms[vm_id] = vm
    for vcpu_id in vm.vcpu_ids:
        vcpu = Vcpu(vcpu_id=vcpu_id, vm_id=vm_id)
        vcpu.vmcb.guest_asid = FIRST_GUEST_ASID + vm_id
        vcpu.vmcb.nested_cr3 = vm.npt_root
        vcpu.vmcb.iopm_base_pa = maps_spa
        vcpu.vmcb.msrpm_base_pa = maps_spa + IOPM_BYTES
        vcpu.vmcb.intercept(ExitCode.VMRUN)
        machine.vcpus[vcpu_id] = vcpu
    return vm
