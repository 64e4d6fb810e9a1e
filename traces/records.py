"""The records that only traces hold: what happened to the machine, or to the recording, beside its steps.

Kinds start with `trace.`. The step kinds here are no stimuli at a boundary: a machine does not handle them, whoever
replays a trace does.
"""

from __future__ import annotations

from typing import NamedTuple

from sevlab.core.vocabulary import Boundary, Checked, Derived, Input, outcome, step


@step("trace.reset", Boundary.SCHEDULER)
class Reset(NamedTuple):
    """The machine returned to its marked state."""


@step("trace.mark", Boundary.SCHEDULER)
class Mark(NamedTuple):
    """The present state became the one that a reset returns to."""


@step("trace.state", Boundary.SCHEDULER)
class State(NamedTuple):
    """The machine was put into a state by other means than steps.

    `snapshot` is that state without what is as before, in the form of `traces.machine_state`.
    """

    snapshot: Input[bytes]


@step("trace.pages", Boundary.SCHEDULER)
class Pages(NamedTuple):
    """Pages of a state that is too large for one record: they follow it and belong to it.

    `pages` is the part of the snapshot's memory, in the form of `traces.machine_state`.
    """

    pages: Input[bytes]


@step("trace.end", Boundary.SCHEDULER)
class End(NamedTuple):
    """The sequence is over, and the oracles look at the whole of it."""


@step("trace.unwritable", Boundary.SCHEDULER)
class Unwritable(NamedTuple):
    """A step, its outcome or a state was nothing that a trace can hold: see `reason`.

    What a step changed follows as a state; after a state that cannot be kept the replay may diverge.
    """

    reason: Derived[str]


@outcome("trace.violation", Boundary.FAULT)
class Violation(NamedTuple):
    """The step ended in an exception that left the machine.

    `rule` is that of an `InvariantViolation`, the name of any other exception.
    """

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


TRACE_RECORDS: tuple[type, ...] = (Reset, Mark, State, Pages, End, Unwritable, Violation, Found)
"""All kinds of this module; part of the vocabulary of every trace."""
