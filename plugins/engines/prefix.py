"""What always happens first, done at once: from the interrupted instruction to its handler's first one.

Most inputs lie in replies only: the processor's way to the handler is the same each time. It is gone once and noted as
the fields and bytes that it changes. Whether doing just that gives the very same machine is tried when it is noted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sevlab.core.units import PAGE_SHIFT

if TYPE_CHECKING:
    from collections.abc import Callable

    from sevlab.core.crypto import MemoryKey
    from sevlab.core.machine import Machine
    from sevlab.plugins.engines.execution import Execution


class Prefix(NamedTuple):
    """Fields of state objects and pieces of memory, as they are afterwards."""

    fields: tuple[tuple[Any, str, Any], ...]
    stores: tuple[tuple[int, bytes, MemoryKey | None, int], ...]
    ticks: int

    def take(self, run: Execution) -> None:
        """Do it."""
        for item, name, value in self.fields:
            setattr(item, name, value)
        write = run.machine.memory.write
        for spa, data, key, tag in self.stores:
            write(spa, data, key, tag)
        run.pending_ticks = self.ticks


def learn(run: Execution, go: Callable[[], bool], back: Callable[[], None]) -> Prefix | None:
    """Note what `go` changes from where `back` leads; None when it says so, or changes more than a prefix can hold."""
    machine, vcpu = run.machine, run.vcpu
    objects = (vcpu.regs, vcpu.system, vcpu.vmcb, machine.clock)
    back()
    before = [tuple(getattr(item, name) for name in item.FIELDS) for item in objects]
    if not go():
        back()
        return None
    fields = tuple(
        (item, name, getattr(item, name))
        for item, old in zip(objects, before, strict=True)
        for name, value in zip(item.FIELDS, old, strict=True)
        if getattr(item, name) != value
    )
    prefix = Prefix(fields, tuple(_stores(machine)), run.pending_ticks)
    gone = machine.snapshot()
    back()
    prefix.take(run)
    same = machine.snapshot() == gone
    back()
    return prefix if same else None


def _stores(machine: Machine) -> list[tuple[int, bytes, MemoryKey | None, int]]:
    """The bytes that differ from the mark's, of each page as one piece."""
    memory = machine.memory
    found = []
    for pfn in tuple(memory.written()):
        old, page = memory.marked(pfn), memory.pages.get(pfn)
        if old is None or page is None or page.data == old.data:
            continue
        places = [at for at, (one, other) in enumerate(zip(page.data, old.data, strict=True)) if one != other]
        low, end = places[0], places[-1] + 1
        found.append(((pfn << PAGE_SHIFT) + low, bytes(page.data[low:end]), page.key, page.tag))
    return found
