"""Step budget: no step makes the other side work without end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.oracle import Finding
from sevlab.core.vocabulary import Outcome, Record, spec_of

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

MAX_RECORDS = 20_000
MAX_FETCHES = 100_000


class StepBudget:
    """One step gives at most so many records and fetches."""

    name = "budget"
    documentation = (
        f"A single step ends in at most {MAX_RECORDS} outcome records and {MAX_FETCHES} fetches of shared memory: a"
        " guest's request must not keep its hypervisor busy without end. Source: CVE-2020-36311."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        if len(outcome.records) <= MAX_RECORDS and machine.fetches.count <= MAX_FETCHES:
            return ()
        wrong = []
        if len(outcome.records) > MAX_RECORDS:
            wrong.append(("records", f"{len(outcome.records)} records"))
        if machine.fetches.count > MAX_FETCHES:
            wrong.append(("fetches", f"{machine.fetches.count} fetches"))
        return tuple(Finding(self.name, rule, message, spec_of(step).kind) for rule, message in wrong)

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        return ()
