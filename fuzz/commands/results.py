"""`sevlab fuzz status|triage|minimise|cover|export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from sevlab.core.cli import echo_json

if TYPE_CHECKING:
    from sevlab.fuzz.store import Store, Stored
    from sevlab.fuzz.triage import Triage

FORMS = ("pytest", "kvm-unit-test", "syzkaller", "json", "sevtrace")
_folder = click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
_json = click.option("--json", "as_json", is_flag=True, help="One JSON document.")


@click.command()
@_folder
@_json
def status(*, folder: Path, as_json: bool) -> None:
    """Show the numbers of campaign DIR."""
    from sevlab.fuzz.campaign import line_of
    from sevlab.fuzz.store import Store

    numbers = Store(folder).status()
    if as_json:
        echo_json(numbers)
    else:
        click.echo(line_of(numbers))


@click.command()
@_folder
@click.argument("identity", default="")
@_json
def triage(*, folder: Path, identity: str, as_json: bool) -> None:
    """Minimise what is not yet, write each finding's trace, and tell each, or IDENTITY alone."""
    from sevlab.fuzz.store import Store
    from sevlab.fuzz.triage import Triage

    store = Store(folder)
    work = Triage(store)
    found = work.all()
    if identity:
        found = [work.named(identity)]
    if as_json:
        echo_json([_document(store, stored) for stored in found])
        return
    for stored in found:
        _tell(store, work, stored)
    click.echo(f"{len(found)} findings")


@click.command()
@_folder
@click.argument("identity")
@click.option("--seconds", type=click.FloatRange(0), default=5, show_default=True, help="How long to try.")
@_json
def minimise(*, folder: Path, identity: str, seconds: float, as_json: bool) -> None:
    """Make finding IDENTITY of campaign DIR smaller than it is, and tell it."""
    from sevlab.fuzz.store import Store
    from sevlab.fuzz.triage import Triage

    store = Store(folder)
    work = Triage(store)
    before = work.named(identity)
    stored = work.minimise(before, seconds=seconds)
    decode = work.runner(stored.target).codec.decode
    steps = [len(decode(data)) for data in (before.data, before.smallest, stored.smallest)]
    if as_json:
        sizes = dict(zip(("found", "before", "now"), steps, strict=True))
        echo_json({**_document(store, stored), "steps": sizes})
        return
    _tell(store, work, stored)
    click.echo(f"{steps[0]} steps when it was found, {steps[1]} before, {steps[2]} now")


def _document(store: Store, stored: Stored) -> dict[str, Any]:
    from sevlab.fuzz.triage import trace_path

    hexed = {"data": stored.data.hex(), "minimised": stored.smallest.hex()}
    return {**stored._asdict(), **hexed, "trace": str(trace_path(store, stored))}


def _tell(store: Store, work: Triage, stored: Stored) -> None:
    from sevlab.fuzz.triage import trace_path

    for line in work.story(stored):
        click.echo(line)
    click.echo(f"  reproduce: sevlab replay {trace_path(store, stored)}\n")


@click.command()
@_folder
@click.option("--html", type=click.Path(path_type=Path), help="Write the whole matrix as a page.")
@click.option("--code/--no-code", default=True, help="Run the corpus with the lines of handlers counted.")
@_json
def cover(*, folder: Path, html: Path | None, code: bool, as_json: bool) -> None:
    """Show what the corpus of campaign DIR reaches: messages, their fields and outcomes, and the code of handlers."""
    from sevlab.core.cli import write_output
    from sevlab.fuzz.coverage import audit_campaign
    from sevlab.fuzz.store import Store

    audit = audit_campaign(Store(folder), code=code)
    if html is not None:
        write_output(html, audit.page(f"Campaign {folder.name}").encode())
    if as_json:
        echo_json(audit.document())
        return
    for line in audit.lines():
        click.echo(line)
    if html is not None:
        click.echo(f"{html}: the whole matrix")


@click.command()
@_folder
@click.argument("identity")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The file to write.")
@click.option("--to", "form", type=click.Choice(FORMS), default="pytest", show_default=True, help="Format of the file.")
def export(*, folder: Path, identity: str, output: Path, form: str) -> None:
    """Write finding IDENTITY of campaign DIR for use elsewhere."""
    from sevlab.fuzz.export import export as exported
    from sevlab.fuzz.store import Store
    from sevlab.fuzz.triage import Triage, trace_path

    store = Store(folder)
    work = Triage(store)
    work.all()
    stored = work.named(identity)
    path = trace_path(store, stored)
    if form == "sevtrace":
        output.write_bytes(path.read_bytes())
    else:
        output.write_text(exported(path, form, given=work.setup.modules))
    click.echo(f"{output}: {stored.oracle}: {stored.rule}")
