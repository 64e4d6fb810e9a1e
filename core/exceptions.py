"""Exceptions as the processor classes them: which have an error code, which are faults, how two of them combine.

Source: spec 24593 (APM volume 2), 8.2 and table 8-5 (conditions that cause a double fault).
"""

from __future__ import annotations

from enum import Enum

from sevlab.core.svm import Vector


class Severity(Enum):
    """How an exception combines with another."""

    BENIGN = 0
    CONTRIBUTORY = 1
    PAGE_FAULT = 2
    DOUBLE_FAULT = 3


CONTRIBUTORY = frozenset((Vector.DE, Vector.TS, Vector.NP, Vector.SS, Vector.GP))
WITH_ERROR_CODE = frozenset(
    (Vector.DF, Vector.TS, Vector.NP, Vector.SS, Vector.GP, Vector.PF, Vector.AC, Vector.CP, Vector.VC, Vector.SX)
)
FAULTS = frozenset(
    (
        Vector.DE,
        Vector.BR,
        Vector.UD,
        Vector.NM,
        Vector.TS,
        Vector.NP,
        Vector.SS,
        Vector.GP,
        Vector.PF,
        Vector.MF,
        Vector.AC,
        Vector.XF,
        Vector.CP,
        Vector.VC,
        Vector.SX,
    )
)
"""Exceptions whose saved RIP is the instruction itself, always; #DB is one only for instruction breakpoints."""


class Combined(Enum):
    """What two exceptions in a row become."""

    SECOND = "the second is delivered"
    DOUBLE_FAULT = "#DF"
    TRIPLE_FAULT = "shutdown"


COMBINATIONS: dict[tuple[Severity, Severity], Combined] = {
    (Severity.CONTRIBUTORY, Severity.CONTRIBUTORY): Combined.DOUBLE_FAULT,
    (Severity.PAGE_FAULT, Severity.CONTRIBUTORY): Combined.DOUBLE_FAULT,
    (Severity.PAGE_FAULT, Severity.PAGE_FAULT): Combined.DOUBLE_FAULT,
    (Severity.DOUBLE_FAULT, Severity.CONTRIBUTORY): Combined.TRIPLE_FAULT,
    (Severity.DOUBLE_FAULT, Severity.PAGE_FAULT): Combined.TRIPLE_FAULT,
    (Severity.DOUBLE_FAULT, Severity.DOUBLE_FAULT): Combined.TRIPLE_FAULT,
}


def severity(vector: int) -> Severity:
    """The class of exception `vector`; what is no exception is benign. Source: spec 24593, table 8-5."""
    if vector == Vector.DF:
        return Severity.DOUBLE_FAULT
    if vector == Vector.PF:
        return Severity.PAGE_FAULT
    return Severity.CONTRIBUTORY if vector in CONTRIBUTORY else Severity.BENIGN


def combine(first: int, second: int) -> Combined:
    """What exception `second` becomes when it hits the delivery of exception `first`. Source: 24593, table 8-5."""
    return COMBINATIONS.get((severity(first), severity(second)), Combined.SECOND)
