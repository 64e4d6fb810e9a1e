"""Which pages a guest and Xen both use now: what an encrypted guest must have shared."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.units import PAGE_BYTES, PAGE_MASK, PAGE_SHIFT
from sevlab.plugins import io
from sevlab.plugins.xen.frames import frame_spa
from sevlab.plugins.xen.layout import VCPU_INFO_BYTES, VcpuRunstateInfo, VcpuTimeInfo
from sevlab.plugins.xen.numbers import Param
from sevlab.plugins.xen.state import Domain, PageKind

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

SVR, LVT_LINT0, LVT_LINT1 = 0xF0, 0x350, 0x360
APIC_AS_HVMLOADER_LEAVES_IT = {SVR: 0x1FF, LVT_LINT0: 0x1_0700, LVT_LINT1: 0x400}
"""Source: Xen tools/firmware/hvmloader/hvmloader.c (apic_setup)."""


class SharedPage(NamedTuple):
    """A guest frame that both use. `own`: it was the guest's private memory before; `areas`: (offset, length) of what
    Xen writes in it, where that is not the whole page.
    """

    gfn: int
    name: str
    own: bool
    areas: tuple[tuple[int, int], ...] = ()


def shared_pages(machine: Machine, domain: Domain) -> tuple[SharedPage, ...]:
    """All of them: rings, pages of Xen's that are mapped, areas and pages of the guest's that it has registered."""
    found = [
        SharedPage(domain.params[param], name, own=False)
        for param, name in ((Param.STORE_PFN, "xenstore ring"), (Param.CONSOLE_PFN, "console ring"))
        if param in domain.params
    ]
    for gfn, kind in domain.special.items():
        if kind is PageKind.XEN:
            shared_info = frame_spa(machine, domain, gfn) == domain.shared_info_spa
            found.append(SharedPage(gfn, "shared_info" if shared_info else "grant frame", own=False))
    memory_spa = machine.hypervisor.vms[domain.vm_id].memory_spa
    for vcpu in domain.vcpus:
        for spa, length, name in (
            (vcpu.info_spa if vcpu.info_registered else 0, VCPU_INFO_BYTES, "vcpu_info"),
            (vcpu.runstate_spa, VcpuRunstateInfo.SIZE, "runstate area"),
            (vcpu.time_spa, VcpuTimeInfo.SIZE, "time area"),
            (vcpu.control_spa, PAGE_BYTES, "FIFO control block"),
        ):
            if spa:
                areas = () if length == PAGE_BYTES else ((spa & PAGE_MASK, length),)
                found.append(SharedPage(spa - memory_spa >> PAGE_SHIFT, name, own=True, areas=areas))
    found += [SharedPage(spa - memory_spa >> PAGE_SHIFT, "FIFO event array", own=True) for spa in domain.event_array]
    return tuple(found)


def after_firmware(machine: Machine, vcpu: Vcpu) -> None:
    """The local APIC as hvmloader leaves it, for a guest that is started without firmware: Xen raises no event at an
    APIC that is off, and tells a vCPU only once.
    """
    apic = io.devices(machine, vcpu).lapics[vcpu.vcpu_id]
    for offset, value in APIC_AS_HVMLOADER_LEAVES_IT.items():
        apic.write(offset, value, machine.tsc())
