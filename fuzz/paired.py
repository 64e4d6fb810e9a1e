"""Oracles that need a second run: non-interference, and the same steps against themselves.

They cost a run each, so a campaign asks them for every input that it keeps and for every 64th other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from sevlab.core.layout import Kind, Layout
from sevlab.core.oracle import Finding
from sevlab.core.vocabulary import Outcome, Record, Role, spec_of
from sevlab.fuzz.runner import Runner

FILLS = (0x00, 0x5A)
"""What fields without their valid bit hold in the two runs, in every byte."""


class Paired:
    """The two paired oracles over one runner."""

    EVERY = 64

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def judge(self, steps: Sequence[Record]) -> tuple[Finding, ...]:
        """Both oracles on one sequence."""
        if not self._runner.pairs:
            return ()
        return (*self.interference(steps), *self.differential(steps))

    def interference(self, steps: Sequence[Record]) -> tuple[Finding, ...]:
        """Run twice with other values in fields that are not marked valid: nothing that is answered may differ.

        Source: 56421, 2.6 (VALID_BITMAP); Linux KVM zeroes what is not valid.
        """
        one, other = ([self._filled(step, fill) for step in steps] for fill in FILLS)
        if one == other:
            return ()
        return self._compare("non-interference", "invalid-data", one, other)

    def differential(self, steps: Sequence[Record]) -> tuple[Finding, ...]:
        """Run twice: what a run leaves behind must not show in the next one."""
        return self._compare("differential", "second-run", steps, steps)

    def _compare(self, oracle: str, rule: str, one: Sequence[Record], other: Sequence[Record]) -> tuple[Finding, ...]:
        first, second = self._outcomes(one), self._outcomes(other)
        for step, left, right in zip(one, first, second, strict=False):
            if checked(left) != checked(right):
                message = f"{_difference(left, right)}"
                return (Finding(oracle, rule, message, spec_of(step).kind),)
        return ()

    def _outcomes(self, steps: Sequence[Record]) -> list[Outcome]:
        """As far as the sequence gets: what leaves the model is a finding of the run itself, not of two of them."""
        machine = self._runner.machine
        outcomes: list[Outcome] = []
        try:
            for step in steps:
                outcomes.append(machine.apply(step))
                if self._runner.sink.tainted:
                    break
        except Exception:  # noqa: BLE001  # the runner has made a finding of it
            return outcomes
        finally:
            machine.reset()
        return outcomes

    def _filled(self, step: Record, fill: int) -> Record:
        carried = self._runner.messages.of(step)
        if carried is None or carried.layout is None or carried.layout.VALID_BITMAP is None:
            return step
        field = carried.payload.field
        data = getattr(step, field)
        if not isinstance(data, bytes) or len(data) < carried.layout.SIZE:
            return step
        changed = fill_invalid(carried.layout, data, fill)
        return cast("Record", step._replace(**{field: changed}))  # type: ignore[attr-defined]


def checked(outcome: Outcome) -> list[tuple[Any, ...]]:
    """What of an outcome the model determines: a derived field may repeat what came in."""
    return [
        (
            type(record),
            *(value for field, value in zip(spec_of(record).fields, record, strict=True) if field.role is Role.CHECKED),
        )
        for record in outcome.records
    ]


def fill_invalid(layout: type[Layout], data: bytes, fill: int) -> bytes:
    """`data` with every byte of every field whose valid bit is clear set to `fill`."""
    item = layout.from_bytes(data[: layout.SIZE])
    changed = bytearray(data)
    for name, info in layout.FIELDS.items():
        if info.valid_bit and info.kind is Kind.UINT and not item.is_valid(name):
            changed[info.offset : info.offset + info.length_bytes] = bytes((fill,)) * info.length_bytes
    return bytes(changed)


def _difference(left: Outcome, right: Outcome) -> str:
    for one, other in zip(left.records, right.records, strict=False):
        if one != other:
            names = spec_of(one).fields
            if type(one) is type(other):
                for field, before, after in zip(names, one, other, strict=True):
                    if before != after and field.role is Role.CHECKED:
                        return f"{spec_of(one).kind}.{field.name} is {before!r:.60} and {after!r:.60}"
            return f"{spec_of(one).kind} and {spec_of(other).kind}"
    return f"{len(left.records)} and {len(right.records)} records"
