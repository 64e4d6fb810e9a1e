"""Framing of KVM event lines: tracefs, `trace-cmd report` and `perf script`, with one tolerant parser.

A line is `comm-tid [cpu] flags time: event: text`. Comm, tid and CPU repeat, and so does most of the text: both halves
are looked up in bounded caches, and only what is new is parsed. A line starts at its first `: `; a comm that holds one
takes the slow path. Source: Linux kernel/trace/trace_output.c, perf script and trace-cmd manual pages.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from sevlab.traces.importers.events import parse_event
from sevlab.traces.importers.log_records import Gap, OpaqueEvent

CACHE_LINES = 1 << 16
"""Entries of a cache before it starts afresh: bounds memory at any length of the log."""

HEAD = re.compile(r"\s*(?:.*?\S)[-\s]\s*(?P<tid>\d+)\s+(?:\(\s*[\d-]+\)\s+)?\[(?P<cpu>\d+)\](?:\s+[^\s]{1,8})?")
WHOLE = re.compile(
    rf"(?P<head>{HEAD.pattern.replace('?P<tid>', '').replace('?P<cpu>', '')})\s+(?P<time>\d+\.\d+): (?P<body>.*)"
)
LOST = re.compile(r"CPU:(?P<cpu>\d+) \[(?:LOST )?(?P<count>\d*) ?EVENTS(?: DROPPED)?\]")
NANOSECOND_DIGITS = 9
OPAQUE = "?"
"""In front of the name of an event whose record is opaque, while it is counted."""


Line = tuple[int, int, str, Any]
"""One event: thread id, nanoseconds, name, and record; a plain tuple, since there is one for each line."""


class LineReader:
    """Reads lines and counts: `lines` all of them, `events` by name, `opaque` by name, `rejected` with examples."""

    EXAMPLES = 10

    def __init__(self) -> None:
        self.lines = 0
        self.headers = 0
        self.events: Counter[str] = Counter()
        self.opaque: Counter[str] = Counter()
        self.rejected = 0
        self.examples: list[tuple[int, str]] = []
        self.gaps = 0

    def read(self, lines: Iterable[str]) -> Iterator[Line]:
        """The events of `lines` in their order; a gap has thread id -1."""
        heads: dict[str, int] = {}
        bodies: dict[str, tuple[str, Any]] = {}
        counts: dict[str, int] = {}
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                head, found, body = line.partition(": ")
                front, _, time = head.rpartition(" ")
                tid = heads.get(front)
                known = bodies.get(body)
                if tid is None or known is None:
                    if not found or (tid is None and (tid := self._head(front, time)) is None):
                        whole = WHOLE.match(line)
                        if whole is None:
                            yield from self._other(number, line)
                            continue
                        front, time, body = whole["head"], whole["time"], whole["body"]
                        tid, known = self._head(front, time), bodies.get(body)
                        assert tid is not None  # WHOLE matched the same head
                    if len(heads) >= CACHE_LINES:
                        heads.clear()
                    heads[front] = tid
                    if known is None:
                        known = self._body(body)
                        if len(bodies) >= CACHE_LINES:
                            bodies.clear()
                        bodies[body] = known
                name, record = known
                counts[name] = counts.get(name, 0) + 1
                try:
                    time_ns = int(time.replace(".", "")) * 1000
                    if time[-7:-6] != ".":
                        time_ns = _time_ns(time)
                except ValueError:
                    counts[name] -= 1
                    self._reject(number, line)
                    continue
                yield tid, time_ns, name, record
        finally:
            self.lines += number
            for name, count in counts.items():
                self.events[name.removeprefix(OPAQUE)] += count
                if name.startswith(OPAQUE):
                    self.opaque[name.removeprefix(OPAQUE)] += count

    @staticmethod
    def _head(front: str, time: str) -> int | None:
        found = HEAD.fullmatch(front.rstrip())
        return int(found["tid"]) if found and time[:1].isdigit() else None

    def _body(self, body: str) -> tuple[str, Any]:
        name, _, text = body.strip().removeprefix("kvm:").partition(":")
        name, text = name.strip(), text.strip()
        record = parse_event(name, text)
        return (name, record) if record is not None else (OPAQUE + name, OpaqueEvent(name, text))

    def _other(self, number: int, line: str) -> Iterator[Line]:
        text = line.strip()
        lost = LOST.fullmatch(text)
        if lost is not None:
            self.gaps += 1
            yield -1, 0, "", Gap(int(lost["cpu"]), (int(lost["count"]),) if lost["count"] else ())
        elif not text or text[0] == "#" or text.startswith(("cpus=", "version =")):
            self.headers += 1
        else:
            self._reject(number, line)

    def _reject(self, number: int, line: str) -> None:
        self.rejected += 1
        if len(self.examples) < self.EXAMPLES:
            self.examples.append((number, line.rstrip("\n")[:200]))


def _time_ns(time: str) -> int:
    seconds, _, fraction = time.partition(".")
    return int(seconds) * 1_000_000_000 + int(fraction[:NANOSECOND_DIGITS].ljust(NANOSECOND_DIGITS, "0"))
