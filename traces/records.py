"""The records that only traces hold: what happened to the machine, or to the recording, beside its steps.

Kinds start with `trace.`. The step kinds here are no stimuli at a boundary: a machine does not handle them, whoever
replays a trace does.
"""

from __future__ import annotations

from typing import NamedTuple

from sevlab.core.vocabulary import Boundary, Checked, Derived, outcome, step


@step("trace.reset", Boundary.SCHEDULER)
class Reset(NamedTuple):
    """The machine returned to its marked state."""


@outcome("trace.violation", Boundary.FAULT)
class Violation(NamedTuple):
    """The step ended in an `InvariantViolation` that left the machine: no oracle sink was attached."""

    rule: Checked[str]
    message: Derived[str]


@outcome("trace.finding", Boundary.FAULT)
class Found(NamedTuple):
    """An oracle's finding at the end of the step, as `core.oracle.Finding`."""

    oracle: Checked[str]
    rule: Checked[str]
    message: Derived[str]
    handler: Derived[str]
    state: Derived[str]


TRACE_RECORDS: tuple[type, ...] = (Reset, Violation, Found)
"""All kinds of this module; part of the vocabulary of every trace."""
