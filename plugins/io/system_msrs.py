"""MSRs that are the guest's own processor state: EFER, the system-call set, segment bases, PAT, the TSC.

A plain guest's live in its VMCB save area, and its hypervisor can serve an intercepted access to any of them.
Source: spec 24593 (APM volume 2), 3.1.7 (EFER), 6.1 (SYSCALL, SYSENTER), 7.8 (PAT), 13.2.4 (TSC); which values fault,
each register's section there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.builder import Msr
from sevlab.core.events import Fault
from sevlab.core.paging import CR0_PG, EFER_LME
from sevlab.core.svm import Vector
from sevlab.core.units import MASK64

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

GP = Fault(Vector.GP, 0, 0)
TSC, EFER, PAT, TSC_AUX = 0x10, 0xC000_0080, 0x277, 0xC000_0103
PLAIN = {0x174: "sysenter_cs", 0xC000_0081: "star", 0xC000_0084: "sfmask", TSC_AUX: "tsc_aux"}
CANONICAL = {
    0x175: "sysenter_esp",
    0x176: "sysenter_eip",
    0xC000_0082: "lstar",
    0xC000_0083: "cstar",
    0xC000_0102: "kernel_gs_base",
}
FIELDS = PLAIN | CANONICAL | {PAT: "g_pat"}
BASES = {0xC000_0100: "fs", 0xC000_0101: "gs"}
EFER_SCE, EFER_LMA, EFER_NXE, EFER_SVME = 1 << 0, 1 << 10, 1 << 11, 1 << 12
EFER_WRITABLE = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE
"""Bits that a guest may have in EFER; LMA follows LME and paging, SVME is the host's business."""
PAT_TYPES = frozenset((0, 1, 4, 5, 6, 7))


def register(builder: PluginBuilder) -> None:
    """Register the processor's own MSRs."""
    for number in (*PLAIN, *CANONICAL):
        builder.guest_msrs.add(number, Msr(_read_field, _write_field))
    for number in BASES:
        builder.guest_msrs.add(number, Msr(_read_base, _write_base))
    builder.guest_msrs.add(EFER, Msr(_read_efer, _write_efer))
    builder.guest_msrs.add(PAT, Msr(_read_field, _write_pat))
    builder.guest_msrs.add(TSC, Msr(_read_tsc, _write_tsc))


def canonical(address: int) -> bool:
    """Whether bits 63:47 are all equal."""
    return address >> 47 in (0, 0x1_FFFF)


def _read_field(_machine: Machine, vcpu: Vcpu | None, number: int) -> int | Fault:
    return GP if vcpu is None else int(getattr(vcpu.system, FIELDS[number]))


def _write_field(_machine: Machine, vcpu: Vcpu | None, number: int, value: int) -> Fault | None:
    """TSC_AUX has 32 bits; an address must be canonical."""
    if vcpu is None or (number in CANONICAL and not canonical(value)) or (number == TSC_AUX and value >> 32):
        return GP
    setattr(vcpu.system, FIELDS[number], value)
    return None


def _read_base(_machine: Machine, vcpu: Vcpu | None, number: int) -> int | Fault:
    return GP if vcpu is None else int(getattr(vcpu.system, BASES[number])[3])


def _write_base(_machine: Machine, vcpu: Vcpu | None, number: int, value: int) -> Fault | None:
    if vcpu is None or not canonical(value):
        return GP
    segment = BASES[number]
    setattr(vcpu.system, segment, (*getattr(vcpu.system, segment)[:3], value))
    return None


def _read_efer(_machine: Machine, vcpu: Vcpu | None, _number: int) -> int | Fault:
    return GP if vcpu is None else vcpu.system.efer & ~EFER_SVME


def _write_efer(machine: Machine, vcpu: Vcpu | None, _number: int, value: int) -> Fault | None:
    """Reserved bits and a change of LME while paging is on are #GP(0); a write of LMA is ignored."""
    if vcpu is None or value & ~EFER_WRITABLE:
        return GP
    before, paging = vcpu.system.efer, vcpu.system.cr0 & CR0_PG
    if paging and (value ^ before) & EFER_LME:
        return GP
    vcpu.system.efer = value & ~EFER_LMA | before & (EFER_LMA | EFER_SVME)
    return None


def _write_pat(_machine: Machine, vcpu: Vcpu | None, _number: int, value: int) -> Fault | None:
    if vcpu is None or any(byte not in PAT_TYPES for byte in value.to_bytes(8, "little")):
        return GP
    vcpu.system.g_pat = value
    return None


def _read_tsc(machine: Machine, vcpu: Vcpu | None, _number: int) -> int | Fault:
    return machine.tsc() + (0 if vcpu is None else vcpu.vmcb.tsc_offset) & MASK64


def _write_tsc(machine: Machine, vcpu: Vcpu | None, _number: int, value: int) -> Fault | None:
    if vcpu is None:
        return GP
    vcpu.vmcb.tsc_offset = value - machine.tsc() & MASK64
    return None
