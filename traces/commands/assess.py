"""`sevlab assess`: what happens to a captured guest when it is encrypted."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from sevlab.core.cli import echo_json


@click.command("assess")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--feature", default="sev-es", show_default=True, help="sev, sev-es or snp.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page with charts here.")
@click.option("--json", "as_json", is_flag=True, help="Print the assessment as JSON.")
def assess(file: Path, feature: str, html: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """Judge every exit of a capture of a plain guest; exit with 1 when some cannot be served."""
    from sevlab.traces.assess.judge import Assessor
    from sevlab.traces.assess.report import document, print_report
    from sevlab.traces.replay.files import open_entries

    with open_entries(file) as opened:
        result = Assessor(feature).run(opened.entries)
    if html is not None:
        from sevlab.traces.assess.page import html_page

        html.write_text(html_page(result, f"{file.name} under {feature.upper()}"))
    if as_json:
        echo_json(document(result))
    else:
        from rich.console import Console

        print_report(result, Console(highlight=False, width=None if sys.stdout.isatty() else 120))
        if html is not None:
            click.echo(f"\nwritten: {html} ({html.stat().st_size:,} bytes)")
    if result.refused:
        raise SystemExit(1)
