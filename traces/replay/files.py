"""Replay of files: captures and imported traces, one after the other or on several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
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
from sevlab.traces.replay.progress import progress_path, resume, save
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
    resume: bool = False


class Opened(NamedTuple):
    """A file whose entries can be read, once."""

    header: Header
    entries: Iterable[Entry]


@contextmanager
def open_entries(path: Path) -> Iterator[Opened]:
    """The entries of a trace or, as they are imported, of a capture. Raises `TraceFormatError`."""
    if path.suffix == TRACE_SUFFIX:
        with TraceReader(path) as reader:
            yield Opened(reader.header, reader)
        return
    capture = open_capture(path)
    try:
        yield Opened(capture.header, capture.entries())
    finally:
        capture.source.close()


def exchanges_in(path: Path) -> int:
    """How many exchanges a file says at its end that it holds; 0 when it does not say."""
    if path.suffix != TRACE_SUFFIX:
        return 0
    with TraceReader(path) as reader:
        return reader.index.counts.get("exchanges", 0) if reader.index is not None else 0


def replay_file(path: Path, choice: Choice, progress: Callable[[int], None] | None = None) -> Tally:
    """Replay one file of an imported log."""
    with open_entries(path) as opened:
        if opened.header.source.format == "ghcb":
            return GhcbReplay().run(opened.entries, until=choice.until, stop_at_first=choice.stop_at_first)
        if opened.header.source.format == "ccp":
            raise TraceFormatError(f"{path}: the answers of the firmware in a ccp log are not computed by the model")
        if choice.feature:
            return FeatureReplay(choice.feature).run(
                opened.entries, until=choice.until, only=choice.only, stop_at_first=choice.stop_at_first
            )
        return _replay(path, opened, choice, progress)


def _replay(path: Path, opened: Opened, choice: Choice, progress: Callable[[int], None] | None) -> Tally:
    replay = Replay(Machine(opened.header.config))
    kept, subject = progress_path(path), (opened.header.source.sha256, *sorted(choice.only), choice.start)
    if choice.resume and kept.exists():
        resume(kept, replay, subject)
    tally = replay.run(
        islice(opened.entries, replay.entries, None),
        until=choice.until,
        only=choice.only,
        stop_at_first=choice.stop_at_first,
        start=choice.start,
        progress=progress,
        keep=(lambda one: save(kept, one, subject)) if choice.resume else None,
    )
    if choice.resume and (choice.until is None or replay.done < choice.until):
        kept.unlink(missing_ok=True)
    return tally


def replay_files(paths: Iterable[Path], choice: Choice, jobs: int = 1) -> dict[Path, Tally]:
    """Replay several files, `jobs` at a time; each has a machine of its own."""
    paths = list(paths)
    if jobs <= 1 or len(paths) <= 1:
        return {path: replay_file(path, choice) for path in paths}
    with ProcessPoolExecutor(max_workers=jobs) as pool:
        return dict(zip(paths, pool.map(replay_file, paths, [choice] * len(paths)), strict=True))


def exchange(path: Path, number: int) -> Entry:
    """Exchange `number` (from 0) of a file. Raises `IndexError` when there are fewer."""
    with open_entries(path) as opened:
        exchanges = (entry for entry in opened.entries if type(entry.step) is GuestExit)
        return next(islice(exchanges, number, None))
