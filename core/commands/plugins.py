"""`sevlab plugins`: what is installed, what one plugin does, and a package to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from sevlab.core import plugins
from sevlab.core.builder import Builder
from sevlab.core.cli import echo_json
from sevlab.core.commands.skeleton import write_skeleton
from sevlab.core.config import MachineConfig
from sevlab.core.errors import PluginError
from sevlab.core.machine import compose


def _row(plugin: plugins.PluginInfo, hooks: tuple[str, ...]) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "requires": list(plugin.requires),
        "summary": plugin.summary,
        "hooks": list(hooks),
    }


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of the table.")
def list_(*, as_json: bool) -> None:
    """List the installed plugins in load order, with version, requirements and hooks."""
    loaded = plugins.load_all()
    rows = [_row(plugin, loaded.hooks(plugin.name)) for plugin in loaded.plugins]
    if as_json:
        echo_json(rows)
        return
    for row in rows:
        requires = f"  requires {', '.join(row['requires'])}" if row["requires"] else ""
        click.echo(f"{row['name']:<12} {row['distribution']} {row['version']}{requires}")
        click.echo(f"{'':<12} {row['summary']}")


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of text.")
def show(*, name: str, as_json: bool) -> None:
    """Show plugin NAME: its hooks and options, and what it handles in a machine of its own."""
    loaded = plugins.load([name])
    plugin = next(plugin for plugin in loaded.plugins if plugin.name == name)
    options = loaded.call_one(name, "sevlab_options") or ()
    report = _row(plugin, loaded.hooks(name)) | {
        "options": [
            {"name": option.name, "default": option.default, "legal": option.legal, "doc": option.doc}
            for option in options
        ],
        "handles": _handles(compose(MachineConfig(plugins=(name,)), loaded), name),
    }
    if as_json:
        echo_json(report)
        return
    click.echo(f"{name}: {plugin.summary}\n{plugin.distribution} {plugin.version}")
    if plugin.requires:
        click.echo(f"requires  {', '.join(plugin.requires)}")
    click.echo(f"hooks     {', '.join(report['hooks'])}")
    for option in report["options"]:
        click.echo(
            f"option    plugin.{name}.{option['name']} = {option['default']!r}  ({option['legal']}) {option['doc']}"
        )
    for what, keys in report["handles"].items():
        click.echo(f"handles   {what}: {', '.join(keys)}")


def _handles(builder: Builder, name: str) -> dict[str, list[str]]:
    found = {
        registry.what: [registry.show(key) for key, entry in registry.entries().items() if entry.plugin == name]
        for registry in builder.registries()
    }
    return {what: keys for what, keys in found.items() if keys}


@click.command()
@click.argument("name")
@click.option("--into", type=click.Path(file_okay=False, path_type=Path), default=Path(), help="Where to write it.")
def new(*, name: str, into: Path) -> None:
    """Write package sevlab-NAME: a handler, a state machine, a layout and a passing test."""
    if not (name.isidentifier() and name.islower()):
        raise PluginError(f"plugin name {name!r}: expected lower-case letters, digits and underscores")
    if name in plugins.installed():
        raise PluginError(f"a plugin {name!r} is installed already")
    folder = write_skeleton(name, into)
    click.echo(
        f"wrote {folder}; now:\n  pip install -e {folder}\n  python -m pytest {folder}\n  sevlab plugins show {name}"
    )
