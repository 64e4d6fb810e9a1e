"""A running guest that is put back: registers, the engine's processor state, and the pages that were stored to.

A snapshot is taken between two runs of the engine. From then on the first store to each page is noticed; such a page
stays noted, so that going back again and again costs one copy of each page that the guest stores to and nothing for
the others. The engine's translations stay as long as nothing changed what they stand for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.errors import ConfigError
from sevlab.core.units import MASK64, PAGE_SHIFT
from sevlab.core.vocabulary import Outcome
from sevlab.plugins import sev_es
from sevlab.plugins.engines.unicorn_engine import UnicornCpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from sevlab.core.memory import Memory
    from sevlab.core.vocabulary import Record
    from sevlab.plugins.engines.execution import Execution


VMGEXIT_BYTES = 4


def differs(memory: Memory, pfn: int) -> bool:
    """Whether a page that was written since the mark holds other bytes than then, or is another's."""
    before, page = memory.marked(pfn), memory.pages.get(pfn)
    if before is None or page is None:
        return before is not page
    return page.key is not before.key or page.data != before.data


def run_to(run: Execution, wanted: Callable[[Record], bool]) -> bool:
    """Run until the guest is about to do what gives a step that is `wanted`; False: it ended before.

    The guest then stands before the instruction, and does it when it goes on.
    """
    apply = run.apply

    def pause(step: Record) -> Outcome:
        if not wanted(step):
            return apply(step)
        if isinstance(step, sev_es.Vmgexit):
            run.vcpu.regs.rip = run.vcpu.regs.rip - VMGEXIT_BYTES & MASK64
        run.end(PAUSED)
        return Outcome(())

    run.apply = pause
    try:
        ended = run.run()
    finally:
        run.apply = apply
    if ended.reason == PAUSED:
        run.ended = None
    return run.ended is None


PAUSED = "paused"
ASK_AGAIN = 256
"""After so many returns, pages that only an odd run stored to are no longer copied."""


class Snapshot:
    """The present state of `run`, which `restore` goes back to; it moves the machine's mark there.

    Raises `ConfigError` for an engine that cannot be put back.
    """

    def __init__(self, run: Execution) -> None:
        if not isinstance(run.engine, UnicornCpu):
            raise ConfigError("snapshots of a running guest are made with the engine unicorn")
        self._run, self._engine = run, run.engine
        self._machine, self._mmu, self._memory = run.machine, run.mmu, run.machine.memory
        run.now()
        self._state = run.engine.snapshot()
        self._cr3 = run.vcpu.system.cr3
        self._ticks = run.pending_ticks
        self._seen = (0, 0, 0)
        self._restored = 0
        self._tables: set[int] = set()
        self._code: set[int] = set()
        run.ended = None
        self._mmu.journaled = True
        self._machine.mark(keep_lent=True)
        self._mmu.forget()
        self._settle()

    def _settle(self) -> None:
        run, mmu = self._run, self._mmu
        run.exits.clear()
        run.last.clear()
        run.instructions, run.pending_ticks = 0, self._ticks
        run.ended = mmu.fault = None
        mmu.walked_exactly = False
        self._flushes = mmu.flushes

    def restore(self) -> None:
        """Go back; the guest then does again what it did, to the last bit."""
        mmu, memory = self._mmu, self._memory
        seen = (memory.dirty_pages, mmu.flushes, mmu.known)
        if seen != self._seen:
            self._seen = seen
            stored = memory.written()
            self._tables, self._code = mmu.tables().intersection(stored), mmu.code().intersection(stored)
        changed = mmu.flushes != self._flushes
        stale = changed or mmu.nested or mmu.walked_exactly or self._run.vcpu.system.cr3 != self._cr3
        if self._tables and not stale:  # the engine's translations would outlive what they stand for
            stale = any(differs(memory, pfn) for pfn in self._tables)
        self._machine.reset(forget=changed)
        self._restored += 1
        if not self._restored % ASK_AGAIN:
            memory.ask_again()
            stale = True
        for pfn in self._code:
            self._engine.spoiled(pfn << PAGE_SHIFT)
        if stale:
            mmu.flush()
        self._engine.restore(self._state)
        self._settle()
