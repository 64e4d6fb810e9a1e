"""Seeds from files: recorded and imported traces, and inputs that other engines kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sevlab.core.vocabulary import Record
from sevlab.fuzz.codec import MAX_STEPS
from sevlab.fuzz.runner import Runner
from sevlab.traces.reader import TraceReader
from sevlab.traces.records import Mark, Reset, State

SUFFIX = ".sevtrace"


def seeds_of_file(path: Path, runner: Runner) -> Iterator[bytes]:
    """The inputs in a file: a trace is cut into sequences of at most 64 steps that the target has; any other file is an
    input as it is. Raises `TraceFormatError` or `OSError`.
    """
    if path.suffix != SUFFIX:
        yield path.read_bytes()
        return
    steps: list[Record] = []
    with TraceReader(path) as reader:
        for entry in reader:
            ends = isinstance(entry.step, (Reset, Mark, State)) or len(steps) == MAX_STEPS
            if ends and steps:
                yield runner.codec.encode(steps)
                steps = []
            if runner.codec.accepts(entry.step):
                steps.append(entry.step)
    if steps:
        yield runner.codec.encode(steps)
