"""`sevlab export`."""

from __future__ import annotations

from pathlib import Path

import click
from sevlab.core.cli import echo_json
from sevlab.core.errors import ConfigError
from sevlab.traces.export import FORMATS, SUFFIXES, exporter
from sevlab.traces.reader import TraceReader


@click.command(epilog="\b\n" + "\n".join(f"{name:<10}{what}" for name, (_, what) in FORMATS.items()))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--format", "name", type=click.Choice(list(FORMATS)), default="perfetto", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: FILE with the format's suffix.")
@click.option("--overwrite", is_flag=True, help="Replace a file that exists.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def export(*, file: Path, name: str, output: Path | None, overwrite: bool, as_json: bool) -> None:
    """Write trace FILE in another format."""
    write = exporter(name)
    target = output or file.with_suffix(SUFFIXES[name])
    if target.exists() and not overwrite:
        raise ConfigError(f"{target}: exists already; --overwrite replaces it")
    with TraceReader(file) as reader:
        try:
            count = write(reader, target)
        except OSError as error:
            raise ConfigError(f"{target}: {error.strerror or error}") from error
        losses = [str(loss) for loss in reader.losses]
    for loss in losses:
        click.echo(f"damaged: {loss}", err=True)
    if as_json:
        echo_json({"file": str(target), "format": name, "entries": count, "lost": losses})
    else:
        click.echo(f"{target}: {count} entries")
