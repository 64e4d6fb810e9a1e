"""The commands that the built-in features bring, as data: no feature is imported to list them."""

from __future__ import annotations

from sevlab.core.cliapi import CommandSpec
from sevlab.core.hookspecs import hookimpl

COMMANDS: tuple[CommandSpec, ...] = (
    CommandSpec(
        "measure",
        "Compute the launch digest of an SEV, SEV-ES or SNP guest; compare two of them",
        "sevlab.plugins.snp.commands.measure:measure",
    ),
)


@hookimpl
def sevlab_commands() -> tuple[CommandSpec, ...]:
    return COMMANDS
