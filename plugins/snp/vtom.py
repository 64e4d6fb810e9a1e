"""The virtual top of memory: data below it is private, above it shared, and the guest's tables need no C-bits.

Source: 24593, 15.36.8 and appendix B (VIRTUAL_TOM); the alignment of the MSR and its faults are UNVERIFIED.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.builder import Msr
from sevlab.core.events import Fault
from sevlab.core.svm import Vector
from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES
from sevlab.plugins.sev_es import Vmsa
from sevlab.plugins.snp.states import SnpVcpu, snp_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine
    from sevlab.plugins.snp.states import SnpState

VTOM = 1 << 1
"""Of SEV_FEATURES."""
MSR_VIRTUAL_TOM = 0xC001_0135
TOP = (1 << 52) - PAGE_2M_BYTES
"""The bits of an address in the MSR and the save area."""
CPUID_ENCRYPTION, EAX_VIRTUAL_TOM_MSR = 0x8000_001F, 1 << 18


def make_top(state: SnpState) -> Callable[[Vcpu], int]:
    """The slot `virtual_tom` of a machine with this state."""

    def top(vcpu: Vcpu) -> int:
        known = state.vcpus.get(vcpu.vcpu_id)
        return known.virtual_tom if known is not None and known.sev_features & VTOM else 0

    return top


def _known(machine: Machine, vcpu: Vcpu | None) -> SnpVcpu | None:
    known = None if vcpu is None else snp_state(machine).vcpus.get(vcpu.vcpu_id)
    return known if known is not None and known.sev_features & VTOM else None


def read_top(machine: Machine, vcpu: Vcpu | None, _msr: int) -> int | Fault:
    """RDMSR; #GP(0) without the feature."""
    known = _known(machine, vcpu)
    return Fault(Vector.GP, 0, 0) if known is None else known.virtual_tom


def write_top(machine: Machine, vcpu: Vcpu | None, _msr: int, value: int) -> Fault | None:
    """WRMSR: the save area has it from then on; #GP(0) without the feature or for bits that are no address."""
    known = _known(machine, vcpu)
    if known is None or vcpu is None or value & ~TOP:
        return Fault(Vector.GP, 0, 0)
    known.virtual_tom = value
    spa, key = vcpu.vmcb.vmsa_pa, machine.access.key_of(vcpu.asid, c_bit=True)
    area = Vmsa.from_bytes(machine.memory.read(spa, PAGE_BYTES, key)).replace(virtual_tom=value)
    machine.memory.write(spa, area.to_bytes(), key, vcpu.tag)
    return None


def register(builder: PluginBuilder, state: SnpState) -> None:
    """Take the slot, and add the register where the part has VMPLs."""
    builder.slot("virtual_tom", make_top(state))
    builder.guest_msrs.add(MSR_VIRTUAL_TOM, Msr(read_top, write_top))
    if builder.config.part.vmpls:
        builder.cpuid_bits(CPUID_ENCRYPTION, eax=EAX_VIRTUAL_TOM_MSR)
