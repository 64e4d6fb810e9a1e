"""The stranger's command and demo chapter."""

from __future__ import annotations

from collections.abc import Callable

import click


@click.command()
def greet() -> None:
    """Say hello."""
    click.echo("hello from a stranger")


def chapter(say: Callable[[str], object]) -> None:
    """One line."""
    say("   a stranger was here")
