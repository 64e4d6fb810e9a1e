"""Building domains: what the toolstack and Xen have done before a guest's first instruction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.memory import TAG_HYPERVISOR
from sevlab.core.svm import ExitCode
from sevlab.core.units import PAGE_BYTES
from sevlab.plugins import io
from sevlab.plugins.xen import clock
from sevlab.plugins.xen.arguments import E820Entry
from sevlab.plugins.xen.frames import store
from sevlab.plugins.xen.layout import LEGACY_MAX_VCPUS, VCPU_INFO_BYTES
from sevlab.plugins.xen.numbers import Param
from sevlab.plugins.xen.settings import Settings, Start
from sevlab.plugins.xen.startup import enter_long_mode, enter_protected_mode
from sevlab.plugins.xen.state import Backend, ChannelState, Domain, EventChannel, RunState, XenVcpu, xen
from sevlab.plugins.xen.xenstore import toolstack

if TYPE_CHECKING:
    from sevlab.core.hypervisor import Vm
    from sevlab.core.machine import Machine

SLACK_PAGES = 256
"""Pages that a domain may have beyond what it starts with, as libxl gives it (1 MiB)."""
SPECIAL_PAGES_FROM_END = 4
"""The last pages of a guest's memory that the toolstack takes: xenstore, console; two are spare."""
XENSTORE_PORT, CONSOLE_PORT = 1, 2
CONTROL_DOMID, FIRST_BACKEND_PORT = 0, 16
RAM = 1


def build(machine: Machine, settings: Settings) -> None:
    """Make a domain of every VM that exists at boot. Domain 0 is the first one where the option asks for it."""
    for vm in machine.hypervisor.vms.values():
        domid = vm.vm_id + (0 if settings.control_domain else 1)
        domain = new_domain(machine, vm, domid, control=domid == 0)
        state = xen(machine)
        state.domains[domid] = domain
        state.domid_of_vm[vm.vm_id] = domid
        clock.start(machine, domain)
        _rings(machine, vm, domain)
        toolstack.introduce(machine, vm, domain)
        for vcpu_id in vm.vcpu_ids:
            machine.vcpus[vcpu_id].vmcb.intercept(ExitCode.VMMCALL)
        _start(machine, vm, settings)


def new_domain(machine: Machine, vm: Vm, domid: int, *, control: bool) -> Domain:
    """A domain as Xen creates it, with its shared page and its first grant frame."""
    shared_info, first_frame = (machine.hypervisor.allocate_pages(1) for _ in range(2))
    machine.memory.write(shared_info, bytes(PAGE_BYTES), None, TAG_HYPERVISOR)
    machine.memory.write(first_frame, bytes(PAGE_BYTES), None, TAG_HYPERVISOR)
    domain = Domain(
        domid=domid,
        vm_id=vm.vm_id,
        is_control=control,
        vcpus=tuple(_vcpu(index, vcpu_id, shared_info) for index, vcpu_id in enumerate(vm.vcpu_ids)),
        shared_info_spa=shared_info,
        pages=vm.memory_bytes // PAGE_BYTES,
        max_pages=vm.memory_bytes // PAGE_BYTES + SLACK_PAGES,
        memory_map=E820Entry.build(addr=0, length=vm.memory_bytes, type=RAM),
    )
    domain.grants.frames = (first_frame,)
    board = io.devices(machine, machine.vcpus[vm.vcpu_ids[0]])
    board.fw_cfg.install(ram_bytes=vm.memory_bytes, cpus=len(vm.vcpu_ids))
    return domain


def _vcpu(index: int, vcpu_id: int, shared_info: int) -> XenVcpu:
    first = index == 0
    return XenVcpu(
        index=index,
        vcpu_id=vcpu_id,
        info_spa=shared_info + index * VCPU_INFO_BYTES if index < LEGACY_MAX_VCPUS else 0,
        initialised=first,
        down=not first,
        run_state=RunState.RUNNING if first else RunState.OFFLINE,
    )


def _rings(machine: Machine, vm: Vm, domain: Domain) -> None:
    """The rings that the toolstack prepares before launch, in pages that it must leave out of the encryption. Their
    channels lead to services of domain 0 that the model plays; the far ports are numbered by a rule of the model's.
    """
    first_gfn = (vm.memory_bytes - SPECIAL_PAGES_FROM_END * PAGE_BYTES) // PAGE_BYTES
    if first_gfn <= 0:
        return
    domain.params[Param.STORE_PFN], domain.params[Param.CONSOLE_PFN] = first_gfn, first_gfn + 1
    domain.params[Param.STORE_EVTCHN], domain.params[Param.CONSOLE_EVTCHN] = XENSTORE_PORT, CONSOLE_PORT
    for gfn in (first_gfn, first_gfn + 1):
        store(machine, vm.memory_spa + gfn * PAGE_BYTES, bytes(PAGE_BYTES))
    for port, backend in ((XENSTORE_PORT, Backend.XENSTORE), (CONSOLE_PORT, Backend.CONSOLE)):
        domain.channels[port] = EventChannel(
            port=port,
            state=ChannelState.INTERDOMAIN,
            remote_domid=CONTROL_DOMID,
            remote_port=FIRST_BACKEND_PORT + vm.vm_id * 2 + port,
            backend=backend,
        )


def _start(machine: Machine, vm: Vm, settings: Settings) -> None:
    for index, vcpu_id in enumerate(vm.vcpu_ids):
        vcpu = machine.vcpus[vcpu_id]
        if index:
            vcpu.halted = True
        elif settings.start is Start.PROTECTED:
            enter_protected_mode(vcpu)
        elif settings.start is Start.LONG:
            enter_long_mode(machine, vcpu)
