"""Reproducers in other people's formats: pure functions from a finding's trace to a text.

A finding is a `.sevtrace`: the machine's configuration, the steps, and what the oracles said. Each text names the
command that replays the trace, the versions and the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sevlab.core.errors import ConfigError
from sevlab.fuzz.export.case import Case, read_case

FORMATS: dict[str, tuple[str, str, str]] = {
    "pytest": ("sevlab.fuzz.export.pytest_file:text", ".py", "a test: red where the fault is, green where it is not"),
    "kvm-unit-test": ("sevlab.fuzz.export.kvm_unit_test:text", ".c", "a guest's VMGEXITs in C, for kvm-unit-tests"),
    "syzkaller": ("sevlab.fuzz.export.syzkaller:text", ".syz", "mailbox commands as ioctls, for syzkaller"),
    "json": ("sevlab.fuzz.export.json_document:text", ".json", "everything, with the fields of each message"),
}
"""Formats: who makes the text, the suffix of its file, and what it is."""


def export(
    trace_path: str | Path,
    format: str,  # noqa: A002  # the user's word for it
    *,
    command: str = "",
    given: Mapping[str, Any] | None = None,
) -> str:
    """The reproducer of a finding as text in `format`.

    `command` is what reproduces it, by default the replay of the trace; `given` maps names to plugin modules of the
    trace that are not installed. Raises `ConfigError` for an unknown format,
    `TraceFormatError` for a trace that cannot be read whole, `PluginError` for a missing plugin.
    """
    from sevlab.core.cliapi import resolve

    if format not in FORMATS:
        raise ConfigError(f"export format {format!r}: expected one of {', '.join(FORMATS)}")
    make: Callable[[Case], str] = resolve(FORMATS[format][0])
    return make(read_case(Path(trace_path), command, given))
