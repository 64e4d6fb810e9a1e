"""SYSCFG under SNP, the RMP's registers, and what CPUID says.

Source: 24593, 15.36.2 and 15.36.3; Linux arch/x86/virt/svm/sev.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.builder import Msr
from sevlab.core.events import Fault
from sevlab.core.svm import Vector
from sevlab.core.units import PAGE_MASK, align_down
from sevlab.plugins.sme import SYSCFG, SmeCpuid
from sevlab.plugins.snp.rmp import RMP_ALIGNMENT_BYTES, rmp_bytes_for, state_of
from sevlab.plugins.snp.rmp_check import SNP_EN, VMPL_EN
from sevlab.plugins.snp.rmp_host import snp_enabled
from sevlab.plugins.snp.states import HWCR_SMM_LOCK, PageState, snp_state

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

RMP_BASE = 0xC001_0132
RMP_END = 0xC001_0133
HWCR = 0xC001_0015
VM_HSAVE_PA = 0xC001_0117
RMP_LOW_BITS = 0x1FFF
"""RMP_BASE has these clear, RMP_END set: 8 KiB. Source: 24593, 15.36.3."""

CPUID_ENCRYPTION = 0x8000_001F
EAX_VMPL = 1 << 5
EAX_RMPQUERY = 1 << 6
EAX_RMPREAD = 1 << 21


def register(builder: PluginBuilder) -> None:
    """Register the registers; on a part without SNP its bits of SYSCFG stay clear and CPUID says nothing of it."""
    part = builder.config.part
    builder.host_msrs.add(RMP_BASE, Msr(read_base, write_base))
    builder.host_msrs.add(RMP_END, Msr(read_end, write_end))
    builder.host_msrs.add(HWCR, Msr(read_hwcr, write_hwcr))
    builder.host_msrs.add(VM_HSAVE_PA, Msr(read_hsave, write_hsave))
    builder.host_msrs.replace(SYSCFG, lambda original: latched(original, 0 if part.vmpls else SNP_EN | VMPL_EN))
    builder.at_boot(place_rmp)
    if not part.vmpls:
        return
    word = SmeCpuid.build(sev_snp=1, vmpl_count=part.vmpls)
    rmpread = EAX_RMPREAD if part.name == "turin" else 0
    builder.cpuid_bits(
        CPUID_ENCRYPTION,
        eax=int.from_bytes(word[:4], "little") | EAX_VMPL | EAX_RMPQUERY | rmpread,
        ebx=int.from_bytes(word[4:8], "little"),
    )


def place_rmp(machine: Machine) -> None:
    """The platform's firmware reserves the table at the top of memory, where there is room for it."""
    size_bytes = machine.memory.size_bytes
    length_bytes = rmp_bytes_for(size_bytes)
    base = align_down(size_bytes - length_bytes, RMP_ALIGNMENT_BYTES)
    if base >= machine.hypervisor.next_free_spa:
        state = snp_state(machine)
        state.rmp_base = base
        state.rmp_end = base + (length_bytes + RMP_LOW_BITS & ~RMP_LOW_BITS) - 1


def latched(original: Msr, absent: int) -> Msr:
    """SYSCFG: once SNPEn is set, writes are ignored; `absent` bits the part does not have. Source: 24593, 15.36.2."""

    def write(machine: Machine, vcpu: Vcpu | None, msr: int, value: int) -> Fault | None:
        if snp_enabled(machine) or original.write is None:
            return None
        return original.write(machine, vcpu, msr, value & ~absent)

    return Msr(original.read, write)


def read_base(machine: Machine, _vcpu: Vcpu | None, _msr: int) -> int:
    """RDMSR of RMP_BASE."""
    return snp_state(machine).rmp_base


def read_end(machine: Machine, _vcpu: Vcpu | None, _msr: int) -> int:
    """RDMSR of RMP_END."""
    return snp_state(machine).rmp_end


def _writable(machine: Machine, value: int) -> bool:
    return not snp_enabled(machine) and value < 1 << 52


def write_base(machine: Machine, _vcpu: Vcpu | None, _msr: int, value: int) -> Fault | None:
    """WRMSR of RMP_BASE; #GP(0) once SNPEn is set (UNVERIFIED) or for a misaligned address."""
    if not _writable(machine, value) or value & RMP_LOW_BITS:
        return Fault(Vector.GP, 0, 0)
    snp_state(machine).rmp_base = value
    return None


def write_end(machine: Machine, _vcpu: Vcpu | None, _msr: int, value: int) -> Fault | None:
    """WRMSR of RMP_END, the table's last byte; #GP(0) as for RMP_BASE."""
    if not _writable(machine, value) or value & RMP_LOW_BITS != RMP_LOW_BITS:
        return Fault(Vector.GP, 0, 0)
    snp_state(machine).rmp_end = value
    return None


def read_hwcr(machine: Machine, _vcpu: Vcpu | None, _msr: int) -> int:
    """RDMSR of HWCR."""
    return snp_state(machine).hwcr


def write_hwcr(machine: Machine, _vcpu: Vcpu | None, _msr: int, value: int) -> Fault | None:
    """WRMSR of HWCR; SmmLock stays set until reset. Source: 24593, 15.32."""
    state = snp_state(machine)
    state.hwcr = value | state.hwcr & HWCR_SMM_LOCK
    return None


def read_hsave(machine: Machine, _vcpu: Vcpu | None, _msr: int) -> int:
    """RDMSR of VM_HSAVE_PA."""
    return snp_state(machine).vm_hsave_pa


def write_hsave(machine: Machine, _vcpu: Vcpu | None, _msr: int, value: int) -> Fault | None:
    """WRMSR of VM_HSAVE_PA; under SNP the page must be the hypervisor's. Source: 24593, 15.36.10 and 15.30.4."""
    if value & PAGE_MASK or value >= machine.memory.size_bytes:
        return Fault(Vector.GP, 0, 0)
    if snp_enabled(machine) and state_of(machine, value) not in (PageState.HYPERVISOR, PageState.DEFAULT):
        return Fault(Vector.GP, 0, 0)
    snp_state(machine).vm_hsave_pa = value
    return None
