"""Replay of files: captures and imported traces, one after the other or on several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from sevlab.core.errors import TraceFormatError
from sevlab.core.events import GuestExit
from sevlab.core.machine import Machine
from sevlab.traces.importers.catalogue import open_capture
from sevlab.traces.reader import TraceReader
from sevlab.traces.replay.engine import Replay
from sevlab.traces.replay.feature import FeatureReplay
from sevlab.traces.replay.ghcb import GhcbReplay
from sevlab.traces.replay.tally import Tally
from sevlab.traces.schema import Entry, Header

TRACE_SUFFIX = ".sevtrace"


class Choice(NamedTuple):
    """What of a file is replayed and how: as the options of `sevlab replay`."""

    until: int | None = None
    only: frozenset[str] = frozenset()
    stop_at_first: bool = False
    start: int = 0
    feature: str = ""


class Opened(NamedTuple):
    """A file whose entries can be read: `exchanges` as far as its end says, else 0."""

    header: Header
    entries: Iterable[Entry]
    exchanges: int


def open_entries(path: Path) -> Opened:
    """The entries of a trace or, as they are imported, of a capture. Raises `TraceFormatError`."""
    if path.suffix == TRACE_SUFFIX:
        reader = TraceReader(path)
        counts = reader.index.counts if reader.index is not None else {}
        return Opened(reader.header, reader, counts.get("exchanges", 0))
    capture = open_capture(path)
    return Opened(capture.header, capture.entries(), 0)


def replay_file(path: Path, choice: Choice, progress: Callable[[int], None] | None = None) -> Tally:
    """Replay one file of an imported log."""
    opened = open_entries(path)
    if opened.header.source.format == "ghcb":
        return GhcbReplay().run(opened.entries, until=choice.until, stop_at_first=choice.stop_at_first)
    if opened.header.source.format == "ccp":
        raise TraceFormatError(f"{path}: the answers of the firmware in a ccp log are not computed by the model")
    if choice.feature:
        return FeatureReplay(choice.feature).run(
            opened.entries, until=choice.until, only=choice.only, stop_at_first=choice.stop_at_first
        )
    replay = Replay(Machine(opened.header.config))
    return replay.run(
        opened.entries,
        until=choice.until,
        only=choice.only,
        stop_at_first=choice.stop_at_first,
        start=choice.start,
        progress=progress,
    )


def replay_files(paths: Iterable[Path], choice: Choice, jobs: int = 1) -> dict[Path, Tally]:
    """Replay several files, `jobs` at a time; each has a machine of its own."""
    paths = list(paths)
    if jobs <= 1 or len(paths) <= 1:
        return {path: replay_file(path, choice) for path in paths}
    with ProcessPoolExecutor(max_workers=jobs) as pool:
        return dict(zip(paths, pool.map(replay_file, paths, [choice] * len(paths)), strict=True))


def exchange(path: Path, number: int) -> Entry:
    """Exchange `number` (from 0) of a file. Raises `IndexError` when there are fewer."""
    exchanges = (entry for entry in open_entries(path).entries if type(entry.step) is GuestExit)
    return next(islice(exchanges, number, None))
