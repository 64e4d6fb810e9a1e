"""`sevlab minimise`."""

from __future__ import annotations

from pathlib import Path

import click
from sevlab.core.cli import echo_json
from sevlab.core.errors import ConfigError
from sevlab.traces.diff import entry_lines
from sevlab.traces.minimise_trace import Wanted, findings, minimise_divergence, minimise_finding, write_part
from sevlab.traces.reader import TraceReader
from sevlab.traces.replay_recorded import replay_recorded
from sevlab.traces.schema import Entry


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The smaller trace.")
@click.option("--rule", help="Keep the finding of this rule; default: the trace's first finding.")
@click.option("--divergence", is_flag=True, help="Keep the first divergence of the replay instead.")
@click.option("--overwrite", is_flag=True, help="Replace a file that exists.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def minimise(*, file: Path, output: Path, rule: str | None, divergence: bool, overwrite: bool, as_json: bool) -> None:
    """Make recorded trace FILE as small as it can be while it still shows its finding, or its divergence."""
    with TraceReader(file) as reader:
        before = len(reader)
        entries = _divergence(reader) if divergence else _finding(reader, rule)
        write_part(reader, entries, output, overwrite=overwrite)
    if as_json:
        echo_json({"file": str(output), "entries": len(entries), "before": before})
        return
    click.echo(f"{output}: {len(entries)} of {before} entries")
    for number, entry in enumerate(entries):
        for line in entry_lines(number, entry):
            click.echo(line)


def _finding(reader: TraceReader, rule: str | None) -> list[Entry]:
    known = findings(reader)
    chosen: list[Wanted] = [found for found in known if rule in {None, found.rule}]
    if not chosen:
        rules = ", ".join(found.rule for found in known)
        raise ConfigError(
            f"{reader.name}: no finding" + (f" of rule {rule!r}; there are {rules or 'none'}" if rule else "")
        )
    return minimise_finding(reader, chosen[0])


def _divergence(reader: TraceReader) -> list[Entry]:
    replayed = replay_recorded(reader, stop_at_first=True)
    if not replayed.divergences:
        raise ConfigError(f"{reader.name}: its replay does not diverge")
    return minimise_divergence(reader, replayed.divergences[0])
