"""The command `sevlab`: a group whose commands are found by name and imported when called."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from sevlab.core.cliapi import CommandSpec, resolve
from sevlab.core.errors import ConfigError, InvariantViolation, PluginError, SevlabError

BUILT_IN: tuple[CommandSpec, ...] = (
    CommandSpec("demo", "Show what the model does, chapter by chapter", "sevlab.core.commands.demo:demo"),
    CommandSpec("doctor", "Check what is installed and works", "sevlab.core.commands.doctor:doctor"),
    CommandSpec("list", "List the installed plugins", "sevlab.core.commands.plugins:list_", "plugins"),
    CommandSpec(
        "show", "Show one plugin: hooks, options, what it handles", "sevlab.core.commands.plugins:show", "plugins"
    ),
    CommandSpec("new", "Write a working plugin package to start from", "sevlab.core.commands.plugins:new", "plugins"),
)

EXIT_USER_ERROR = 2
EXIT_INVARIANT = 3

EPILOG = """Exit codes: 0 done, 1 the answer is no (a check failed, a capability is missing),
2 the input cannot be used, 3 the model broke one of its own rules (please report it)."""


class LazyGroup(click.Group):
    """A group that knows its commands as data and imports one only to run it."""

    def __init__(self, *args: Any, specs: Callable[[], tuple[CommandSpec, ...]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._specs = specs

    def _known(self) -> dict[str, CommandSpec]:
        return {spec.name: spec for spec in self._specs()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in alphabetical order."""
        return sorted([*self._known(), *super().list_commands(ctx)])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command."""
        spec = self._known().get(cmd_name)
        if spec is None:
            return super().get_command(ctx, cmd_name)
        command = resolve(spec.target)
        if not isinstance(command, click.Command):
            raise PluginError(f"command {cmd_name!r}: {spec.target} is {command!r:.60}, expected a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The help list from the data alone: nothing is imported."""
        known = self._known()
        rows = []
        for name in self.list_commands(ctx):
            if name in known:
                rows.append((name, known[name].summary))
            else:
                command = super().get_command(ctx, name)
                rows.append((name, command.get_short_help_str() if command else ""))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _plugin_commands() -> tuple[CommandSpec, ...]:
    from sevlab.core import plugins

    found: dict[tuple[str, str], str] = {(spec.group, spec.name): "core" for spec in BUILT_IN}
    specs: list[CommandSpec] = []
    for name, commands in plugins.load_all(group=plugins.COMMANDS_GROUP).call("sevlab_commands").items():
        for spec in commands:
            owner = found.setdefault((spec.group, spec.name), name)
            if owner != name:
                full = f"{spec.group} {spec.name}".strip()
                raise PluginError(f"command {full!r} is brought twice: by {owner!r} and by plugin {name!r}")
            specs.append(spec)
    return tuple(specs)


def _all_specs() -> tuple[CommandSpec, ...]:
    return BUILT_IN + _plugin_commands()


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:  # noqa: FBT001  # click's signature
    if value:
        click.echo(f"sevlab {metadata.version('sevlab')}")
        ctx.exit()


class RootGroup(LazyGroup):
    """The top level: single commands and groups from the same data."""

    def _known(self) -> dict[str, CommandSpec]:
        return {spec.name: spec for spec in self._specs() if not spec.group}

    def _groups(self) -> list[str]:
        return sorted({spec.group for spec in self._specs() if spec.group})

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of commands and groups in alphabetical order."""
        return sorted({*super().list_commands(ctx), *self._groups()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command, or the group of that name."""
        if cmd_name not in self._groups():
            return super().get_command(ctx, cmd_name)
        specs = tuple(spec for spec in self._specs() if spec.group == cmd_name)
        if cmd_name in self._known():
            return self._enlarged(ctx, cmd_name, specs)
        return LazyGroup(cmd_name, specs=lambda: specs, short_help=", ".join(spec.name for spec in specs))

    def _enlarged(self, ctx: click.Context, name: str, specs: tuple[CommandSpec, ...]) -> click.Command:
        """A command that is a group of its own, with what other plugins put beside its subcommands."""
        command = super().get_command(ctx, name)
        if not isinstance(command, click.Group):
            raise PluginError(f"command {specs[0].group} {specs[0].name}: {name!r} is a command and no group")
        for spec in specs:
            command.add_command(resolve(spec.target), spec.name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The help list from the data alone."""
        known = self._known()
        rows = [(name, spec.summary) for name, spec in known.items()]
        for group in self._groups():
            if group in known:
                continue
            names = ", ".join(spec.name for spec in self._specs() if spec.group == group)
            rows.append((group, f"Subcommands: {names}"))
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows))


@click.group(cls=RootGroup, specs=_all_specs, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def root() -> None:
    """An executable model of AMD SME, SEV, SEV-ES and SEV-SNP."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what the user got wrong is one line on standard error, never a traceback."""
    try:
        root.main(arguments, prog_name="sevlab", standalone_mode=True)
    except ConfigError as error:
        _fail("configuration", error, EXIT_USER_ERROR)
    except SevlabError as error:
        _fail("error", error, EXIT_USER_ERROR)
    except InvariantViolation as error:
        _fail("invariant broken", error, EXIT_INVARIANT)


def _fail(what: str, error: Exception, code: int) -> None:
    click.echo(f"sevlab: {what}: {error}", err=True)
    sys.exit(code)


def write_output(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file that a command makes, with these permissions if it is new. Raises `ConfigError`."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def echo_json(value: Any) -> None:
    """Print `value` as the one JSON document of a command's `--json`."""
    click.echo(json.dumps(value, indent=2, sort_keys=False))
