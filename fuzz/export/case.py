"""What every reproducer is made from: the trace of a finding, read whole, and what is said about it."""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sevlab.core.config import MachineConfig
from sevlab.core.errors import TraceFormatError
from sevlab.core.machine import vocabulary
from sevlab.core.plugins import PluginSet, load
from sevlab.core.vocabulary import spec_of
from sevlab.fuzz.messages import Carried, Messages
from sevlab.traces.reader import TraceReader
from sevlab.traces.records import Found, Unwritable, Violation
from sevlab.traces.schema import Entry, Header


@dataclass(frozen=True, slots=True)
class Case:
    """A finding to reproduce: its trace, the findings recorded in it, and the command that shows them again.

    `faults` are the plugins of the trace that put a known fault into a handler, those that bring canaries.
    """

    path: Path
    command: str
    header: Header
    entries: tuple[Entry, ...]
    findings: tuple[Found, ...]
    messages: Messages
    faults: tuple[str, ...]

    @property
    def slug(self) -> str:
        """A name for functions and tests: the first finding's oracle and rule, else the file's name."""
        words = f"{self.findings[0].oracle} {self.findings[0].rule}" if self.findings else self.path.stem
        return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_") or "finding"

    def about(self) -> Iterator[str]:
        """What is said at the top of every reproducer, in lines."""
        config = self.header.config
        for found in self.findings:
            yield f"{found.oracle}, rule {found.rule}: {' '.join(found.message.split())}"
            if found.handler or found.state:
                yield f"  handler {found.handler or 'unknown'}; state {found.state or 'unknown'}"
        for number, entry in enumerate(self.entries):
            if isinstance(entry.step, Unwritable):
                yield f"Step {number} could not be recorded, what follows may differ: {entry.step.reason}"
        yield "" if self.findings else "The trace holds no finding."
        yield f"Reproduce: {self.command}"
        yield f"Versions:  {', '.join(f'{name} {number}' for name, number in self.versions.items())}"
        yield f"Seed:      {config.seed.hex()} (hexadecimal), generation {config.generation}"

    @property
    def versions(self) -> dict[str, str]:
        """By name: sevlab, Python, the schema of the records, and each plugin as the trace has it."""
        plugins = {f"plugin {plugin.name}": plugin.version for plugin in self.header.plugins}
        return {
            "sevlab": version("sevlab"),
            "Python": platform.python_version(),
            "schema": self.header.schema_version,
        } | plugins

    def title(self, entry: Entry) -> str:
        """What a step is: its kind, and the name of the message that it carries."""
        carried = self.messages.of(entry.step)
        kind = spec_of(entry.step).kind
        return kind if carried is None else f"{kind} {carried.name}"

    def carried(self, entry: Entry) -> Carried | None:
        """The message that the step of an entry carries."""
        return self.messages.of(entry.step)


def read_case(path: Path, command: str = "", given: Mapping[str, Any] | None = None) -> Case:
    """Read a finding's trace; `given` as in `export`. Raises `TraceFormatError` when it is damaged or imported."""
    with TraceReader(path) as reader:
        header = reader.header
    if header.source.format != "recorded":
        raise TraceFormatError(f"{path}: imported from {header.source.format!r}; a reproducer is made of a recording")
    names = (*header.config.plugins, *(plugin.name for plugin in header.plugins), *(given or {}))
    plugins = load([*dict.fromkeys(names)], given=given)
    with TraceReader(path, vocabulary=vocabulary(plugins)) as reader:
        entries = tuple(reader)
        for loss in reader.check():
            raise TraceFormatError(f"{path}: damaged: {loss}")
        for kind, reason in reader.foreign.items():
            if any(spec_of(entry.step).kind == kind for entry in entries):
                raise TraceFormatError(f"{path}: records of kind {kind!r}: {reason}")
    return Case(
        path,
        command or f"sevlab replay {shlex.quote(str(path))}",
        header,
        entries,
        _findings(entries),
        Messages.of_plugins(plugins),
        _faults(plugins),
    )


def _findings(entries: tuple[Entry, ...]) -> tuple[Found, ...]:
    """What oracles found and what left the machine, each oracle and rule once."""
    found: dict[tuple[str, str], Found] = {}
    for entry in entries:
        for record in entry.outcome:
            if isinstance(record, Violation):
                record = Found("invariant", record.rule, record.message, spec_of(entry.step).kind, "")
            if isinstance(record, Found):
                found.setdefault((record.oracle, record.rule), record)
    return tuple(found.values())


def _faults(plugins: PluginSet) -> tuple[str, ...]:
    return tuple(name for name, canaries in plugins.call("sevlab_canaries").items() if canaries)


def without(config: MachineConfig, names: tuple[str, ...]) -> MachineConfig:
    """A configuration without some of its plugins."""
    return replace(
        config,
        plugins=tuple(name for name in config.plugins if name not in names),
        options={name: options for name, options in config.options.items() if name not in names},
    )
