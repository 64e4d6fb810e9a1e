"""Linear addresses of the legacy ABI: the guest's page tables as Xen reads them, without any key.

Xen walks the tables at every copy. So does this, but for a walk whose tables hold the same bytes as the last time: then
it would find the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.access import RFLAGS_AC
from sevlab.core.cpu import CONTROL_SEV_ES
from sevlab.core.pages import unchanged
from sevlab.core.paging import Translation, WalkAccess, paging_context, walk
from sevlab.core.units import MASK64, PAGE_BYTES, PAGE_MASK, PAGE_SHIFT
from sevlab.plugins.xen.frames import page_of, store

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine
    from sevlab.plugins.xen.state import Domain

WALK_WRITE, WALK_AC = int(WalkAccess.WRITE), int(WalkAccess.AC)
KEPT = 1024
"""Walks that are remembered; past that all are forgotten."""


class Walks:
    """The walks of one machine, and what they found as long as no table of theirs changes."""

    __slots__ = ("_changes", "_known")

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], tuple[tuple[int, int | None], tuple[tuple[int, object], ...]]] = {}
        self._changes = -1

    def page(
        self, machine: Machine, vcpu: Vcpu, domain: Domain, linear: int, *, write: bool
    ) -> tuple[int, int | None] | None:
        """The page of `linear`: guest-physical address, and `page_of` it. None where the guest has no such page, or its
        CR3 is encrypted.
        """
        if vcpu.vmcb.encryption_control & CONTROL_SEV_ES:
            return None
        system = vcpu.system
        access = (WALK_WRITE if write else 0) | (WALK_AC if vcpu.regs.rflags & RFLAGS_AC else 0)
        if machine.access.changes != self._changes:
            self._known.clear()
            self._changes = machine.access.changes
        walked = (linear & -PAGE_BYTES, access, system.cr0, system.cr3, system.cr4, system.efer, domain.domid)
        known = self._known.get(walked)
        if known is not None and unchanged(machine.memory.pages, known[1]):
            return known[0]
        return self._walk(machine, vcpu, domain, linear, access, walked)

    def _walk(
        self, machine: Machine, vcpu: Vcpu, domain: Domain, linear: int, access: int, walked: tuple[int, ...]
    ) -> tuple[int, int | None] | None:
        system, memory = vcpu.system, machine.memory
        tables: list[int] = []

        def read_entry(gpa: int, width_bytes: int) -> int:
            spa = page_of(machine, domain, gpa >> PAGE_SHIFT)
            if spa is None:
                return 0
            tables.append(spa >> PAGE_SHIFT)
            return int.from_bytes(memory.read(spa + (gpa & PAGE_MASK), width_bytes, None), "little")

        context = paging_context(system.cr0, system.cr3, system.cr4, system.efer, 0)
        found = walk(context, linear & MASK64, access, read_entry=read_entry)
        if not isinstance(found, Translation):
            return None
        for gpa, width_bytes, value in found.updates:
            spa = page_of(machine, domain, gpa >> PAGE_SHIFT)
            if spa is not None:
                store(machine, spa + (gpa & PAGE_MASK), value.to_bytes(width_bytes, "little"))
        gpa = found.gpa & -PAGE_BYTES
        page = gpa, page_of(machine, domain, gpa >> PAGE_SHIFT)
        tokens = tuple((pfn, memory.token(pfn)) for pfn in tables)
        if not found.updates and all(token is not None for _, token in tokens):
            if len(self._known) >= KEPT:
                self._known.clear()
            self._known[walked] = page, tokens
        return page
