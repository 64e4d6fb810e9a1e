"""KVM events as text, from tracefs, `trace-cmd report` or `perf script`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sevlab.traces.importers.exchanges import ACTIONS, Exchanges
from sevlab.traces.importers.lines import HEAD, MAX_FRONT, LineReader
from sevlab.traces.schema import Entry

PLUGINS = ("captured",)
"""What replays these logs."""

SOURCE_DERIVED = ("kvm_vmgexit_enter", "kvm_vmgexit_exit", "kvm_vmgexit_msr_protocol_enter", "kvm_rmp_fault")
"""Events whose layout comes from kernel source only: no capture of them exists."""


def recognise(head: bytes) -> str:
    """Which producer wrote a text that starts with `head`; empty for anything else."""
    text = head.decode("ascii", "replace")
    if text.startswith("# tracer:"):
        return "ftrace"
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    if lines and lines[0].startswith(("cpus=", "version =")):
        return "trace-cmd"
    for line in lines[:20]:
        before, found, body = line.partition(": ")
        front, _, time = before.rpartition(" ")
        if found and len(front) <= MAX_FRONT and time[:1].isdigit() and HEAD.fullmatch(front.rstrip()):
            return "perf" if body.strip().startswith("kvm:") else "ftrace"
    return ""


class KvmText:
    """A log of KVM events: `entries` reads it once; `summary` says afterwards what was in it."""

    def __init__(self, format_: str, lines: Iterable[str]) -> None:
        self.format = format_
        self._lines = lines
        self._reader = LineReader(ACTIONS)
        self._exchanges = Exchanges()

    def entries(self) -> Iterator[Entry]:
        """The entries of the log."""
        yield from self._exchanges.entries(self._reader.read(self._lines))

    def summary(self) -> dict[str, Any]:
        """Lines, events by kind, exchanges, and what was not understood."""
        reader, exchanges = self._reader, self._exchanges
        derived = self.format == "perf" or any(name in reader.events for name in SOURCE_DERIVED)
        return {
            "format": self.format,
            "layout": "source-derived" if derived else "seen in captures",
            "lines": reader.lines,
            "headers": reader.headers,
            "events": dict(reader.events.most_common()),
            "exchanges": exchanges.exchanges,
            "unfinished": exchanges.unfinished,
            "vcpus": exchanges.vcpus,
            "unknown": dict(reader.opaque),
            "gaps": reader.gaps,
            "rejected": reader.rejected,
            "examples": [f"line {number}: {text}" for number, text in reader.examples],
            "absent": exchanges.absent,
        }
