"""`sevlab record`."""

from __future__ import annotations

from pathlib import Path

import click
from sevlab.core.cli import echo_json
from sevlab.core.config import load_config
from sevlab.core.errors import ConfigError, InvariantViolation
from sevlab.core.machine import Machine
from sevlab.traces.reader import TraceReader
from sevlab.traces.record import Recorder, recording
from sevlab.traces.script import read_script


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="A folder; with --steps a file.")
@click.option("--steps", type=click.Path(path_type=Path), help="Record a script: a step a line, as JSON.")
@click.option("--config", type=click.Path(path_type=Path), help="The machine that a script runs on (TOML).")
@click.option("--overwrite", is_flag=True, help="Replace a file that exists.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document: the files and how many entries each holds.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def record(
    ctx: click.Context,
    *,
    output: Path,
    steps: Path | None,
    config: Path | None,
    overwrite: bool,
    as_json: bool,
    command: tuple[str, ...],
) -> None:
    """Record every machine that a COMMAND of sevlab composes: sevlab record -o FOLDER -- demo sme.

    With --steps a script is recorded instead, on the machine of --config.
    """
    if bool(command) == (steps is not None):
        raise ConfigError("record: expected a command of sevlab behind --, or --steps with a script")
    code: int | str | None = 0
    if steps is not None:
        paths = [_record_script(steps, config, output, overwrite=overwrite)]
    else:
        root = ctx.find_root().command
        with recording(output) as paths:
            try:
                root.main(list(command), prog_name="sevlab", standalone_mode=False)
            except SystemExit as end:  # the command's own answer, given after ours
                code = end.code
    found = []
    for path in paths:
        with TraceReader(path) as reader:
            found.append({"file": str(path), "entries": len(reader), "bytes": path.stat().st_size})
    if as_json:
        echo_json(found)
    else:
        for item in found:
            click.echo(f"{item['file']}: {item['entries']} entries, {item['bytes']} bytes")
        if not found:
            click.echo("no machine was composed, or nothing was done to it")
    if code:
        raise SystemExit(code)


def _record_script(steps: Path, config: Path | None, output: Path, *, overwrite: bool) -> Path:
    machine = Machine(load_config(config) if config is not None else None)
    with Recorder(machine, output, overwrite=overwrite) as recorder:
        for step in read_script(steps, machine.vocabulary):
            try:
                machine.apply(step)
            except InvariantViolation as violation:
                click.echo(f"the step broke an invariant: {violation}", err=True)
                break
    if not recorder.entries:
        raise ConfigError(f"{steps}: no step in it")
    return output
