"""From an input that shows something to a finding that people can use: minimised, as a trace, as a story."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sevlab.core.layout import Kind
from sevlab.core.layout_tools import read_field, validate
from sevlab.core.machine import Machine
from sevlab.core.oracle import Finding, OracleSink
from sevlab.core.payload import payload_bytes
from sevlab.core.vocabulary import Record, spec_of
from sevlab.fuzz.paired import Paired
from sevlab.fuzz.runner import Runner
from sevlab.fuzz.store import Store, Stored
from sevlab.fuzz.targets import target_named
from sevlab.traces.minimise import minimise
from sevlab.traces.record import Recorder

MINIMISE_SECONDS = 5.0
PAIRED = ("non-interference", "differential")


def findings_of(runner: Runner, steps: Sequence[Record], *, paired: bool = False) -> tuple[Finding, ...]:
    """What all oracles say of a sequence; `paired` asks those too that need a second run."""
    found = runner.run(steps).findings
    return found + Paired(runner).judge(steps) if paired else found


def smallest(runner: Runner, steps: Sequence[Record], oracle: str, rule: str) -> tuple[Record, ...]:
    """The fewest and simplest steps found in `MINIMISE_SECONDS` that still show the rule."""
    end = time.monotonic() + MINIMISE_SECONDS

    def shows(candidate: tuple[Record, ...]) -> bool:
        if time.monotonic() > end or not all(runner.codec.accepts(step) for step in candidate):
            return False
        found = findings_of(runner, candidate, paired=oracle in PAIRED)
        return any((finding.oracle, finding.rule) == (oracle, rule) for finding in found)

    return minimise(steps, shows) if shows(tuple(steps)) else tuple(steps)


def triage(store: Store, *, given: dict[str, Any] | None = None) -> list[Stored]:
    """Minimise what is not yet, and write each finding's trace; all findings."""
    runners: dict[str, Runner] = {}
    for stored in store.findings():
        path = trace_path(store, stored)
        if stored.minimised is not None and path.exists():
            continue
        runner = runners.get(stored.target)
        if runner is None:
            runner = runners[stored.target] = Runner(target_named(stored.target), given=given)
        steps = smallest(runner, runner.codec.decode(stored.data), stored.oracle, stored.rule)
        store.set_minimised(stored.number, runner.codec.encode(steps))
        write_trace(stored.target, steps, path, given=given)
    return store.findings()


def trace_path(store: Store, stored: Stored) -> Path:
    """Where the trace of a finding lies."""
    return store.folder / "findings" / f"{stored.target}-{stored.identity}.sevtrace"


def write_trace(target: str, steps: Sequence[Record], path: Path, *, given: dict[str, Any] | None = None) -> None:
    """Record a sequence with what the oracles say, boot and all: the trace needs nothing but the plugins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    runner = Runner(target_named(target), given=given)
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


def story(runner: Runner, stored: Stored) -> list[str]:
    """A finding in words: the rule with its source, and the steps with named fields."""
    documentation = {oracle.name: oracle.documentation for oracle in runner.oracles}
    steps = runner.codec.decode(stored.smallest)
    lines = [
        f"{stored.target}: {stored.oracle}: {stored.rule}" + (" (flaky)" if stored.flaky else ""),
        f"  {stored.message}",
        f"  handler {stored.handler or '-'}; state {stored.state or '-'}; seen {stored.seen} times",
    ]
    if stored.oracle in documentation:
        lines.append(f"  rule: {documentation[stored.oracle]}")
    for number, step in enumerate(steps, 1):
        lines += [f"  {number}. {line}" for line in step_lines(runner, step)]
    return lines


def step_lines(runner: Runner, step: Record) -> list[str]:
    """A step with the fields of its message, as far as they are not zero, and the rules that they break."""
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
        if info.kind in {Kind.UINT, Kind.BITS} and value:
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
