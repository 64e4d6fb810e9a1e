"""PVALIDATE, RMPADJUST and RMPQUERY: what a guest says about its own pages.

Source: 24593, 15.36.6 to 15.36.8; Linux arch/x86/include/asm/sev.h; coconut-svsm kernel/src/sev/utils.rs. The order of
checks is as 24593 volume 3 is reported to have it; UNVERIFIED where the function says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.access import AccessKind
from sevlab.core.cpu import FaultUnwind, Vcpu
from sevlab.core.events import Fault, Refused
from sevlab.core.steps import deliver_fault
from sevlab.core.svm import ExitCode, NpfError, Vector
from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES, is_aligned
from sevlab.plugins.snp.layout import (
    ASID_SHIFT,
    ASSIGNED,
    IMMUTABLE,
    PERM_DEFINED,
    VALIDATED,
    VMSA,
)
from sevlab.plugins.snp.order import validated_too_early
from sevlab.plugins.snp.records import Pvalidate, RmpAdjust, RmpQueried, RmpQuery, RmpResult
from sevlab.plugins.snp.rmp import Entry, owning_entry, write_entry
from sevlab.plugins.snp.rmp_check import nested_fault, not_validated
from sevlab.plugins.snp.rmp_host import RmpCode
from sevlab.plugins.snp.states import snp_state

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

_READ, _PRIVATE, _FINAL = int(AccessKind.READ), int(AccessKind.PRIVATE), int(NpfError.FINAL)

RDX_VMSA = 1 << 16
RDX_RESERVED = ~0x1_FFFF
VMPL_COUNT = 4


class OwnPage(NamedTuple):
    """A page of the guest that executes: where its ruling entry is, and the entry."""

    spa: int
    gpa: int
    entry: Entry


def _refuse(vector: Vector, error_code: int = 0) -> FaultUnwind:
    return FaultUnwind(Fault(vector, error_code, 0))


def _may_execute(machine: Machine, vcpu: Vcpu, *, vmpl0_only: bool) -> None:
    """#UD unless SNP-active, #GP(0) above CPL 0; PVALIDATE also above VMPL0 (UNVERIFIED)."""
    if vcpu.vcpu_id not in snp_state(machine).vcpus:
        raise _refuse(Vector.UD)
    if vcpu.system.cpl or (vmpl0_only and vcpu.vmpl):
        raise _refuse(Vector.GP)


def own_page(machine: Machine, vcpu: Vcpu, gva: int, *, large: bool) -> OwnPage | None:
    """The guest's page at `gva`, which must be its own and mutable; None: FAIL_SIZEMISMATCH.

    Order: the guest's tables (#PF), the nested ones (#NPF), RMP-Covered, Guest-Owned, Reverse-Map, Mutable (#NPF), then
    sizes: 4 KiB of a 2 MiB page is #NPF with SIZEM, 2 MiB of a 4 KiB page is the result 6, and a mapping of another
    size than the page is #NPF. Source: 24593, 15.36.6; the order is UNVERIFIED.
    """
    gpa = machine.access.guest_gpa(vcpu, gva, _READ) & -PAGE_BYTES
    nested = machine.access.nested(vcpu, gpa, _READ, _FINAL)
    found = owning_entry(machine, nested.spa)
    if found is None:
        raise FaultUnwind(nested_fault(_PRIVATE, gpa))
    spa, entry = found
    owned = (
        entry.low & ASSIGNED
        and not entry.low & IMMUTABLE
        and entry.low & (0x3FF << ASID_SHIFT) == vcpu.asid << ASID_SHIFT
        and entry.gpa + (nested.spa - spa) == gpa
    )
    if not owned:
        raise FaultUnwind(nested_fault(_PRIVATE, gpa))
    if entry.huge and not large:
        raise FaultUnwind(nested_fault(_PRIVATE, gpa, reason=int(NpfError.SIZEM)))
    if large and not entry.huge:
        return None
    if entry.huge != (nested.page_bytes > PAGE_BYTES):
        raise FaultUnwind(nested_fault(_PRIVATE, gpa))
    return OwnPage(spa, gpa, entry)


def pvalidate(machine: Machine, vcpu: Vcpu, gva: int, *, page_size: int, validate: bool) -> RmpResult:
    """PVALIDATE: RAX and rFLAGS.CF; CF says that the page was in that state already.

    `page_size`: ECX, 0 or 1 (2 MiB). Raises `FaultUnwind` for what is an exception.
    Source: 24593, 15.36.6; Linux arch/x86/include/asm/sev.h (`pvalidate`).
    """
    _may_execute(machine, vcpu, vmpl0_only=True)
    if page_size > 1 or (page_size and not is_aligned(gva & -PAGE_BYTES, PAGE_2M_BYTES)):
        return RmpResult(RmpCode.FAIL_INPUT, False)
    try:
        page = own_page(machine, vcpu, gva, large=bool(page_size))
    except FaultUnwind as unwind:
        if validate and unwind.fault.vector == ExitCode.NPF:
            validated_too_early(machine, vcpu, unwind.fault.address)
        raise
    if page is None:
        return RmpResult(RmpCode.FAIL_SIZEMISMATCH, False)
    low, high = page.entry
    if bool(low & VALIDATED) == validate:
        return RmpResult(RmpCode.SUCCESS, True)
    write_entry(machine, page.spa, low ^ VALIDATED, high)
    return RmpResult(RmpCode.SUCCESS, False)


def rmp_adjust(machine: Machine, vcpu: Vcpu, gva: int, *, page_size: int, rdx: int) -> RmpCode:
    """RMPADJUST: give VMPL RDX[7:0] the permissions RDX[15:8]; at VMPL0, bit 16 makes the page a VMSA or none.

    The target must be less privileged than the caller, and nobody gives what he has not got. Raises `FaultUnwind`.
    That VMSA above VMPL0 is FAIL_PERMISSION rather than ignored is UNVERIFIED.
    Source: 24593, 15.36.7; Linux arch/x86/coco/sev/core.c (VMSA pages).
    """
    _may_execute(machine, vcpu, vmpl0_only=False)
    target, permissions = rdx & 0xFF, rdx >> 8 & 0xFF
    if rdx & RDX_RESERVED or permissions & ~PERM_DEFINED or page_size > 1 or target >= VMPL_COUNT:
        return RmpCode.FAIL_INPUT
    if page_size and not is_aligned(gva & -PAGE_BYTES, PAGE_2M_BYTES):
        return RmpCode.FAIL_INPUT
    if target <= vcpu.vmpl:
        return RmpCode.FAIL_PERMISSION
    page = own_page(machine, vcpu, gva, large=bool(page_size))
    if page is None:
        return RmpCode.FAIL_SIZEMISMATCH
    low, high = page.entry
    if not low & VALIDATED:
        raise FaultUnwind(not_validated(gva))
    if vcpu.vmpl and (permissions & ~page.entry.permissions(vcpu.vmpl) or rdx & RDX_VMSA):
        return RmpCode.FAIL_PERMISSION
    if rdx & RDX_VMSA and page.entry.huge:
        return RmpCode.FAIL_INPUT
    if not vcpu.vmpl:
        low = low | VMSA if rdx & RDX_VMSA else low & ~VMSA
    high = high & ~(0xFF << 8 * target) | permissions << 8 * target
    write_entry(machine, page.spa, low, high)
    return RmpCode.SUCCESS


def rmp_query(machine: Machine, vcpu: Vcpu, gva: int, target: int) -> RmpCode | RmpQueried:
    """RMPQUERY: the permissions of VMPL `target` for the page, whether it is a VMSA, and its size.

    UNVERIFIED beyond the name: encoding, registers and codes. Source: 24593, 15.36.8.
    """
    _may_execute(machine, vcpu, vmpl0_only=False)
    if target >= VMPL_COUNT:
        return RmpCode.FAIL_INPUT
    if target <= vcpu.vmpl:
        return RmpCode.FAIL_PERMISSION
    gpa = machine.access.guest_gpa(vcpu, gva, _READ) & -PAGE_BYTES
    found = owning_entry(machine, machine.access.nested(vcpu, gpa, _READ, _FINAL).spa)
    page = own_page(machine, vcpu, gva, large=found is not None and found[1].huge)
    assert page is not None  # the size asked for is the page's own
    vmsa = RDX_VMSA if page.entry.low & VMSA else 0
    return RmpQueried(page.entry.permissions(target) << 8 | vmsa, int(page.entry.huge))


def _vcpu(machine: Machine, vcpu_id: int) -> Vcpu | None:
    vcpu = machine.vcpus.get(vcpu_id)
    if vcpu is None or vcpu.stopped or vcpu.halted:
        machine.emit(Refused(f"vCPU {vcpu_id} does not run"))
        return None
    return vcpu


def pvalidate_step(machine: Machine, step: Pvalidate) -> None:
    """A guest executes PVALIDATE; of EDX only bit 0 counts."""
    vcpu = _vcpu(machine, step.vcpu)
    if vcpu is None:
        return
    try:
        result = pvalidate(machine, vcpu, step.rax, page_size=step.ecx & 0xFFFF_FFFF, validate=bool(step.edx & 1))
    except FaultUnwind as unwind:
        deliver_fault(machine, vcpu, unwind.fault)
        return
    machine.emit(result)


def rmpadjust_step(machine: Machine, step: RmpAdjust) -> None:
    """A guest executes RMPADJUST."""
    vcpu = _vcpu(machine, step.vcpu)
    if vcpu is None:
        return
    try:
        code = rmp_adjust(machine, vcpu, step.rax, page_size=step.rcx, rdx=step.rdx)
    except FaultUnwind as unwind:
        deliver_fault(machine, vcpu, unwind.fault)
        return
    machine.emit(RmpResult(code, False))


def rmpquery_step(machine: Machine, step: RmpQuery) -> None:
    """A guest executes RMPQUERY."""
    vcpu = _vcpu(machine, step.vcpu)
    if vcpu is None:
        return
    try:
        answer = rmp_query(machine, vcpu, step.rax, step.rcx)
    except FaultUnwind as unwind:
        deliver_fault(machine, vcpu, unwind.fault)
        return
    if isinstance(answer, RmpQueried):
        machine.emit(RmpResult(RmpCode.SUCCESS, False))
        machine.emit(answer)
    else:
        machine.emit(RmpResult(answer, False))
