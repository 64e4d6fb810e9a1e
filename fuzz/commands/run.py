"""`sevlab fuzz targets` and `sevlab fuzz run`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from sevlab.core.cli import echo_json
from sevlab.core.errors import ConfigError
from sevlab.fuzz.commands.guest import start_of

if TYPE_CHECKING:
    from sevlab.plugins.engines.start import Start

EXIT_FOUND = 1
LINE_SECONDS = 10.0
GUEST = "guest-vc"


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def targets(*, as_json: bool) -> None:
    """List the targets: who attacks, with which steps, judged by whom."""
    from sevlab.fuzz.targets import all_targets

    found = sorted(all_targets().values())
    if as_json:
        echo_json([{"name": target.name, "adversary": target.adversary.name.lower(), "steps": target.steps,
                    "oracles": target.oracles, "plugins": target.plugins} for target in found])  # fmt: skip
        return
    for target in found:
        click.echo(f"{target.name:<14} {target.adversary.name.lower():<11} {target.documentation}")


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="TARGET...")
@click.option("--campaign", "folder", type=click.Path(path_type=Path), required=True, help="Directory of the campaign.")
@click.option("--workers", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes a target.")
@click.option("--seconds", type=click.FloatRange(0), default=60, show_default=True, help="Time; 0: no limit.")
@click.option("--runs", type=click.IntRange(0), default=0, help="Inputs of each worker; 0: no limit.")
@click.option("--seed", type=click.IntRange(0, 1 << 20), default=1, show_default=True, help="Where chance begins.")
@click.option("--engine", type=click.Choice(["atheris", "builtin"]), help="Default: atheris if it is installed.")
@click.option("--given", multiple=True, metavar="NAME=MODULE", help="A plugin that is not installed.")
@click.option("--set", "settings", multiple=True, metavar="PLUGIN.OPTION=VALUE", help="An option; the plugin joins.")
@click.option("--resume/--fresh", "resume", default=True, help="Go on with a campaign that is there, or refuse to.")
@click.option("--kernel", type=click.Path(path_type=Path), help="guest-vc: the guest, a bzImage, vmlinux or ELF.")
@click.option(
    "--at",
    default="cpuid",
    show_default=True,
    metavar="PLACE",
    help="guest-vc: where: the n-th exit of a kind (ioio:40), an address or a symbol.",
)
@click.option("--after", default="", metavar="TEXT", help="guest-vc: count exits from where the console shows TEXT.")
@click.option("--initrd", type=click.Path(path_type=Path), help="guest-vc: the initial RAM disk of a Linux kernel.")
@click.option("--append", default="", metavar="CMDLINE", help="guest-vc: the kernel's command line.")
@click.option("--memory", default="256 MiB", show_default=True, help="guest-vc: memory of the guest.")
@click.option(
    "--strict", is_flag=True, help="guest-vc: judge the halves of registers that an instruction ignores, too."
)
@click.option("--json", "as_json", is_flag=True, help="JSON lines while it runs, and the findings at the end.")
def run(
    *,
    names: tuple[str, ...],
    folder: Path,
    workers: int,
    seconds: float,
    runs: int,
    seed: int,
    engine: str | None,
    given: tuple[str, ...],
    settings: tuple[str, ...],
    resume: bool,
    kernel: Path | None,
    at: str,
    after: str,
    initrd: Path | None,
    append: str,
    memory: str,
    strict: bool,
    as_json: bool,
) -> None:
    """Fuzz TARGETs in a campaign; exit code 1 when there are findings.

    The target guest-vc is a real guest's #VC handler, executed: it needs --kernel, and runs alone.
    """
    from sevlab.fuzz.campaign import Plan
    from sevlab.fuzz.campaign import run as run_campaign
    from sevlab.fuzz.setup import Setup
    from sevlab.fuzz.triage import Triage

    if not seconds and not runs:
        raise ConfigError("--seconds 0 and --runs 0: a campaign needs a limit")
    if GUEST in names or kernel is not None:
        if names != (GUEST,) or workers != 1 or given:
            raise ConfigError(f"{GUEST} runs alone, with one worker and nothing given")
        start = start_of(kernel, at=at, after=after, initrd=initrd, append=append, memory=memory, strict=strict)
        _guest(folder, start, (seconds, runs, seed, engine), resume=resume, as_json=as_json)
        return
    plan = Plan(targets=tuple(dict.fromkeys(names)), workers=workers, seconds=seconds, runs=runs, seed=seed,
                engine=engine, setup=Setup(given, settings))  # fmt: skip
    with _view(as_json=as_json) as view:
        store = run_campaign(folder, plan, view, fresh=not resume)
    found = Triage(store).all()
    document = {"campaign": str(folder), "seed": seed, **store.status()}
    if as_json:
        echo_json(document)
    else:
        for stored in found:
            click.echo(f"{stored.target} {stored.identity} {stored.oracle}: {stored.rule}: {stored.message}")
        click.echo(f"{len(found)} findings in {folder}" + ("; see them with: sevlab fuzz triage" if found else ""))
    if found:
        sys.exit(EXIT_FOUND)


def _guest(
    folder: Path, start: Start | None, work: tuple[float, int, int, str | None], *, resume: bool, as_json: bool
) -> None:
    from sevlab.fuzz import guest_vc_campaign as campaign

    with _view(as_json=as_json) as view:
        store = campaign.run(folder, start, campaign.Work(*work), view, fresh=not resume)
    found = campaign.minimise(store)
    if as_json:
        echo_json({"campaign": str(folder), "seed": work[2], **store.status()})
    else:
        for stored in found:
            click.echo(f"{stored.identity} {stored.rule}: {stored.message}")
        click.echo(f"{len(found)} findings in {folder}" + ("; see one with: sevlab fuzz again" if found else ""))
    if found:
        sys.exit(EXIT_FOUND)


class _view:  # noqa: N801  # a context manager
    """The live view: a line that is rewritten on a terminal, a line every ten seconds elsewhere, or JSON lines."""

    def __init__(self, *, as_json: bool) -> None:
        self._json = as_json
        self._last = 0.0
        self._status: Any = None

    def __enter__(self) -> Any:
        if not self._json and sys.stdout.isatty():
            from rich.console import Console

            self._status = Console().status("starting")
            self._status.start()
        return self.show

    def __exit__(self, *_error: object) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, status: dict[str, Any]) -> None:
        """Show the numbers."""
        from sevlab.fuzz.campaign import line_of

        if self._status is not None:
            self._status.update(line_of(status))
            return
        if time.monotonic() - self._last < LINE_SECONDS:
            return
        self._last = time.monotonic()
        if self._json:
            import json

            click.echo(json.dumps(status), err=True)
        else:
            click.echo(line_of(status))
