"""A campaign under attack: `python -m tests.fuzz.endurance DIR [--seconds 600] [--every 30]`.

Two workers fuzz a build with planted bugs. A worker is killed -9 every so often, the campaign itself twice, and once no
file may grow any more: RLIMIT_FSIZE of the campaign and its workers stands for a full disk, since a small file system
needs root. Each time the campaign goes on. At the end every finding that was ever in it must be there.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from sevlab.core.errors import CampaignError
from sevlab.fuzz.store import FILE, Store

BUGS = "S02,S06,S07,S11"
ROOM_BYTES = 64 << 10
"""What may still be written when the disk is full."""


class Campaign:
    """One campaign directory and the process that works on it."""

    def __init__(self, folder: Path, engine: str, told=print):
        self.folder, self.engine, self.told = folder, engine, told
        self.shown: set[str] = set()
        self.killed = 0
        self.process = None

    def start(self, seconds: float, *, room: int | None = None) -> None:
        limit = "" if room is None else f"setrlimit(RLIMIT_FSIZE, ({room}, {room})); "
        run = f"from resource import *; {limit}from sevlab.core.cli import main; main()"
        command = [sys.executable, "-c", run, "fuzz", "run", "ghcb"]
        command += ["--campaign", str(self.folder), "--workers", "2", "--seconds", str(seconds)]
        command += ["--engine", self.engine, "--set", f"seeded.bugs={BUGS}"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def store(self) -> Store | None:
        try:
            return Store(self.folder)
        except CampaignError:
            return None  # not there yet

    def look(self) -> None:
        """Note what is shown; nothing of what was shown before may be gone."""
        store = self.store()
        if store is None:
            return
        there = {stored.identity for stored in store.findings()}
        store.close()
        assert self.shown <= there, f"lost: {self.shown - there}"
        self.shown |= there

    def kill_worker(self) -> None:
        store = self.store()
        pids = [] if store is None else store.workers()
        if store is not None:
            store.close()
        for pid in pids:
            if pid and Path(f"/proc/{pid}/cmdline").exists() and b"sevlab.fuzz.worker" in _command(pid):
                os.kill(pid, signal.SIGKILL)
                self.killed += 1
                return

    def wait(self, seconds: float, every: float | None) -> None:
        end = time.monotonic() + seconds
        next_kill = time.monotonic() + (every or seconds + 1)
        while time.monotonic() < end and self.process.poll() is None:
            time.sleep(0.5)
            self.look()
            if time.monotonic() > next_kill:
                self.kill_worker()
                next_kill += every

    def size(self) -> int:
        return max(path.stat().st_size for path in self.folder.iterdir() if path.name.startswith(FILE))


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def endure(folder: Path, seconds: float, every: float, *, engine: str = "builtin", told=print) -> Campaign:
    """Run the whole story; raises `AssertionError` where something was lost."""
    campaign = Campaign(folder, engine, told)
    part = seconds / 4
    for number in (1, 2):
        campaign.start(seconds)
        campaign.wait(part, every)
        campaign.process.send_signal(signal.SIGKILL)
        campaign.process.wait()
        campaign.process.stderr.close()
        told(f"killed the campaign, {number}; {campaign.killed} workers killed, {len(campaign.shown)} findings shown")
        time.sleep(3)  # its workers notice within a second
        campaign.look()
    campaign.start(part, room=campaign.size() + ROOM_BYTES)
    campaign.wait(part, None)
    campaign.process.terminate()
    error = campaign.process.communicate()[1]
    told(f"disk full: exit code {campaign.process.returncode}: {error.strip().splitlines()[-1:]}")
    assert "Traceback" not in error, error
    campaign.look()
    campaign.start(part)
    campaign.wait(part + 60, every)
    code = campaign.process.wait(120)
    with campaign.process.stderr as errors:
        assert code in (0, 1), errors.read()
    campaign.look()
    store = campaign.store()
    assert store is not None
    assert store.sound()
    status = store.status()["targets"]["ghcb"]
    told(
        f"the end: exit code {code}, {status['inputs']} inputs, {status['starts']} starts of workers,"
        f" {campaign.killed} workers killed, {len(campaign.shown)} findings, none lost"
    )
    return campaign


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--every", type=float, default=30)
    parser.add_argument("--engine", default="builtin")
    options = parser.parse_args()
    endure(options.folder, options.seconds, options.every, engine=options.engine)
