"""The counters of atheris: branches of instrumented code and what state feedback reached, handed over once an input.

This is the one place that touches atheris's private interface. Its instrumentation calls `atheris._trace_branch` at
every basic block, some sixty times a step; a set takes these calls at a third of their cost, and libFuzzer hears of
each counter once an input. How often a block ran is lost, which for messages says little: the next message of a
sequence runs the same blocks again, and what it did in another state is what state feedback tells apart.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from types import CodeType, SimpleNamespace
from zlib import crc32

COUNTERS = 1 << 13
"""Counters for what state feedback reaches."""


class AtherisCounters:
    """Collects counters while an input runs. Raises `ImportError` that says what this atheris lacks."""

    def __init__(self) -> None:
        import atheris

        try:
            reserve = atheris._reserve_counter  # noqa: SLF001  # there is no public way
            atheris._trace_branch  # noqa: B018, SLF001
        except AttributeError as error:
            raise ImportError(f"this atheris has no counters to give: {error}") from error
        self._atheris = atheris
        self._counters = [reserve() for _ in range(COUNTERS)]
        if len(set(self._counters)) != COUNTERS:
            raise ImportError("this atheris gives the same counter twice")
        self._hit: set[int] = set()
        self.count: Callable[[Iterable[int]], None] = self._hit.update
        """Count these once for the present input."""
        self._collector = SimpleNamespace(_trace_branch=self._hit.add)

    def of(self, item: Hashable) -> int:
        """The counter of something that state feedback reaches; it depends on nothing else."""
        number: int = self._counters[crc32(repr(item).encode()) % COUNTERS]
        return number

    def instrument(self, code: CodeType) -> CodeType:
        """`code` with every branch counted; comparisons are not traced: the typed mutator knows the numbers."""
        return self._collecting(self._atheris.patch_code(code, False))

    def _collecting(self, code: CodeType) -> CodeType:
        """Instrumented code that tells our set instead of atheris, which it holds as a constant."""
        constants = (
            self._collector
            if constant is self._atheris
            else self._collecting(constant)
            if isinstance(constant, CodeType)
            else constant
            for constant in code.co_consts
        )
        return code.replace(co_consts=tuple(constants))

    def report(self) -> None:
        """The input has run: hand over what was counted."""
        trace = self._atheris._trace_branch  # noqa: SLF001  # another function once libFuzzer runs, so never kept
        for number in self._hit:
            trace(number)
        self._hit.clear()
