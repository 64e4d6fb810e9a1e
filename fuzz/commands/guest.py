"""`sevlab fuzz again`, and `sevlab fuzz run guest-vc`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from sevlab.core.cli import echo_json
from sevlab.core.errors import ConfigError

if TYPE_CHECKING:
    from sevlab.plugins.engines.start import Start

EXIT_SHOWN = 1


def start_of(kernel: Path | None, *, at: str, after: str, initrd: Path | None, append: str, memory: str,
             strict: bool) -> Start | None:  # fmt: skip
    """The guest that the options of `sevlab fuzz run` describe; None without --kernel. Raises `ConfigError`."""
    from sevlab.plugins.engines.start import Start

    if kernel is None:
        return None
    if not kernel.is_file():
        raise ConfigError(f"--kernel {kernel}: there is no such file")
    return Start(
        str(kernel.resolve()), at, after, "" if initrd is None else str(initrd.resolve()), append, memory, strict
    )


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.argument("identity")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def again(*, folder: Path, identity: str, as_json: bool) -> None:
    """Play finding IDENTITY of guest-vc campaign DIR again: what the guest did, with the names of its code.

    Exit code 1 when it shows again.
    """
    from sevlab.fuzz import guest_vc_campaign

    played = guest_vc_campaign.again(folder, identity)
    if as_json:
        findings = [finding._asdict() for finding in played.findings]
        echo_json({"shown": played.shown, "story": played.lines, "findings": findings})
    else:
        for line in played.lines:
            click.echo(line)
        click.echo("it shows again" if played.shown else "it does not show")
    if played.shown:
        sys.exit(EXIT_SHOWN)
