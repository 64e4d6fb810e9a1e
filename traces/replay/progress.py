"""A replay that goes on where it was stopped: its state in a file beside the log.

The file holds the machine's snapshot, what exchanges leave for the next, and the counts so far. It is replaced as a
whole every so many exchanges while nothing has diverged, so that a divergence is found again with its records, and is
gone when the replay is over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
from sevlab.core.errors import SevlabError, TraceFormatError
from sevlab.traces.machine_state import pack_snapshot, unpack_snapshot
from sevlab.traces.replay.engine import Replay

VERSION = 1
COUNTERS = ("exchanges", "checked", "inputs", "unchecked", "bare", "reads", "explained")
CONTEXT = ("injected", "immediate", "pages", "slots", "gsi")


def progress_path(log: Path) -> Path:
    """Where the state of a replay of `log` is kept."""
    return log.with_name(f"{log.name}.progress")


def save(path: Path, replay: Replay, subject: tuple[Any, ...]) -> None:
    """Keep the state of `replay`; `subject` says of what: the log's digest and the options."""
    context = replay.context
    document = {
        "version": VERSION,
        "subject": subject,
        "entries": replay.entries,
        "exchanges": replay.done,
        "machine": pack_snapshot(replay.machine.snapshot()),
        "context": [
            sorted(value.items()) if isinstance(value, dict) else value
            for value in (getattr(context, name) for name in CONTEXT)
        ],
        "counters": [sorted(getattr(replay.tally, name).items()) for name in COUNTERS],
        "host_lines": replay.tally.host_lines,
    }
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(msgpack.packb(document))
    new.replace(path)


def resume(path: Path, replay: Replay, subject: tuple[Any, ...]) -> None:
    """Put a new `replay` into the state that was kept. Raises `TraceFormatError` for that of another log or replay."""
    try:
        document = msgpack.unpackb(path.read_bytes(), use_list=False)
        if document["version"] != VERSION or document["subject"] != subject:
            raise TraceFormatError("of another log or other options")
        replay.machine.restore(unpack_snapshot(document["machine"]))
        for name, value in zip(CONTEXT, document["context"], strict=True):
            setattr(replay.context, name, dict(value) if isinstance(value, tuple) else int(value))
        for name, items in zip(COUNTERS, document["counters"], strict=True):
            getattr(replay.tally, name).update(dict(items))
        replay.tally.host_lines = int(document["host_lines"])
        replay.entries, replay.done = int(document["entries"]), int(document["exchanges"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, SevlabError) as error:
        raise TraceFormatError(f"{path}: {type(error).__name__} {error!s:.200}; remove it to begin anew") from error
