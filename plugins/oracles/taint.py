"""Owner taint: a guest's private data and bytes that nobody wrote do not turn up in the open."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.memory import guest_tag
from sevlab.core.oracle import Finding
from sevlab.core.vocabulary import Outcome, Record

if TYPE_CHECKING:
    from sevlab.core.machine import Machine


class OwnerTaint:
    """No page in the open holds bytes that are tagged as a guest's own."""

    name = "taint"
    after: tuple[str, ...] = ()
    documentation = (
        "Bytes that a guest holds private never lie in memory that is not encrypted, unless the guest put them there"
        " as public: whoever copies them into a GHCB or a reply leaks them. Source: arXiv 2010.07094, edk2 85b8eac59b."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        return ()

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        encrypted = {guest_tag(vm_id) for vm_id, vm in machine.hypervisor.vms.items() if vm.c_bit_mask}
        findings = []
        for pfn in machine.memory.written():
            page = machine.memory.pages.get(pfn)
            if page is None or page.key is not None or page.mixed:
                continue
            tags = (page.tag,) if page.tags is None else page.tags
            if owners := [tag for tag in encrypted if tag in tags]:
                message = f"page {pfn << 12:#x} is in the open and holds bytes of tag {min(owners)}"
                findings.append(Finding(self.name, "private", message))
        return tuple(findings)
