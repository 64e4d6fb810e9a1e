"""State of the plugin: what the hypervisor knows of each VM and vCPU, and what each reference guest knows itself."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from sevlab.core.config import Option
from sevlab.core.state import StateDict, Stateful, new
from sevlab.plugins.sev_es.order import OrderState

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

DEBUG_SWAP = 1 << 5
"""Of SEV_FEATURES: the processor swaps the debug registers. Source: 24593, appendix B."""

OPTIONS = (
    Option(
        name="checks",
        default="kvm-2026",
        choices=("kvm-2026", "kvm-6.12"),
        doc="whose checks of a request, and in which order; kvm-2026 is also the document's",
    ),
    Option(
        name="reply",
        default="event",
        choices=("event", "all"),
        doc="registers marked valid in a reply: those of the event, or RAX, RBX, RCX, RDX always as KVM does",
    ),
    Option(
        name="usage",
        default="standard",
        choices=("standard", "hyperv"),
        doc="which GHCB_USAGE is understood: 0, or also Hyper-V's hypercalls (1) and VTL returns (2)",
    ),
    Option(name="protocol_min", default=1, low=1, high=2, doc="lowest protocol version the hypervisor offers"),
    Option(name="protocol_max", default=2, low=1, high=2, doc="highest protocol version the hypervisor offers"),
    Option(
        name="vmsa_features",
        default=0,
        choices=(0, DEBUG_SWAP),
        doc="SEV_FEATURES of SEV-ES guests, of those that KVM takes: none, or DebugSwap (20h)",
    ),
    Option(name="features", default=0, low=0, high=(1 << 52) - 1, doc="hypervisor features offered"),
    Option(
        name="guest",
        default="none",
        choices=("none", "linux", "edk2"),
        doc="whose #VC handler the reference guest runs; none: the guest's code comes as steps",
    ),
    Option(name="order", default=False, doc="warn when a conversation breaks a rule of legal order"),
)


class Hold(IntEnum):
    """How an AP waits for its start-up IPI."""

    NONE = 0
    PAGE = 1
    MSR = 2


class VmProtocol(Stateful):
    """What the hypervisor keeps for one VM."""

    snp: bool = False
    """Whether the VM is an SNP guest; the plugin that makes such guests says so."""
    sev_features: int = 0
    """SEV_FEATURES that all its vCPUs have; what SEV_STATUS shows from bit 2 on."""
    jump_table_gpa: int = 0


class VcpuProtocol(Stateful):
    """What the hypervisor keeps for one vCPU."""

    registered_gpa: int = -1
    hold: int = Hold.NONE
    started: bool = False
    """A start-up IPI has come: the first one runs an AP from its launch state."""
    dr7: int = 0x400


class SevEsState(Stateful):
    """The plugin's state; entries are made when a vCPU or VM is first seen."""

    protocol_min: int = 1
    protocol_max: int = 2
    features: int = 0
    vms: StateDict[int, VmProtocol] = new(StateDict)
    vcpus: StateDict[int, VcpuProtocol] = new(StateDict)
    loaded: StateDict[int, tuple[int, int]] = new(StateDict)
    """By vCPU: SPA and ASID of the save area whose state the processor has."""
    forged: StateDict[int, tuple[tuple[int, bytes], ...]] = new(StateDict)
    order: OrderState = new(OrderState)
    """Of the order checker, while it is on; one for all VMs of the machine."""
    warns: bool = False
    """Whether it is on."""
    forged_msr: StateDict[int, int] = new(StateDict)


def sev_es_state(machine: Machine) -> SevEsState:
    """The plugin's state in `machine`."""
    return machine.components["sev_es"]  # type: ignore[return-value]  # asked at every exit


def vm_protocol(machine: Machine, vcpu: Vcpu) -> VmProtocol:
    """What the hypervisor keeps for the VM of `vcpu`."""
    vms: StateDict[int, VmProtocol] = machine.components["sev_es"].vms  # type: ignore[union-attr]  # asked at every exit
    found = vms.get(vcpu.vm_id)
    if found is None:
        found = vms[vcpu.vm_id] = VmProtocol()
    return found


def vcpu_protocol(machine: Machine, vcpu: Vcpu) -> VcpuProtocol:
    """What the hypervisor keeps for `vcpu`."""
    vcpus = sev_es_state(machine).vcpus
    found = vcpus.get(vcpu.vcpu_id)
    if found is None:
        found = vcpus[vcpu.vcpu_id] = VcpuProtocol()
    return found
