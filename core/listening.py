"""Overhearing the steps that are applied to a machine, by drivers that apply them out of sight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sevlab.core.machine import Machine
from sevlab.core.vocabulary import Outcome, Record


@contextmanager
def listening(machine: Machine, told: Callable[[Record, Outcome], object]) -> Iterator[None]:
    """While inside, `told(step, outcome)` is called for every step that is applied to `machine`."""
    apply = machine.apply

    def heard(step: Record) -> Outcome:
        outcome = apply(step)
        told(step, outcome)
        return outcome

    machine.apply = heard  # type: ignore[method-assign]  # drivers apply steps out of sight
    try:
        yield
    finally:
        del machine.apply


def steps_of(machine: Machine, call: Callable[[], object]) -> tuple[Record, ...]:
    """The steps that `call` applies to `machine`."""
    steps: list[Record] = []
    with listening(machine, lambda step, _outcome: steps.append(step)):
        call()
    return tuple(steps)
