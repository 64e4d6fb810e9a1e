"""`sevlab demo`: chapters that plugins bring, told one after the other."""

from __future__ import annotations

import time

import click
from sevlab.core import plugins
from sevlab.core.cli import echo_json
from sevlab.core.cliapi import DemoChapter, resolve
from sevlab.core.errors import ConfigError


def chapters() -> tuple[DemoChapter, ...]:
    """All chapters of the installed plugins, and of what brings only commands, in their order."""
    sets = (plugins.load_all(), plugins.load_all(group=plugins.COMMANDS_GROUP))
    found = [item for each in sets for brought in each.call("sevlab_demo_chapters").values() for item in brought]
    return tuple(sorted(found, key=lambda chapter: (chapter.order, chapter.name)))


@click.command()
@click.argument("chapter", required=False)
@click.option("--list", "listing", is_flag=True, help="Only list the chapters.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document: each chapter's lines.")
def demo(*, chapter: str | None, listing: bool, as_json: bool) -> None:
    """Show what the model does: all chapters, or the CHAPTER named."""
    known = chapters()
    chosen = [item for item in known if chapter in (None, item.name)]
    if not chosen:
        raise ConfigError(f"demo chapter {chapter!r}: expected one of {', '.join(item.name for item in known)}")
    if listing:
        for item in chosen:
            click.echo(f"{item.name:<12} {item.title}")
        return
    told = []
    for number, item in enumerate(chosen, 1):
        lines: list[str] = []
        if not as_json:
            click.secho(f"\n{number}. {item.title}  [sevlab demo {item.name}]\n", bold=True)
        started = time.perf_counter()
        resolve(item.target)(lines.append if as_json else click.echo)
        seconds = time.perf_counter() - started
        told.append({"chapter": item.name, "title": item.title, "seconds": round(seconds, 3), "lines": lines})
        if not as_json:
            click.secho(f"\n   ({seconds:.2f} s)", dim=True)
    if as_json:
        echo_json(told)
