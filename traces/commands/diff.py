"""`sevlab diff`."""

from __future__ import annotations

from pathlib import Path

import click
from sevlab.core.cli import echo_json
from sevlab.traces.diff import diff as find_parting
from sevlab.traces.diff import entry_lines, header_differences
from sevlab.traces.reader import TraceReader
from sevlab.traces.text import entry_json


@click.command()
@click.argument("left", type=click.Path(path_type=Path))
@click.argument("right", type=click.Path(path_type=Path))
@click.option("-C", "--context", type=click.IntRange(min=0), default=3, show_default=True, help="Entries around.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def diff(*, left: Path, right: Path, context: int, as_json: bool) -> None:
    """Show the first entry in which traces LEFT and RIGHT differ; exit with 1 if there is one. Times may differ."""
    with TraceReader(left) as one, TraceReader(right) as other:
        headers = header_differences(one, other)
        parting = find_parting(one, other, context=context)
        if as_json:
            sides = {} if parting is None else {"before": parting.before, "left": parting.left, "right": parting.right}
            document = {
                "equal": parting is None,
                "header": headers,
                "entry": None if parting is None else parting.number,
                "what": None if parting is None else parting.what,
            }
            echo_json(document | {name: [entry_json(*item) for item in side] for name, side in sides.items()})
        else:
            for line in headers:
                click.echo(f"header: {line}")
            if parting is None:
                click.echo(f"no difference in {len(one)} entries")
            else:
                click.echo(f"entry {parting.number}: {parting.what}")
                for mark, side in ((" ", parting.before), ("-", parting.left), ("+", parting.right)):
                    for number, entry in side:
                        for line in entry_lines(number, entry):
                            click.echo(f"{mark}{line}")
        for trace in (one, other):
            for loss in trace.losses:
                click.echo(f"damaged: {trace.name}: {loss}", err=True)
    if parting is not None:
        raise SystemExit(1)
