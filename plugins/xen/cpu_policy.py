"""Which bits of CR4 and EFER a vCPU may start with: those that the guest's CPUID has.

Source: Xen xen/arch/x86/hvm/hvm.c (hvm_cr4_guest_valid_bits, hvm_efer_valid). Nested virtualization is off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

EAX, EBX, ECX, EDX = range(4)


class Feature(NamedTuple):
    """A bit of CPUID, and the bits of a register that need it."""

    leaf: int
    subleaf: int
    register: int
    bit: int
    allows: int


CR4_ALWAYS = 1 << 8
"""PCE."""
CR4_FEATURES = (
    Feature(1, 0, EDX, 1, 1 << 0 | 1 << 1),  # VME: VME, PVI
    Feature(1, 0, EDX, 4, 1 << 2),  # TSC: TSD
    Feature(1, 0, EDX, 2, 1 << 3),  # DE
    Feature(1, 0, EDX, 3, 1 << 4),  # PSE
    Feature(1, 0, EDX, 6, 1 << 5),  # PAE
    Feature(1, 0, EDX, 7, 1 << 6),  # MCE
    Feature(1, 0, EDX, 14, 1 << 6),  # MCA: MCE too
    Feature(1, 0, EDX, 13, 1 << 7),  # PGE
    Feature(1, 0, EDX, 24, 1 << 9),  # FXSR: OSFXSR
    Feature(1, 0, EDX, 25, 1 << 10),  # SSE: OSXMMEXCPT
    Feature(7, 0, ECX, 2, 1 << 11),  # UMIP
    Feature(7, 0, EBX, 0, 1 << 16),  # FSGSBASE
    Feature(1, 0, ECX, 17, 1 << 17),  # PCID: PCIDE
    Feature(1, 0, ECX, 26, 1 << 18),  # XSAVE: OSXSAVE
    Feature(7, 0, EBX, 7, 1 << 20),  # SMEP
    Feature(7, 0, EBX, 20, 1 << 21),  # SMAP
    Feature(7, 0, ECX, 3, 1 << 22),  # PKU: PKE
    Feature(7, 0, ECX, 7, 1 << 23),  # CET-SS: CET
    Feature(7, 0, EDX, 20, 1 << 23),  # CET-IBT: CET
    Feature(7, 0, ECX, 31, 1 << 24),  # PKS
    Feature(7, 1, EAX, 6, 1 << 27),  # LASS
)
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
EFER_FEATURES = (
    Feature(0x8000_0001, 0, EDX, 11, 1 << 0),  # SYSCALL: SCE
    Feature(0x8000_0001, 0, EDX, 29, EFER_LME | EFER_LMA),  # LM
    Feature(0x8000_0001, 0, EDX, 20, 1 << 11),  # NX: NXE
    Feature(0x8000_0001, 0, EDX, 25, 1 << 14),  # FFXSR: FFXSE
    Feature(0x8000_0021, 0, EAX, 8, 1 << 21),  # automatic IBRS
)


def allowed(machine: Machine, vcpu: Vcpu, features: tuple[Feature, ...]) -> int:
    """The bits that the vCPU's CPUID has. A machine that describes no processor (its leaf 0 is empty) has all."""
    described = bool(machine.cpuid(vcpu, 0, 0)[EAX])
    mask = 0
    for leaf, subleaf, register, bit, allows in features:
        if not described or machine.cpuid(vcpu, leaf, subleaf)[register] >> bit & 1:
            mask |= allows
    return mask


def cr4_is_valid(machine: Machine, vcpu: Vcpu, value: int) -> bool:
    """Whether the vCPU may have this CR4."""
    return not value & ~(CR4_ALWAYS | allowed(machine, vcpu, CR4_FEATURES))


def efer_is_valid(machine: Machine, vcpu: Vcpu, value: int) -> bool:
    """Whether the vCPU may have this EFER, LMA already added: SVME belongs to nested virtualization."""
    if value & EFER_LMA and not value & EFER_LME:
        return False
    return not value & ~allowed(machine, vcpu, EFER_FEATURES)
