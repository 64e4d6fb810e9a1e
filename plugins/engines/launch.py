"""From an image to a running guest: a machine, a launch through the ASP, an engine on its memory."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.config import GuestConfig, MachineConfig
from sevlab.core.cpu import Vcpu, msr_permission_bit
from sevlab.core.machine import Machine
from sevlab.core.memory import TAG_HYPERVISOR
from sevlab.core.units import PAGE_BYTES
from sevlab.plugins import sev, sev_es
from sevlab.plugins.engines.execution import Execution
from sevlab.plugins.engines.mmu import Arena, Mmu
from sevlab.plugins.engines.unicorn_engine import NestedPaging, UnicornCpu

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sevlab.core.config import Scalar
    from sevlab.core.hypervisor import Vm
    from sevlab.plugins.engines.loaders.image import GuestImage


class Feature(Enum):
    """How a guest is protected."""

    PLAIN = "plain"
    SEV = "sev"
    SEV_ES = "sev-es"

    @property
    def encrypted(self) -> bool:
        """Whether its memory is."""
        return self is not Feature.PLAIN


HOST_BYTES = 64 << 20
"""Memory of the machine beside the guest's: nested tables, the firmware's pages."""
PLUGINS = ("sme", "sev", "sev_es", "io", "engines")

PASSED_THROUGH = (
    0x174, 0x175, 0x176, *range(0xC000_0081, 0xC000_0085), *range(0xC000_0100, 0xC000_0103),
)  # fmt: skip
PASSED_TO_ENCRYPTED = (0xC000_0080, 0x277, 0xC001_0130, 0xC001_0131)
"""MSRs that a hypervisor does not intercept: the guest's own, and of an encrypted guest also EFER and PAT.

Source: Linux arch/x86/kvm/svm/svm.c (direct_access_msrs) and sev.c (sev_es_init_vmcb, sev_es_prepare_guest)."""


class Booted(NamedTuple):
    """A guest that is ready to run."""

    machine: Machine
    vm: Vm
    execution: Execution
    image: GuestImage
    digest: bytes
    """The launch digest (SHA-256 of what was loaded, and the save area) that the ASP has; empty for a plain guest."""
    recorded: bool = False


class Paging(Enum):
    """Who walks the guest's page tables: the kernel for each translation, or the engine through nested tables."""

    OWN = "own"
    NESTED = "nested"


def generation(paging: Paging) -> str:
    """The part that a guest runs on: an engine's own paging needs a C-bit among its address bits."""
    return "narrow" if paging is Paging.NESTED else "milan"


def compose(
    *,
    memory_bytes: int,
    cpus: int = 1,
    seed: bytes = b"\0",
    paging: Paging = Paging.OWN,
    plugins: tuple[str, ...] = (),
    options: Mapping[str, Mapping[str, Scalar]] | None = None,
) -> Machine:
    """The machine that a guest runs on; with an engine's own paging its C-bit is 39. `plugins` more than it needs, and
    options of plugins.
    """
    config = MachineConfig(
        generation=generation(paging),
        seed=seed,
        memory_bytes=memory_bytes + HOST_BYTES,
        plugins=(*PLUGINS, *plugins),
        guests=(GuestConfig(name="guest", vcpus=cpus, memory_bytes=memory_bytes),),
        options=options or {},
    )
    return Machine(config)


def c_bit_mask(machine: Machine, feature: Feature) -> int:
    """The C-bit in the guest's tables; 0 for a plain guest."""
    return 1 << machine.config.part.c_bit if feature.encrypted else 0


def boot(
    machine: Machine,
    image: GuestImage,
    feature: Feature,
    *,
    paging: Paging = Paging.OWN,
    before_start: Callable[[], None] | None = None,
    make: type[Execution] = Execution,
) -> Booted:
    """Load or launch `image` as VM 0 of `machine` and put an engine on its first vCPU.

    `before_start` is called when all is loaded and nothing has run; `make` is the kernel's side of the engine. Raises
    `ConfigError` when the launch or the engine refuses.
    """
    vm = machine.hypervisor.vms[0]
    vcpu = machine.vcpus[vm.vcpu_ids[0]]
    mask = c_bit_mask(machine, feature)
    image.start(vcpu.regs, vcpu.system, mask)
    digest = b""
    if feature is Feature.PLAIN:
        for gpa, data in sorted(image.loads.items()):
            machine.access.hypervisor_write(vm.memory_spa + gpa, data)
    else:
        digest = _launch(machine, vm, vcpu, image, feature)
    _pass_through(machine, vcpu, encrypted=feature is Feature.SEV_ES)
    if before_start is not None:
        before_start()
    arena = Arena(machine.memory.size_bytes)
    nested = NestedPaging(mask) if paging is Paging.NESTED else None
    mmu = Mmu(machine, vcpu, arena, nested=nested is not None)
    execution = make(machine, vcpu, mmu)
    execution.attach(UnicornCpu(vcpu, arena.map, execution, nested=nested))
    execution.enter()
    return Booted(machine, vm, execution, image, digest, before_start is not None)


def _launch(machine: Machine, vm: Vm, vcpu: Vcpu, image: GuestImage, feature: Feature) -> bytes:
    """LAUNCH_START to LAUNCH_FINISH; an SEV-ES guest's registers are in the save area that is measured."""
    loads = dict(sorted(image.loads.items()))
    if feature is Feature.SEV:
        guest = sev.launch_guest(machine, vm.vm_id, loads=loads)
    else:
        vmsa = sev_es.state_bytes(vcpu, sev_es.initial_vmsa())
        guest = sev.launch_guest(machine, vm.vm_id, policy=sev.Policy.ES, loads=loads, vmsas=(vmsa,))
        sev_es.set_up_vcpus(machine, vm.vm_id)
    return sev.sev_state(machine).guests[guest.handle].launch_digest


def _pass_through(machine: Machine, vcpu: Vcpu, *, encrypted: bool) -> None:
    """Clear the bits of the MSR permission map that a hypervisor clears."""
    base = vcpu.vmcb.msrpm_base_pa
    bits = bytearray(machine.memory.read(base, 2 * PAGE_BYTES, None))
    for msr in (*PASSED_THROUGH, *(PASSED_TO_ENCRYPTED if encrypted else ())):
        bit = msr_permission_bit(msr)
        assert bit is not None  # each lies in a range
        bits[bit >> 3] &= ~(3 << (bit & 7))
    machine.memory.write(base, bytes(bits), None, TAG_HYPERVISOR)
