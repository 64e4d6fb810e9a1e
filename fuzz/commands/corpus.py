"""`sevlab fuzz corpus`."""

from __future__ import annotations

from hashlib import sha1
from pathlib import Path

import click
from sevlab.core.cli import echo_json
from sevlab.core.errors import TraceFormatError


@click.command()
@click.argument("action", type=click.Choice(["minimise", "import", "export"]))
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.argument("target")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def corpus(*, action: str, folder: Path, target: str, files: tuple[Path, ...], as_json: bool) -> None:
    """Work on the inputs of TARGET in campaign DIR.

    minimise: keep those that reach something no earlier one does; import: traces or inputs of libFuzzer from FILES;
    export: write each into the directory FILES.
    """
    from sevlab.fuzz.corpus import minimal
    from sevlab.fuzz.seeds import seeds_of_file
    from sevlab.fuzz.setup import Setup
    from sevlab.fuzz.store import Store

    store = Store(folder)
    runner = Setup.of(store).runner(target)
    before = [data for _, data in store.inputs(target)]
    refused: list[str] = []
    if action == "minimise":
        store.replace_inputs(target, minimal(runner, before))
    elif action == "export":
        for out in files:
            out.mkdir(parents=True, exist_ok=True)
            for data in before:
                (out / sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)
    for file in files if action == "import" else ():
        try:
            for data in seeds_of_file(file, runner):
                store.add_input(target, data)
        except (TraceFormatError, OSError) as error:
            refused.append(f"{file}: {error}")
    after = len(store.inputs(target))
    if as_json:
        echo_json({"before": len(before), "after": after, "refused": refused})
        return
    for line in refused:
        click.echo(f"not imported: {line}", err=True)
    click.echo(f"{target}: {len(before)} inputs before, {after} now")
