"""Oracles that know no feature: what every handler must keep, whatever it serves.

The rule that buffers are never left needs no oracle object: a checked buffer raises `InvariantViolation`, and the sink
makes a finding of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.hookspecs import hookimpl
from sevlab.plugins.oracles.budget import StepBudget
from sevlab.plugins.oracles.fetches import SingleFetch
from sevlab.plugins.oracles.taint import OwnerTaint

if TYPE_CHECKING:
    from sevlab.core.oracle import Oracle

REQUIRES: tuple[str, ...] = ()

ORACLES: tuple[Oracle, ...] = (SingleFetch(), OwnerTaint(), StepBudget())

__all__ = ["ORACLES", "OwnerTaint", "SingleFetch", "StepBudget"]


@hookimpl
def sevlab_oracles() -> tuple[Oracle, ...]:
    return ORACLES
