"""`sevlab show trace`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click
from sevlab.core.cli import echo_json
from sevlab.core.errors import ConfigError
from sevlab.core.vocabulary import spec_of
from sevlab.traces.diff import entry_lines
from sevlab.traces.reader import TraceReader
from sevlab.traces.schema import config_document
from sevlab.traces.text import counts_of, entry_json, field_lines, place


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--entry", type=click.IntRange(min=0), help="Show this entry field by field.")
@click.option("--from", "start", type=click.IntRange(min=0), help="List entries from this number.")
@click.option("--at", "time_ns", type=click.IntRange(min=0), help="List entries from this time in nanoseconds.")
@click.option("--count", type=click.IntRange(min=1), default=20, show_default=True, help="How many entries to list.")
@click.option("--check", is_flag=True, help="Read the whole file first; exit with 1 when anything is lost.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def trace(
    *, file: Path, entry: int | None, start: int | None, time_ns: int | None, count: int, check: bool, as_json: bool
) -> None:
    """Show the header of trace FILE and a table of its record kinds, or single entries."""
    with TraceReader(file) as reader:
        if check:
            reader.check()
        if entry is not None:
            _show_entry(reader, entry, as_json=as_json)
        elif start is not None or time_ns is not None:
            first = start if start is not None else reader.at_time(time_ns or 0)
            _list(reader, first, count, as_json=as_json)
        else:
            _summary(reader, as_json=as_json)
        for loss in reader.losses if not as_json else ():
            click.echo(f"damaged: {loss}", err=True)
        if check and reader.losses:
            raise SystemExit(1)


def _show_entry(reader: TraceReader, number: int, *, as_json: bool) -> None:
    try:
        entry = reader[number]
    except IndexError as error:
        raise ConfigError(f"{reader.name}: no entry {number}; the last one is {len(reader) - 1}") from error
    if as_json:
        echo_json(entry_json(number, entry))
        return
    click.echo(f"entry {number}, {place(entry)}")
    for record in (entry.step, *entry.outcome):
        spec = spec_of(record)
        what = "step" if spec.is_step else "outcome"
        foreign = f"; {reader.foreign[spec.kind]}" if spec.kind in reader.foreign else ""
        click.secho(f"\n{what} {spec.kind}  [{spec.boundary.value}{foreign}]", bold=True)
        for line in field_lines(record):
            click.echo(f"  {line}")


def _list(reader: TraceReader, start: int, count: int, *, as_json: bool) -> None:
    entries = list(reader.numbered(start, start + count))
    if as_json:
        echo_json([entry_json(number, entry) for number, entry in entries])
    for number, entry in entries if not as_json else ():
        first, *rest = entry_lines(number, entry)
        click.echo(f"{first}  ({place(entry)})")
        for line in rest:
            click.echo(line)


def _kinds(reader: TraceReader) -> dict[str, int]:
    if reader.index is not None and not reader.losses:
        return reader.index.kinds
    counted: Counter[str] = Counter()
    for entry in reader:
        counted.update(spec_of(record).kind for record in (entry.step, *entry.outcome))
    return dict(counted)


def _summary(reader: TraceReader, *, as_json: bool) -> None:
    header = reader.header
    kinds = _kinds(reader)
    counts = reader.index.counts if reader.index is not None else {}
    config = config_document(header.config) | {"seed": header.config.seed.hex()}
    if as_json:
        document: dict[str, Any] = {
            "file": reader.name,
            "schema": header.schema_version,
            "closed": reader.index is not None,
            "entries": len(reader),
            "source": header.source._asdict(),
            "machine": config,
            "plugins": [plugin._asdict() for plugin in header.plugins],
            "oracles": header.oracles,
            "kinds": dict(counts_of(kinds)),
            "counts": counts,
            "foreign": dict(reader.foreign),
            "lost": [loss._asdict() for loss in reader.losses],
        }
        echo_json(document)
        return
    source = header.source
    click.echo(f"{reader.name}: {len(reader)} entries, schema {header.schema_version}")
    click.echo(f"source    {source.format}" + (f", {source.file}, SHA-256 {source.sha256}" if source.file else ""))
    click.echo("machine   " + ", ".join(f"{name} {value}" for name, value in config.items() if value not in ([], {})))
    click.echo("plugins   " + ", ".join(f"{plugin.name} {plugin.version}".strip() for plugin in header.plugins))
    if header.oracles is not None:
        click.echo("oracles   " + (", ".join(header.oracles) or "none, but violations are findings"))
    if reader.index is None:
        click.echo("closed    no: whoever wrote it was stopped, or its end is gone")
    for name, count in counts.items():
        click.echo(f"{name:<24}{count:>12,}")
    click.echo()
    for kind, count in counts_of(kinds):
        spec = spec_of(reader.vocabulary.kinds[kind])
        note = "  " + reader.foreign[kind] if kind in reader.foreign else ""
        click.echo(f"{kind:<24}{count:>12,}  {'step' if spec.is_step else 'outcome'}, {spec.boundary.value}{note}")
