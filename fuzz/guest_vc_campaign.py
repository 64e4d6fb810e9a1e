"""A campaign against a guest: boot it once, fuzz it in a process of its own, and show again what was found."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sevlab.core.errors import CampaignError
from sevlab.core.oracle import Finding
from sevlab.fuzz.engine import make_engine
from sevlab.fuzz.guest_vc import NAME, GuestRunner, words_of
from sevlab.fuzz.guest_vc_state import FILE, load, save
from sevlab.fuzz.store import Store, Stored
from sevlab.fuzz.triage import smallest, step_lines
from sevlab.plugins.engines.start import Start

META = "guest"
POLL_SECONDS = 0.5
DEATHS = 3
LOG = "worker-guest-vc.log"


class Work(NamedTuple):
    """What the process does: seconds and inputs (0: no limit), where chance begins, and the engine of the loop."""

    seconds: float
    runs: int
    seed: int
    engine: str | None


def prepare(folder: Path, start: Start | None, *, fresh: bool) -> Store:
    """Open the campaign, or boot the guest and make it. Raises `CampaignError` or `ConfigError`."""
    there = (folder / FILE).exists()
    if there and fresh:
        raise CampaignError(f"{folder}: there is a campaign here; --resume goes on with it, or name a new directory")
    if not there and start is None:
        raise CampaignError(f"{folder}: no campaign of {NAME} here; start one with: --kernel FILE")
    store = Store(folder, create=True)
    kept = store.meta(META)
    if start is not None and kept not in (None, list(start)):
        raise CampaignError(f"{folder}: its guest is {Start(*kept)}; name a new directory for another one")
    if start is not None and not there:
        store.set_meta(META, list(start))
        save(start, folder / FILE)
    return store


def run(folder: Path, start: Start | None, work: Work, view: Callable[[dict[str, Any]], None], *, fresh: bool) -> Store:
    """Fuzz until the budget is used up, or Ctrl-C. Raises `CampaignError` when the process does not stay alive."""
    make_engine(work.engine)
    store = prepare(folder, start, fresh=fresh)
    end = time.monotonic() + work.seconds if work.seconds else None
    deaths = 0
    with (folder / LOG).open("ab") as log:
        while end is None or time.monotonic() < end:
            left = work if end is None else work._replace(seconds=max(1.0, end - time.monotonic()))
            command = [sys.executable, "-m", "sevlab.fuzz.guest_vc_worker", str(folder), json.dumps(left._asdict())]
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)  # noqa: S603
            try:
                while process.poll() is None:
                    time.sleep(POLL_SECONDS)
                    view(store.status())
            except KeyboardInterrupt:
                process.terminate()
                process.wait()
                break
            if process.returncode == 0:
                break
            deaths += 1
            if deaths >= DEATHS:
                raise CampaignError(f"{folder}: the process died {deaths} times; the reason is in {log.name}")
    view(store.status())
    return store


def minimise(store: Store) -> list[Stored]:
    """Make every finding as small as it gets; all findings."""
    waiting = [stored for stored in store.findings() if stored.minimised is None]
    if waiting:
        _, begun = load(store.folder / FILE)
        runner = GuestRunner(begun)
        for stored in waiting:
            steps = smallest(runner, runner.codec.decode(stored.data), stored.oracle, stored.rule)
            store.set_minimised(stored.number, runner.codec.encode(steps))
    return store.findings()


class Again(NamedTuple):
    """A finding that was played again: whether it showed, its story, and all that showed."""

    shown: bool
    lines: list[str]
    findings: tuple[Finding, ...]


def again(folder: Path, identity: str) -> Again:
    """Play one finding again. Raises `CampaignError` for an identity that no finding or several have."""
    store = Store(folder)
    found = [stored for stored in store.findings() if stored.identity.startswith(identity)]
    if len(found) != 1:
        known = ", ".join(stored.identity for stored in store.findings()) or "none"
        raise CampaignError(f"{folder}: {len(found)} findings begin with {identity!r}; there are {known}")
    stored = found[0]
    start, begun = load(folder / FILE)
    runner = GuestRunner(begun)
    steps = runner.codec.decode(stored.smallest)
    lines = [f"guest {start.kernel}"]
    lines += [f"{number}. {line}" for number, step in enumerate(steps, 1) for line in step_lines(runner, step)]
    lines += words_of(runner, steps)
    findings = tuple(begun.run.findings)
    lines += [f"{finding.oracle}: {finding.rule}: {finding.message}" for finding in findings]
    return Again(any(finding.rule == stored.rule for finding in findings), lines, findings)
