"""From an input that shows something to a finding that people can use: minimised, as a trace, as a story."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from sevlab.core.errors import CampaignError
from sevlab.core.layout import Kind
from sevlab.core.layout_tools import read_field, validate
from sevlab.core.machine import Machine
from sevlab.core.oracle import Finding, OracleSink
from sevlab.core.payload import payload_bytes
from sevlab.core.vocabulary import Record, spec_of
from sevlab.fuzz.paired import Paired
from sevlab.fuzz.runner import Runner
from sevlab.fuzz.setup import Setup
from sevlab.fuzz.store import Store, Stored
from sevlab.traces.minimise import minimise
from sevlab.traces.record import Recorder

MINIMISE_SECONDS = 5.0
PAIRED = ("non-interference", "differential")
SHOWN_DIFFERENCES = 8


def findings_of(runner: Runner, steps: Sequence[Record], *, paired: bool = False) -> tuple[Finding, ...]:
    """What all oracles say of a sequence; `paired` asks those too that need a second run."""
    found = runner.run(steps).findings
    return found + Paired(runner).judge(steps) if paired else found


def smallest(
    runner: Runner, steps: Sequence[Record], oracle: str, rule: str, *, seconds: float = MINIMISE_SECONDS
) -> tuple[Record, ...]:
    """The fewest and simplest steps found in `seconds` that still show the rule."""
    end = time.monotonic() + seconds

    def shows(candidate: tuple[Record, ...]) -> bool:
        if time.monotonic() > end or not all(runner.codec.accepts(step) for step in candidate):
            return False
        found = findings_of(runner, candidate, paired=oracle in PAIRED)
        return any((finding.oracle, finding.rule) == (oracle, rule) for finding in found)

    return minimise(steps, shows) if shows(tuple(steps)) else tuple(steps)


class Triage:
    """Works on the findings of one campaign, with the machines that the campaign has."""

    def __init__(self, store: Store, setup: Setup | None = None) -> None:
        self._store = store
        self.setup = Setup.of(store) if setup is None else setup
        self._runners: dict[tuple[str, bool], Runner] = {}

    def runner(self, target: str) -> Runner:
        """The campaign's machine for a target."""
        return self._runner(target, faults=True)

    def _runner(self, target: str, *, faults: bool) -> Runner:
        runner = self._runners.get((target, faults))
        if runner is None:
            setup = self.setup if faults else self.setup.without_faults()
            runner = self._runners[target, faults] = setup.runner(target)
        return runner

    def all(self) -> list[Stored]:
        """Minimise what is not yet, and write each finding's trace; all findings."""
        for stored in self._store.findings():
            if stored.minimised is None or not trace_path(self._store, stored).exists():
                self.minimise(stored)
        return self._store.findings()

    def named(self, identity: str) -> Stored:
        """The one finding whose identity begins so. Raises `CampaignError` that lists those there are."""
        found = [stored for stored in self._store.findings() if stored.identity.startswith(identity)]
        if len(found) != 1:
            known = ", ".join(stored.identity for stored in self._store.findings()) or "none"
            raise CampaignError(
                f"{self._store.folder}: {len(found)} findings begin with {identity!r}; there are {known}"
            )
        return found[0]

    def minimise(self, stored: Stored, *, seconds: float = MINIMISE_SECONDS) -> Stored:
        """Make a finding as small as it gets in `seconds`, and write its trace."""
        runner = self.runner(stored.target)
        steps = smallest(runner, runner.codec.decode(stored.smallest), stored.oracle, stored.rule, seconds=seconds)
        self._store.set_minimised(stored.number, runner.codec.encode(steps))
        write_trace(runner, steps, trace_path(self._store, stored))
        return self.named(stored.identity)

    def story(self, stored: Stored) -> list[str]:
        """A finding in words: the rule with its source, the steps with named fields, and what a correct answer is."""
        runner = self.runner(stored.target)
        documentation = {oracle.name: oracle.documentation for oracle in runner.oracles} | PAIRED_RULES
        steps = runner.codec.decode(stored.smallest)
        lines = [
            f"{stored.target}: {stored.oracle}: {stored.rule}" + (" (flaky)" if stored.flaky else ""),
            f"  {stored.message}",
            f"  finding {stored.identity}, seen {stored.seen} times",
            f"  handler {stored.handler or '-'}; state {stored.state or '-'}",
            f"  rule: {documentation.get(stored.oracle, INVARIANT_RULE)}",
        ]
        for number, step in enumerate(steps, 1):
            lines += [f"  {number}. {line}" for line in step_lines(runner, step)]
        return [*lines, *(f"  {line}" for line in self._difference(runner, stored.target, steps))]

    def _difference(self, runner: Runner, target: str, steps: Sequence[Record]) -> list[str]:
        """How the outcomes differ from those of the same machine without faults, where there is such a one."""
        if self.setup == self.setup.without_faults():
            return []
        correct = self._runner(target, faults=False)
        lines = []
        for number, (here, there) in enumerate(zip(answers(runner, steps), answers(correct, steps), strict=False), 1):
            lines += [f"step {number}: {line}" for line in outcome_difference(here, there)]
        if not lines:
            return ["a correct machine answers the same: what is wrong does not show in an answer"]
        more = len(lines) - SHOWN_DIFFERENCES
        return [*lines[:SHOWN_DIFFERENCES], *([f"and {more} more differences"] if more > 0 else [])]


INVARIANT_RULE = (
    "A handler never leaves a checked buffer, and nothing that is sent to a machine raises out of it."
    " Source: docs/architecture.md, errors by blame."
)
PAIRED_RULES = {
    "non-interference": (
        "What the guest has not marked valid does not change an answer. Source: 56421, 2.6 (VALID_BITMAP)."
    ),
    "differential": "The same steps on the same machine give the same answers, however often.",
}


def answers(runner: Runner, steps: Sequence[Record]) -> list[tuple[Record, ...]]:
    """What each step led to, as far as the sequence gets."""
    found: list[tuple[Record, ...]] = []
    runner.run(steps, told=lambda _step, outcome: found.append(outcome.records))
    return found


def outcome_difference(here: Sequence[Record], correct: Sequence[Record]) -> Iterator[str]:
    """The fields in which an outcome differs from the correct one."""
    for one, other in zip_longest(here, correct):
        if one == other and type(one) is type(other):
            continue
        if one is None or other is None or type(one) is not type(other):
            found, expected = ("nothing" if record is None else spec_of(record).kind for record in (one, other))
            yield f"{found} instead of {expected}"
            return
        for field, value, expected in zip(spec_of(one).fields, one, other, strict=True):
            if value != expected:
                yield f"{spec_of(one).kind}.{field.name} is {_words(value)}, correct is {_words(expected)}"


def trace_path(store: Store, stored: Stored) -> Path:
    """Where the trace of a finding lies."""
    return store.folder / "findings" / f"{stored.target}-{stored.identity}.sevtrace"


def write_trace(runner: Runner, steps: Sequence[Record], path: Path) -> None:
    """Record a sequence with what the oracles say, boot and all: the trace needs nothing but the plugins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = Machine(runner.config, plugins=runner.plugins)
    machine.sink = OracleSink(runner.oracles)
    with Recorder(machine, path, overwrite=True) as recorder:
        if runner.target.boot is not None:
            runner.target.boot(machine)
        machine.fetches.keep_log(keep=True)
        for step in steps:
            try:
                machine.apply(step)
            except Exception:  # noqa: BLE001  # the recorder has written it as the violation that it is
                break
        recorder.end()


def step_lines(runner: Runner, step: Record) -> list[str]:
    """A step with the fields of its message that are not zero or marked valid, and the rules that they break."""
    carried = runner.messages.of(step)
    spec = spec_of(step)
    shown = [
        f"{field.name}={_words(value)}"
        for field, value in zip(spec.fields, step, strict=True)
        if carried is None or field.name != carried.payload.field
    ]
    if carried is None or carried.layout is None:
        return [f"{spec.kind} {' '.join(shown)}"]
    data = payload_bytes(carried.payload, step)[: carried.layout.SIZE].ljust(carried.layout.SIZE, b"\0")
    item = carried.layout.from_bytes(data)
    fields = []
    for name, info in carried.layout.FIELDS.items():
        value = read_field(info, data)
        if info.kind in {Kind.UINT, Kind.BITS} and (value or (info.valid_bit and item.is_valid(name))):
            fields.append(f"{name}={value:#x}" + ("" if item.is_valid(name) else " (not valid)"))
    broken = [f"{problem.field}: {problem.rule}" for problem in validate(carried.layout, data)]
    line = f"{spec.kind} {carried.name}: {' '.join(shown)}"
    return [
        line,
        *([f"   {', '.join(fields)}"] if fields else []),
        *([f"   breaks {', '.join(broken)}"] if broken else []),
    ]


def _words(value: object) -> str:
    return f"{value:#x}" if isinstance(value, int) and not isinstance(value, bool) else f"{value!r:.60}"
