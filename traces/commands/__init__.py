"""The commands of traces, as data: nothing is imported to list them."""

from __future__ import annotations

from sevlab.core.cliapi import CommandSpec
from sevlab.core.hookspecs import hookimpl

_HERE = "sevlab.traces.commands"

COMMANDS: tuple[CommandSpec, ...] = (
    CommandSpec("import", "Turn a log of a real machine into a trace", f"{_HERE}.import_:import_"),
    CommandSpec("assess", "Say what happens to a captured guest under encryption", f"{_HERE}.assess:assess"),
    CommandSpec("replay", "Replay captures and traces, and compare", f"{_HERE}.replay:replay"),
    CommandSpec("record", "Record what a command or a script does to its machines", f"{_HERE}.record:record"),
    CommandSpec("trace", "Show a trace: header, kinds, entries", f"{_HERE}.show:trace", "show"),
    CommandSpec("diff", "Show where two traces part", f"{_HERE}.diff:diff"),
    CommandSpec("minimise", "Make a trace as small as what it shows allows", f"{_HERE}.minimise:minimise"),
    CommandSpec("export", "Write a trace in another format", f"{_HERE}.export:export"),
)


@hookimpl
def sevlab_commands() -> tuple[CommandSpec, ...]:
    """The commands."""
    return COMMANDS
