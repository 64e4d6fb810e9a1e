"""Framing of KVM event lines: tracefs, `trace-cmd report` and `perf script`, with one tolerant parser.

A line is `comm-tid [cpu] flags time: event: text`. Comm, tid and CPU repeat, and so does most of the text: both halves
are looked up in bounded caches, and only what is new is parsed. A line starts at its first `: `; a comm that holds one
takes the slow path. Source: Linux kernel/trace/trace_output.c, perf script and trace-cmd manual pages.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sevlab.traces.importers.events import parse_event
from sevlab.traces.importers.log_records import Gap, OpaqueEvent

CACHE_LINES = 1 << 16
"""Entries of a cache before it starts afresh: bounds memory at any length of the log."""

MAX_FRONT = 200
"""Longest part of a line before its body: a longer one is none, and takes no time to look at."""

HEAD = re.compile(
    r"\s*(?:.*?\S)[-\s]\s*(?P<tid>\d{1,10})\s+(?:\(\s*[\d-]+\)\s+)?\[(?P<cpu>\d{1,9})\](?:\s+[^\s]{1,8})?"
)
TIME = re.compile(r"\d{1,10}\.\d{1,9}")
WHOLE = re.compile(rf"{HEAD.pattern}\s+(?P<time>{TIME.pattern}): ")
SECONDS = re.compile(r".*\s(\d{1,10})\.")
LOST = re.compile(r"CPU:(?P<cpu>\d{1,9}) \[(?:LOST )?(?P<count>\d{0,18}) ?EVENTS(?: DROPPED)?\]")
NANOSECOND_DIGITS = 9

Line = tuple[int, int, Any, Any]
"""One event: thread id, nanoseconds, record and its tag; a plain tuple, since there is one for each line."""


class LineReader:
    """Reads lines and counts: `lines` all of them, `events` by name, `opaque` by name, `rejected` with examples.

    `tags` give each kind of record what its user wants to know at once.
    """

    EXAMPLES = 10

    def __init__(self, tags: Mapping[type, Any]) -> None:
        self._tags = tags
        self.lines = 0
        self.headers = 0
        self.events: Counter[str] = Counter()
        self.opaque: Counter[str] = Counter()
        self.rejected = 0
        self.examples: list[tuple[int, str]] = []
        self.gaps = 0

    def read(self, lines: Iterable[str]) -> Iterator[Line]:
        """The events of `lines` in their order; a gap has thread id -1."""
        fronts: dict[str, tuple[int, int]] = {}
        """By a line up to its microseconds: thread id, nanoseconds of the second."""
        bodies: dict[str, list[Any]] = {}
        """By text: how often it came, the event's name, its record, the record's tag."""
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                head, _, body = line.partition(": ")
                micros = head[-6:]
                front = fronts.get(head[:-6])
                known = bodies.get(body)
                if known is not None and front is not None and micros.isdecimal():
                    known[0] += 1
                    yield front[0], front[1] + int(micros) * 1000, known[2], known[3]
                    continue
                if front is not None and micros.isdecimal():
                    tid, time_ns = front[0], front[1] + int(micros) * 1000
                else:
                    split = self._split(line)
                    if split is None:
                        yield from self._other(number, line)
                        continue
                    tid, time, body = split
                    time_ns, known = _time_ns(time), bodies.get(body)
                    if len(fronts) >= CACHE_LINES:
                        fronts.clear()
                    second = SECONDS.fullmatch(head[:-6])
                    if second is not None and head.endswith(time) and micros.isdecimal():
                        fronts[head[:-6]] = tid, int(second[1]) * 1_000_000_000
                if known is None:
                    if len(bodies) >= CACHE_LINES:
                        self._count(bodies)
                        bodies.clear()
                    known = bodies[body] = [0, *self._body(body)]
                known[0] += 1
                yield tid, time_ns, known[2], known[3]
        finally:
            self.lines += number
            self._count(bodies)

    def _count(self, bodies: dict[str, list[Any]]) -> None:
        for count, name, record, _ in bodies.values():
            self.events[name] += count
            if type(record) is OpaqueEvent:
                self.opaque[name] += count

    @staticmethod
    def _split(line: str) -> tuple[int, str, str] | None:
        """Thread id, time and body of a line; None for one of another form."""
        head, found, body = line.partition(": ")
        front, _, time = head.rpartition(" ")
        if found and len(front) <= MAX_FRONT and TIME.fullmatch(time):
            match = HEAD.fullmatch(front.rstrip())
            if match is not None:
                return int(match["tid"]), time, body
        match = WHOLE.match(line[:MAX_FRONT])  # the comm may hold ": "
        return None if match is None else (int(match["tid"]), match["time"], line[match.end() :])

    def _body(self, body: str) -> tuple[str, Any, Any]:
        name, _, text = body.strip().removeprefix("kvm:").partition(":")
        name, text = name.strip(), text.strip()
        record = parse_event(name, text)
        if record is None:
            record = OpaqueEvent(name, text)
        return name, record, self._tags.get(type(record))

    def _other(self, number: int, line: str) -> Iterator[Line]:
        text = line.strip()
        lost = LOST.fullmatch(text)
        if lost is not None:
            self.gaps += 1
            gap = Gap(int(lost["cpu"]), (int(lost["count"]),) if lost["count"] else ())
            yield -1, 0, gap, self._tags.get(Gap)
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
