"""`sevlab replay`: drive a machine with a capture or a trace, and compare what it computes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from sevlab.core.cli import echo_json

if TYPE_CHECKING:
    from sevlab.traces.replay.files import Choice
    from sevlab.traces.replay.tally import Tally


@click.command("replay")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--until", type=int, help="Stop after so many exchanges, of a recording entries.")
@click.option("--only", multiple=True, help="Compare only this exit (ioio), of a recording this step; may be repeated.")
@click.option("--stop-at-first", is_flag=True, help="Stop at the first unexplained difference.")
@click.option("--start", default=0, help="Apply what comes before this exchange, and compare from there.")
@click.option("--resume", is_flag=True, help="Keep the state in FILE.progress now and then, and go on from there.")
@click.option("--feature", default="", help="Send the same accesses through a guest under sev-es or snp.")
@click.option("--jobs", default=1, show_default=True, help="Replay so many files at a time.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def replay(
    files: tuple[Path, ...],
    until: int | None,
    only: tuple[str, ...],
    stop_at_first: bool,  # noqa: FBT001  # click passes options by name
    start: int,
    resume: bool,  # noqa: FBT001
    feature: str,
    jobs: int,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Replay captures, imported traces and own recordings; exit with 1 when something differs that no rule explains."""
    from sevlab.traces.replay.files import Choice, replay_files

    recordings = [path for path in files if _is_recording(path)]
    logs = [path for path in files if path not in recordings]
    if resume and feature:
        raise click.UsageError("--resume keeps the state of the guest as it was, not of one under a feature")
    if recordings and (feature or start or resume):
        raise click.UsageError(
            f"{recordings[0]}: a recording replays from its start, through the machine it was made of"
        )
    limits = {"until": until, "only": frozenset(only), "stop_at_first": stop_at_first}
    differs = sum(_recorded(path, limits, as_json=as_json) for path in recordings) > 0
    choice = Choice(until, frozenset(only), stop_at_first, start, feature, resume)
    if len(logs) == 1 and jobs <= 1:
        tallies = {logs[0]: _with_progress(logs[0], choice)}
    else:
        tallies = replay_files(logs, choice, jobs)
    for path, tally in tallies.items():
        if as_json:
            echo_json({"file": str(path), **tally.document()})
        else:
            click.echo(f"{path.name}")
            report(tally)
        differs = differs or bool(tally.divergences)
    if differs:
        raise SystemExit(1)


def _is_recording(path: Path) -> bool:
    from sevlab.traces.reader import TraceReader

    if path.suffix != ".sevtrace":
        return False
    with TraceReader(path) as reader:
        return reader.header.source.format == "recorded"


def _recorded(path: Path, limits: dict[str, Any], *, as_json: bool) -> bool:
    """Replay a recording of our own; True when it differs."""
    from sevlab.traces.reader import TraceReader
    from sevlab.traces.replay_recorded import replay_recorded

    with TraceReader(path) as reader:
        result = replay_recorded(reader, **limits)
    if as_json:
        echo_json(
            {
                "file": str(path),
                "entries": result.entries,
                "records": result.records,
                "divergences": [str(one) for one in result.divergences],
            }
        )
    else:
        click.echo(f"{path.name}: recording, {result.entries} entries, {len(result.divergences)} divergences")
        for one in result.divergences[:5]:
            click.echo(f"  {one}")
    return bool(result.divergences)


def _with_progress(path: Path, choice: Choice) -> Tally:
    from sevlab.traces.replay.files import replay_file

    if not sys.stderr.isatty():
        return replay_file(path, choice)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from sevlab.traces.replay.files import exchanges_in

    total = choice.until or exchanges_in(path) or None
    rate = TextColumn("{task.speed}/s")
    columns = (TextColumn(path.name), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("replay", total=total)
        return replay_file(path, choice, lambda done: bar.update(task, completed=done))


def report(tally: Tally) -> None:
    """The tally as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    table = Table(box=None, pad_edge=False)
    for name in ("exit", "exchanges", "checked", "input", "unchecked"):
        table.add_column(name, justify="left" if name == "exit" else "right")
    for exit_class, count in tally.exchanges.most_common():
        sums = [
            sum(number for (owner, _), number in counter.items() if owner == exit_class)
            for counter in (tally.checked, tally.inputs, tally.unchecked)
        ]
        table.add_row(exit_class, f"{count:,}", *(f"{number:,}" for number in sums))
    console.print(table)
    total = tally.document()["total"]
    console.print(
        f"{total['exchanges']:,} exchanges, {total['checked']:,} values checked, {total['inputs']:,} taken from the log"
        f", {total['explained']:,} differences explained, {total['diverged']:,} not"
    )
    for device in sorted({name for name, _ in tally.reads}):
        follow, given = tally.reads[device, True], tally.reads[device, False]
        console.print(f"  reads of {device}: {follow:,} follow from earlier accesses, {given:,} taken from the log")
    for rule, count in sorted(tally.explained.items()):
        console.print(f"  explained {count:>6,}  {rule}")
    for cause, group in tally.divergences.items():
        console.print(f"  DIVERGES  {group.times:>6,}  {cause}", style="bold red")
        console.print(f"    first: {group.first.text()}")
        console.print(f"    step:  {group.first.step}")
        for record in group.first.outcome[0]:
            console.print(f"    log:   {record}")
        for record in group.first.outcome[1]:
            console.print(f"    model: {record}")
