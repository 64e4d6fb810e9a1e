"""Seeds from files: recorded and imported traces, and inputs that other engines kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

from sevlab.core.layout import Kind
from sevlab.core.layout_tools import read_field
from sevlab.core.units import PAGE_BYTES
from sevlab.core.vocabulary import Record
from sevlab.fuzz.codec import MAX_STEPS
from sevlab.fuzz.runner import Runner
from sevlab.plugins.sev_es import Ghcb, Vmgexit
from sevlab.traces.importers.log_records import GhcbMsrTraffic, GhcbPageTraffic
from sevlab.traces.reader import TraceReader
from sevlab.traces.records import Mark, Reset, State
from sevlab.traces.schema import Entry

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
            for step in (at_home(runner, sent) for sent in stimuli(entry)):
                if runner.codec.accepts(step) and len(steps) < MAX_STEPS:
                    steps.append(step)
    if steps:
        yield runner.codec.encode(steps)


def stimuli(entry: Entry) -> Iterator[Record]:
    """What was sent in an entry: its step, and what a log shows that a guest sent its hypervisor because of it."""
    yield entry.step
    for record in entry.outcome:
        if isinstance(record, GhcbMsrTraffic):
            yield Vmgexit(0, record.request, b"")
        elif isinstance(record, GhcbPageTraffic):
            page = bytearray(Ghcb.SIZE)
            for offset, value in record.qwords:
                page[offset : offset + 8] = value.to_bytes(8, "little")
            words = {"protocol_version": record.version, "ghcb_usage": record.usage}
            scratch = Ghcb.from_bytes(bytes(page)).value_or_zero("sw_scratch") - record.gpa
            if record.data and 0 <= scratch <= Ghcb.SIZE - len(record.data):
                page[scratch : scratch + len(record.data)] = record.data
            yield Vmgexit(0, record.gpa, Ghcb.patch(bytes(page), **words))


def at_home(runner: Runner, step: Record) -> Record:
    """A step of another machine as this target's guests would send it: its message lies where theirs do.

    What the record of a declared message has by declaration, such as the place of a GHCB, is set; fields that point
    into the page that it had point into the new one.
    """
    carried = runner.messages.of(step)
    message = None if carried is None else carried.payload.message(step)
    if carried is None or message is None or not message.record:
        return step
    moved = step._replace(**message.record)  # type: ignore[attr-defined]  # every record is a NamedTuple
    data = getattr(step, carried.payload.field)
    if message.layout is None or not isinstance(data, bytes) or moved == step:
        return cast("Record", moved)
    pages = [(getattr(step, name), value) for name, value in message.record.items() if isinstance(value, int)]
    size = message.layout.SIZE
    page = data[:size].ljust(size, b"\0")
    for info in message.layout.FIELDS.values():
        if info.kind is not Kind.UINT:
            continue
        value = read_field(info, page)
        for old, new in pages:
            if old and old <= value < old + PAGE_BYTES:
                page = message.layout.patch(page, **{info.name: value - old + new})
    return cast("Record", moved._replace(**{carried.payload.field: page}))
