"""`sevlab fuzz status|triage|cover|export`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import click
from sevlab.core.cli import echo_json
from sevlab.core.errors import ConfigError

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
@_json
def triage(*, folder: Path, as_json: bool) -> None:
    """Minimise what is not yet, write each finding's trace, and tell each."""
    from sevlab.fuzz import triage as work
    from sevlab.fuzz.runner import Runner
    from sevlab.fuzz.store import Store
    from sevlab.fuzz.targets import target_named
    from sevlab.fuzz.worker import given_modules

    store = Store(folder)
    given = given_modules(store.meta("given") or ())
    found = work.triage(store, given=given)
    if as_json:
        echo_json([{**stored._asdict(), "data": stored.data.hex(), "minimised": stored.smallest.hex(),
                    "trace": str(work.trace_path(store, stored))} for stored in found])  # fmt: skip
        return
    for stored in found:
        for line in work.story(Runner(target_named(stored.target), given=given), stored):
            click.echo(line)
        click.echo(f"  reproduce: sevlab replay {work.trace_path(store, stored)}\n")
    click.echo(f"{len(found)} findings")


@click.command()
@_folder
@_json
def cover(*, folder: Path, as_json: bool) -> None:
    """Show, for each message, in how many states and with how many results campaign DIR has seen it."""
    from sevlab.fuzz.runner import Runner
    from sevlab.fuzz.store import Store
    from sevlab.fuzz.targets import target_named

    store = Store(folder)
    document: dict[str, dict[str, dict[str, int]]] = {}
    for name in store.status()["targets"]:
        runner = Runner(target_named(name))
        states: Counter[str] = Counter()
        results: dict[str, set[str]] = {}
        for machine, state, message, result in map(json.loads, store.reached(name)):
            states[message] += 1
            results.setdefault(message, set()).add(json.dumps(result))
            del machine, state
        labels = {
            f"{kind}:{message.number:#x}": f"{kind} {message.name}"
            for kind in runner.messages.by_kind
            if kind in runner.target.steps
            for _, message in runner.messages.choices(kind)
        }
        labels |= {message: message for message in states if message not in labels}
        document[name] = {
            label: {"states": states.get(key, 0), "results": len(results.get(key, ()))} for key, label in labels.items()
        }
    if as_json:
        echo_json(document)
        return
    for name, messages in document.items():
        missing = [label for label, row in messages.items() if not row["states"]]
        click.echo(f"{name}: {len(messages) - len(missing)} of {len(messages)} messages reached")
        for label, row in sorted(messages.items()):
            click.echo(f"  {label:<44} {row['states']:>5} coordinates {row['results']:>4} results")


@click.command()
@_folder
@click.argument("identity")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The file to write.")
@click.option("--to", "form", type=click.Choice(FORMS), default="pytest", show_default=True, help="Format of the file.")
def export(*, folder: Path, identity: str, output: Path, form: str) -> None:
    """Write finding IDENTITY of campaign DIR for use elsewhere."""
    from sevlab.fuzz import triage as work
    from sevlab.fuzz.export import export as exported
    from sevlab.fuzz.store import Store
    from sevlab.fuzz.worker import given_modules

    store = Store(folder)
    given = given_modules(store.meta("given") or ())
    found = [stored for stored in work.triage(store, given=given) if stored.identity.startswith(identity)]
    if len(found) != 1:
        known = ", ".join(stored.identity for stored in store.findings()) or "none"
        raise ConfigError(f"{folder}: {len(found)} findings begin with {identity!r}; there are {known}")
    if form == "sevtrace":
        output.write_bytes(work.trace_path(store, found[0]).read_bytes())
    else:
        output.write_text(exported(work.trace_path(store, found[0]), form, given=given))
    click.echo(f"{output}: {found[0].oracle}: {found[0].rule}")
