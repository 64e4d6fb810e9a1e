"""The commands of fuzzing, as data: nothing is imported to list them."""

from __future__ import annotations

from sevlab.core.cliapi import CommandSpec, DemoChapter
from sevlab.core.hookspecs import hookimpl

_HERE = "sevlab.fuzz.commands"

COMMANDS: tuple[CommandSpec, ...] = (
    CommandSpec("targets", "List what there is to fuzz", f"{_HERE}.run:targets", "fuzz"),
    CommandSpec("run", "Run or resume a campaign", f"{_HERE}.run:run", "fuzz"),
    CommandSpec("status", "Show the numbers of a campaign", f"{_HERE}.results:status", "fuzz"),
    CommandSpec("triage", "Minimise the findings of a campaign and tell each", f"{_HERE}.results:triage", "fuzz"),
    CommandSpec("minimise", "Make a finding smaller", f"{_HERE}.results:minimise", "fuzz"),
    CommandSpec("cover", "Show what messages and code a corpus reaches", f"{_HERE}.results:cover", "fuzz"),
    CommandSpec("corpus", "Import, export or minimise a campaign's corpus", f"{_HERE}.corpus:corpus", "fuzz"),
    CommandSpec("again", "Play a finding of a real guest again", f"{_HERE}.guest:again", "fuzz"),
    CommandSpec("export", "Write a finding as a test or a program for elsewhere", f"{_HERE}.results:export", "fuzz"),
)


@hookimpl
def sevlab_commands() -> tuple[CommandSpec, ...]:
    """The commands."""
    return COMMANDS


@hookimpl
def sevlab_demo_chapters() -> tuple[DemoChapter, ...]:
    """The chapter of fuzzing."""
    return (DemoChapter("fuzz", "Fuzzing: a published bug found, made small and told", 80, "sevlab.fuzz.demo:chapter"),)
