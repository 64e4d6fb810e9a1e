"""The commands of traces, as data: nothing is imported to list them."""

from __future__ import annotations

from sevlab.core.cliapi import CommandSpec
from sevlab.core.hookspecs import hookimpl

COMMANDS: tuple[CommandSpec, ...] = ()


@hookimpl
def sevlab_commands() -> tuple[CommandSpec, ...]:
    """The commands."""
    return COMMANDS
