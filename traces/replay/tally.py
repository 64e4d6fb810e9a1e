"""What a replay counts: checked values, inputs, explained differences by rule, divergences by cause."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Divergence(NamedTuple):
    """A value that the model computes otherwise than the log has it. `number` is the exchange's, from 0."""

    number: int
    exit_class: str
    check: str
    recorded: Any
    computed: Any
    step: Any
    outcome: Any

    @property
    def cause(self) -> str:
        """What groups divergences: the class of the exit and the check."""
        return f"{self.exit_class}: {self.check}"

    def text(self) -> str:
        """One line."""
        return (
            f"exchange {self.number}, {self.exit_class}: {self.check}:"
            f" recorded {_show(self.recorded)}, computed {_show(self.computed)}"
        )


def _show(value: Any) -> str:
    return f"{value:#x}" if isinstance(value, int) and not isinstance(value, bool) else repr(value)


class Group(NamedTuple):
    """Divergences of one cause."""

    times: int
    first: Divergence


@dataclass
class Tally:
    """The counts of one replay; `merge` adds another's."""

    exchanges: Counter[str] = field(default_factory=Counter)
    """By exit class."""
    checked: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Values compared, by exit class and check."""
    inputs: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Values taken from the log, by exit class and what."""
    unchecked: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Records of the log that neither were an input nor had anything to compare with, by exit class and kind."""
    bare: Counter[str] = field(default_factory=Counter)
    """Exchanges without one compared value, by exit class."""
    reads: Counter[tuple[str, bool]] = field(default_factory=Counter)
    """Reads of devices, by device and whether the value follows from what the guest did before."""
    explained: Counter[str] = field(default_factory=Counter)
    """Differences that a named rule explains."""
    divergences: dict[str, Group] = field(default_factory=dict)
    host_lines: int = 0

    def diverges(self, divergence: Divergence) -> None:
        """Note a divergence."""
        group = self.divergences.get(divergence.cause)
        self.divergences[divergence.cause] = (
            Group(1, divergence) if group is None else group._replace(times=group.times + 1)
        )

    def merge(self, other: Tally) -> None:
        """Add the counts of another replay."""
        for name in ("exchanges", "checked", "inputs", "unchecked", "bare", "reads", "explained"):
            getattr(self, name).update(getattr(other, name))
        self.host_lines += other.host_lines
        for cause, group in other.divergences.items():
            mine = self.divergences.get(cause)
            self.divergences[cause] = group if mine is None else mine._replace(times=mine.times + group.times)

    @property
    def total_checked(self) -> int:
        """All compared values."""
        return sum(self.checked.values())

    @property
    def total_exchanges(self) -> int:
        """All exchanges."""
        return sum(self.exchanges.values())

    @property
    def total_diverged(self) -> int:
        """All unexplained differences."""
        return sum(group.times for group in self.divergences.values())

    def document(self) -> dict[str, Any]:
        """The tally as plain data."""

        def nested(counter: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
            out: dict[str, dict[str, int]] = {}
            for (exit_class, name), count in sorted(counter.items()):
                out.setdefault(exit_class, {})[name] = count
            return out

        return {
            "exchanges": dict(self.exchanges.most_common()),
            "checked": nested(self.checked),
            "inputs": nested(self.inputs),
            "unchecked": nested(self.unchecked),
            "device_reads": {
                name: {"follow": self.reads[name, True], "input": self.reads[name, False]}
                for name in sorted({name for name, _ in self.reads})
            },
            "without_check": dict(self.bare),
            "explained": dict(sorted(self.explained.items())),
            "divergences": {
                cause: {"count": group.times, "first": group.first.text()} for cause, group in self.divergences.items()
            },
            "total": {
                "exchanges": self.total_exchanges,
                "checked": self.total_checked,
                "inputs": sum(self.inputs.values()),
                "explained": sum(self.explained.values()),
                "diverged": self.total_diverged,
                "host_lines": self.host_lines,
            },
        }
