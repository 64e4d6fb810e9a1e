"""What the processor does by itself with control and debug registers and MSRs that nobody intercepts.

Source: spec 24593 (APM volume 2), 3.1 (control registers), 3.1.7 (EFER), 13.1.1 (debug registers).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.cpu import CR0_CD, CR0_NW, CR0_PE, CS_LONG_AND_BIG, FaultUnwind
from sevlab.core.events import Fault
from sevlab.core.paging import CR0_PG, CR4_LA57, CR4_PAE, CR4_SMEP, EFER_LMA, EFER_LME
from sevlab.core.svm import Vector
from sevlab.core.units import MASK32

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu

CR4_KNOWN = 0x0000_07FF | CR4_SMEP
"""VME to OSXMMEXCPT and SMEP: what the processor of `cpuid` has. Everything else is reserved and #GP."""
CR0_ET = 1 << 4
CR0_WRITABLE = 0xE005_003F
CS_LONG = 1 << 9
PHYSICAL_LIMIT = 52
DR6_FIXED, DR7_FIXED = 0xFFFF_0FF0, 0x400


def refuse() -> FaultUnwind:
    """#GP(0)."""
    return FaultUnwind(Fault(Vector.GP, 0, 0))


def write_cr0(vcpu: Vcpu, value: int) -> None:
    """MOV to CR0, checked; switches long mode on and off. Source: spec 24593, 3.1.1 and 14.6."""
    system = vcpu.system
    paging, protected = value & CR0_PG, value & CR0_PE
    if value >> 32 or (paging and not protected) or (value & CR0_NW and not value & CR0_CD):
        raise refuse()
    turning_on, turning_off = paging and not system.cr0 & CR0_PG, system.cr0 & CR0_PG and not paging
    if turning_on and system.efer & EFER_LME and (not system.cr4 & CR4_PAE or system.cs[1] & CS_LONG):
        raise refuse()
    if turning_off and system.efer & EFER_LMA and system.cs[1] & CS_LONG_AND_BIG == CS_LONG:
        raise refuse()
    system.cr0 = value & CR0_WRITABLE | CR0_ET
    system.efer = system.efer & ~EFER_LMA | (EFER_LMA if paging and system.efer & EFER_LME else 0)


def write_cr3(vcpu: Vcpu, value: int) -> None:
    """MOV to CR3: address bits that the processor lacks are #GP(0). Source: spec 24593, 3.1.2."""
    if value >> PHYSICAL_LIMIT:
        raise refuse()
    vcpu.system.cr3 = value


def write_cr4(vcpu: Vcpu, value: int) -> None:
    """MOV to CR4: reserved bits, and PAE in long mode, are #GP(0). Source: spec 24593, 3.1.3."""
    system = vcpu.system
    if value & ~CR4_KNOWN or (system.efer & EFER_LMA and not value & CR4_PAE):
        raise refuse()
    if (value ^ system.cr4) & CR4_LA57 and system.efer & EFER_LMA:
        raise refuse()
    system.cr4 = value


def write_debug(vcpu: Vcpu, number: int, value: int) -> None:
    """MOV to DRn. Breakpoints are kept and not acted on: the engine's own slots are taken. Source: 24593, 13.1.1."""
    system = vcpu.system
    if number >= 4:
        if value & ~MASK32:
            raise refuse()
        if number in (4, 6):
            system.dr6 = value & 0x1_E00F | DR6_FIXED
        else:
            system.dr7 = value & 0xFFFF_2BFF | DR7_FIXED
        return
    addresses = system.debug_addresses
    system.debug_addresses = (*addresses[:number], value, *addresses[number + 1 :])


def read_debug(vcpu: Vcpu, number: int) -> int:
    """MOV from DRn."""
    system = vcpu.system
    if number < 4:
        return system.debug_addresses[number]
    return system.dr6 if number in (4, 6) else system.dr7
