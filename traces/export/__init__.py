"""Traces in other people's formats: each exporter is a function from a reader to a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sevlab.core.errors import ConfigError
from sevlab.traces.reader import TraceReader

Exporter = Callable[[TraceReader, Path], int]
"""Writes a file and returns how many entries it holds."""

FORMATS: dict[str, tuple[str, str]] = {
    "perfetto": ("sevlab.traces.export.perfetto:export", "timeline for ui.perfetto.dev: a track for each vCPU"),
    "jsonl": ("sevlab.traces.export.jsonl:export", "a JSON object for each entry, one a line"),
    "parquet": ("sevlab.traces.export.parquet:export", "a row for each record; needs the extra sevlab[parquet]"),
}
"""Formats: who writes them, and what they are."""

SUFFIXES = {"perfetto": ".perfetto-trace", "jsonl": ".jsonl", "parquet": ".parquet"}


def exporter(name: str) -> Exporter:
    """The exporter for format `name`. Raises `ConfigError` for an unknown one."""
    from sevlab.core.cliapi import resolve

    if name not in FORMATS:
        raise ConfigError(f"export format {name!r}: expected one of {', '.join(FORMATS)}")
    found: Exporter = resolve(FORMATS[name][0])
    return found
