"""A machine with SNP on and guests that own pages, for the tests of the plugin."""

from __future__ import annotations

from sevlab.core.config import GuestConfig
from sevlab.core.events import HostMsr
from sevlab.core.testing import make_machine
from sevlab.plugins.sme import SYSCFG, install_key
from sevlab.plugins.snp.layout import RmpState
from sevlab.plugins.snp.records import RmpResult, RmpUpdate
from sevlab.plugins.snp.rmp import initialize_rmp
from sevlab.plugins.snp.states import SnpVcpu, snp_state

C_BIT = 1 << 51
SYSCFG_SNP = 1 << 23 | 1 << 24 | 1 << 25
MIB = 1 << 20


def rmp_machine(guests=1, *, memory=4 * MIB, vcpus=1, **settings):
    """SNP enabled, RMP initialised; guests are SNP-active and own nothing yet; ASID = VM number + 1."""
    machine = make_machine(
        "snp",
        guests=tuple(GuestConfig(name=f"g{n}", memory_bytes=memory, vcpus=vcpus) for n in range(guests)),
        memory_bytes=settings.pop("memory_bytes", 64 * MIB),
        **settings,
    )
    machine.apply(HostMsr(SYSCFG, True, SYSCFG_SNP))
    initialize_rmp(machine)
    for vm in machine.hypervisor.vms.values():
        vm.c_bit_mask = C_BIT
        install_key(machine, vm.vm_id + 1, bytes([vm.vm_id + 1]) * 16 + bytes([vm.vm_id + 0x81]) * 16, vm.name)
        for vcpu_id in vm.vcpu_ids:
            snp_state(machine).vcpus[vcpu_id] = SnpVcpu()
            machine.vcpus[vcpu_id].vmcb.guest_asid = vm.vm_id + 1
    machine.mark()
    return machine


def update(machine, spa, *, gpa=0, assigned=1, page_size=0, immutable=0, asid=0):
    """RAX of the RMPUPDATE."""
    state = RmpState.build(gpa=gpa, assigned=assigned, page_size=page_size, immutable=immutable, asid=asid)
    return machine.apply(RmpUpdate(spa, state)).first(RmpResult).rax
