"""Single fetch: what the other side can change meanwhile is read once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.buffers import NO_SPA
from sevlab.core.oracle import Finding
from sevlab.core.vocabulary import Outcome, Record, spec_of

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

JUDGED = ("sev_es.vmgexit",)
"""Steps in which one handler reads one message. A guest's #VC may read several replies in a step, and the operands of a
mailbox command may lie in its own buffer."""


class SingleFetch:
    """No byte of a message in shared memory is fetched twice while it is served.

    A guest may lay its scratch area over its GHCB: each is read once, and neither is the other's second look.
    """

    name = "single-fetch"
    after = JUDGED
    documentation = (
        "A handler takes one snapshot of a message that the other side can write and decides on that: no byte is"
        " fetched twice within a VMGEXIT. Needs the machine's fetch log (fuzzing turns it on)."
        " Source: CVE-2023-4155; Xen XSA-166."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        log = machine.fetches.log
        if not log or len(log) < 2:
            return ()
        spans = sorted(
            (fetch.area_spa, fetch.spa, fetch.spa + fetch.length_bytes, fetch.number)
            for fetch in log
            if fetch.spa != NO_SPA
        )
        area, end, number = -1, -1, 0
        for this_area, start, stop, this in spans:
            if this_area != area:
                area, end = this_area, -1
            if start < end:
                message = f"fetches {min(number, this)} and {max(number, this)} both read {start:#x}"
                return (Finding(self.name, "twice", message, spec_of(step).kind),)
            if stop > end:
                end, number = stop, this
        return ()

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        return ()
