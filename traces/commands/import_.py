"""`sevlab import`: a log of a real machine becomes a trace."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import click
from sevlab.core.cli import echo_json

GC_THRESHOLD = 1 << 16
"""Records are tuples without cycles: to look for cycles as often as Python does would take a tenth of the time."""


@click.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the trace here.")
@click.option("--format", "format_name", default="", help="Force a format instead of detecting it.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def import_(file: Path, output: Path | None, format_name: str, force: bool, as_json: bool) -> None:  # noqa: FBT001
    """Import a log of KVM, Xen, the ccp driver or a guest; say what was in it.

    Without --output the log is only read and counted. Compressed files (.xz, .gz, .zst) are read as they are.
    """
    from sevlab.traces.importers.catalogue import open_capture

    capture = open_capture(file, format_name)
    if output is None:
        for _ in capture.entries():
            pass
    else:
        from sevlab.traces.writer import TraceWriter

        gc.set_threshold(GC_THRESHOLD)
        writer = TraceWriter(output, capture.header, overwrite=force)
        for entry in capture.entries():
            writer.append(entry)
        summary = capture.log.summary()
        counts = ("exchanges", "lines", "vcpus")
        writer.close({name: summary[name] for name in counts if name in summary})
    summary = capture.log.summary()
    if output is not None:
        summary["written"] = {"file": str(output), "bytes": output.stat().st_size}
    if as_json:
        echo_json(summary)
    else:
        for line in describe(summary):
            click.echo(line)
    if not summary.get("exchanges") and not summary.get("events"):
        raise SystemExit(1)


def describe(summary: dict[str, Any]) -> list[str]:
    """The summary as lines."""
    lines = [f"format     {summary['format']} (layout: {summary['layout']})"]
    counts = ("lines", "headers", "records", "exchanges", "unfinished", "vcpus", "gaps", "rejected", "absent")
    lines += [f"{name:<10} {summary[name]:,}" for name in counts if name in summary]
    lines.append(f"unknown    {sum(summary['unknown'].values()):,}")
    lines += [f"  {name:<28} {count:>9,}" for name, count in summary["unknown"].items()]
    lines.append("events")
    lines += [f"  {name:<28} {count:>9,}" for name, count in summary["events"].items()]
    lines += [f"not read: {example}" for example in summary.get("examples", ())]
    if "written" in summary:
        lines.append(f"written    {summary['written']['file']}: {summary['written']['bytes']:,} bytes")
    return lines
