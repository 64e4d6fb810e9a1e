"""Seeded bugs: published faults of GHCB, #VC, ASP, SNP and I/O handling, each in the place of one correct handler.

None is there unless the option `bugs` names it. For benchmarks of bug finding and for exercises; see `docs/seeded.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.config import Option
from sevlab.core.errors import ConfigError
from sevlab.core.hookspecs import hookimpl
from sevlab.core.oracle import Canary
from sevlab.plugins.seeded import asp, ghcb, guest, io, snp, xen
from sevlab.plugins.seeded.planting import LIVE, WATCH, Bug, Counts, plant, seeded_state

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder

REQUIRES: tuple[str, ...] = ("io", "sme", "sev", "sev_es", "snp", "xen")

BUGS: dict[str, Bug] = {
    bug.name: bug
    for bug in sorted((*ghcb.BUGS, *io.BUGS, *guest.BUGS, *asp.BUGS, *snp.BUGS, *xen.BUGS), key=lambda bug: bug.name)
}
"""By name: S01 to S24."""

__all__ = ["BUGS", "LIVE", "WATCH", "Bug", "Counts", "chosen", "seeded_state"]


def chosen(names: str) -> tuple[Bug, ...]:
    """The bugs of a comma-separated list; `all` is every one. Raises `ConfigError` for one that there is not."""
    if names == "all":
        return tuple(BUGS.values())
    wanted = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in wanted:
        if name not in BUGS:
            raise ConfigError(f"plugin.seeded.bugs: {name!r}: expected all, or names of {', '.join(BUGS)}")
    return tuple(BUGS[name] for name in wanted)


def markdown_table() -> str:
    """The bugs for documentation."""
    lines = [
        "| Bug | | State | Two parties | Oracle | What is left out, and where it was published |",
        "|" + " --- |" * 6,
    ]
    lines += [
        f"| {bug.name} | {bug.title} | {'yes' if bug.stateful else ''} | {'yes' if bug.contexts else ''} |"
        f" {bug.oracle} | {bug.documentation} |"
        for bug in BUGS.values()
    ]
    return "\n".join(lines)


@hookimpl
def sevlab_options() -> tuple[Option, ...]:
    return (
        Option(name="bugs", default="", doc="which bugs are planted: names, or all; empty: none"),
        Option(
            name="mode",
            default=LIVE,
            choices=(LIVE, WATCH),
            doc="live: the faults act; watch: every handler stays correct and only the canaries count",
        ),
    )


@hookimpl
def sevlab_register(builder: PluginBuilder) -> None:
    bugs = chosen(str(builder.options["bugs"]))
    if bugs:
        plant(builder, bugs, str(builder.options["mode"]))


@hookimpl
def sevlab_canaries() -> tuple[Canary, ...]:
    return tuple(Canary(bug.name, bug.documentation, bug.oracle) for bug in BUGS.values())
