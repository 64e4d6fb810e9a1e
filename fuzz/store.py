"""The campaign on disk: one SQLite file in WAL mode is all that is true; everything shown was written first.

Each addition is a transaction of its own, so that a killed process, a killed machine or a full disk loses at most what
was never shown.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from sevlab.core.errors import CampaignError
from sevlab.core.oracle import Finding

VERSION = 1
FILE = "campaign.sqlite"

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS corpus (
    id INTEGER PRIMARY KEY, target TEXT NOT NULL, sha TEXT NOT NULL, data BLOB NOT NULL, worker INTEGER NOT NULL,
    new INTEGER NOT NULL, UNIQUE (target, sha));
CREATE TABLE IF NOT EXISTS finding (
    id INTEGER PRIMARY KEY, target TEXT NOT NULL, identity TEXT NOT NULL, oracle TEXT NOT NULL, rule TEXT NOT NULL,
    handler TEXT NOT NULL, state TEXT NOT NULL, message TEXT NOT NULL, data BLOB NOT NULL, minimised BLOB,
    seen INTEGER NOT NULL DEFAULT 1, flaky INTEGER NOT NULL DEFAULT 0, UNIQUE (target, identity));
CREATE TABLE IF NOT EXISTS worker (
    target TEXT NOT NULL, number INTEGER NOT NULL, pid INTEGER NOT NULL, starts INTEGER NOT NULL DEFAULT 0,
    inputs INTEGER NOT NULL DEFAULT 0, steps INTEGER NOT NULL DEFAULT 0, seconds REAL NOT NULL DEFAULT 0,
    states INTEGER NOT NULL DEFAULT 0, coordinates INTEGER NOT NULL DEFAULT 0, last_new REAL NOT NULL DEFAULT 0,
    PRIMARY KEY (target, number));
CREATE TABLE IF NOT EXISTS reached (target TEXT NOT NULL, coordinate TEXT NOT NULL, PRIMARY KEY (target, coordinate));
"""


class Stored(NamedTuple):
    """A finding as it is kept; `data` is the input that showed it, `minimised` a smaller one (None: not yet)."""

    number: int
    target: str
    identity: str
    oracle: str
    rule: str
    handler: str
    state: str
    message: str
    data: bytes
    minimised: bytes | None
    seen: int
    flaky: bool

    @property
    def smallest(self) -> bytes:
        """The smallest input that is known to show it."""
        return self.data if self.minimised is None else self.minimised


def identity_of(finding: Finding) -> str:
    """What makes two findings the same: oracle, rule, handler and state."""
    return sha256(repr((finding.oracle, finding.rule, finding.handler, finding.state)).encode()).hexdigest()[:12]


class _Connection(sqlite3.Connection):
    """Says what the file cannot do as the user's error: a full disk, a lock that never ends, a file that is damaged."""

    path: Path

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        try:
            return super().execute(*arguments)
        except sqlite3.DatabaseError as error:
            raise self._refused(error) from error

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:
        try:
            return super().executemany(*arguments)
        except sqlite3.DatabaseError as error:
            raise self._refused(error) from error

    def _refused(self, error: sqlite3.DatabaseError) -> CampaignError:
        return CampaignError(f"{self.path}: {error}; what was written before is safe, and --resume goes on from there")


class Store:
    """One campaign directory. Raises `CampaignError` for a directory that is another's, or newer than this version."""

    def __init__(self, folder: Path, *, create: bool = False) -> None:
        self.folder = folder
        path = folder / FILE
        if not path.exists():
            if not create:
                raise CampaignError(f"{folder}: no campaign here (no {FILE}); start one with: sevlab fuzz run")
            if folder.exists() and any(folder.iterdir()):
                raise CampaignError(f"{folder}: not empty and no campaign; name a new directory")
            folder.mkdir(parents=True, exist_ok=True)
        try:
            file = sqlite3.connect(path, timeout=30, isolation_level=None)
            file.execute("PRAGMA journal_mode=WAL")
            file.executescript(SCHEMA)
            file.close()
        except sqlite3.DatabaseError as error:
            raise CampaignError(f"{path}: not a campaign: {error}") from error
        self._db = sqlite3.connect(path, timeout=30, isolation_level=None, factory=_Connection)
        self._db.path = path
        self._db.execute("PRAGMA synchronous=NORMAL")
        version = self.meta("version")
        if version is None:
            self.set_meta("version", VERSION)
        elif version != VERSION:
            raise CampaignError(f"{path}: campaign of version {version}, expected {VERSION}; nothing was changed")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def meta(self, key: str) -> Any:
        """A value of the campaign, None when it was never set."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set_meta(self, key: str, value: Any) -> None:
        """Keep a value."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Everything that is added inside is one transaction: all of it or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # Corpus -----------------------------------------------------------------------------------------------------

    def add_input(self, target: str, data: bytes, *, worker: int = -1, new: int = 0) -> bool:
        """Keep an input; False when it is there already."""
        row = (target, sha256(data).hexdigest(), data, worker, new)
        done = self._db.execute("INSERT OR IGNORE INTO corpus (target, sha, data, worker, new) VALUES (?,?,?,?,?)", row)
        return bool(done.rowcount)

    def targets(self) -> list[str]:
        """The targets that have a corpus."""
        return [row[0] for row in self._db.execute("SELECT DISTINCT target FROM corpus ORDER BY target")]

    def inputs(self, target: str, *, after: int = 0, not_worker: int | None = None) -> list[tuple[int, bytes]]:
        """(number, input) of a target after number `after`, without those of one worker."""
        rows = self._db.execute(
            "SELECT id, data FROM corpus WHERE target = ? AND id > ? AND worker != ? ORDER BY id",
            (target, after, -2 if not_worker is None else not_worker),
        )
        return [(number, bytes(data)) for number, data in rows]

    def replace_inputs(self, target: str, kept: Iterable[bytes]) -> None:
        """Make `kept` the whole corpus of a target, at once."""
        shas = {sha256(data).hexdigest() for data in kept}
        rows = self._db.execute("SELECT id, sha FROM corpus WHERE target = ?", (target,)).fetchall()
        gone = [(number,) for number, sha in rows if sha not in shas]
        with self.together():
            self._db.executemany("DELETE FROM corpus WHERE id = ?", gone)

    def add_reached(self, target: str, coordinates: Iterable[str]) -> None:
        """Keep what was reached."""
        with self.together():
            self._db.executemany(
                "INSERT OR IGNORE INTO reached VALUES (?, ?)", ((target, item) for item in coordinates)
            )

    def reached(self, target: str) -> list[str]:
        """Every coordinate that was reached, in order."""
        rows = self._db.execute("SELECT coordinate FROM reached WHERE target = ? ORDER BY coordinate", (target,))
        return [row[0] for row in rows]

    # Findings ---------------------------------------------------------------------------------------------------

    def add_finding(self, target: str, finding: Finding, data: bytes, *, flaky: bool) -> bool:
        """Keep a finding; True when its identity is new."""
        identity = identity_of(finding)
        known = self._db.execute(
            "UPDATE finding SET seen = seen + 1 WHERE target = ? AND identity = ?", (target, identity)
        )
        if known.rowcount:
            return False
        self._db.execute(
            "INSERT OR IGNORE INTO finding (target, identity, oracle, rule, handler, state, message, data, flaky)"
            " VALUES (?,?,?,?,?,?,?,?,?)",
            (target, identity, *finding[:2], finding.handler, finding.state, finding.message, data, int(flaky)),
        )
        return True

    def saw_again(self, target: str, counts: Mapping[str, int]) -> None:
        """Count findings that are stored already, by identity."""
        rows = [(count, target, identity) for identity, count in counts.items()]
        if rows:
            with self.together():
                self._db.executemany("UPDATE finding SET seen = seen + ? WHERE target = ? AND identity = ?", rows)

    def findings(self) -> list[Stored]:
        """All findings, in the order in which they were made."""
        rows = self._db.execute(
            "SELECT id, target, identity, oracle, rule, handler, state, message, data, minimised, seen, flaky"
            " FROM finding ORDER BY id"
        )
        return [Stored._make((*row[:11], bool(row[11]))) for row in rows]

    def set_minimised(self, number: int, data: bytes) -> None:
        """Keep the smaller input of a finding."""
        self._db.execute("UPDATE finding SET minimised = ? WHERE id = ?", (data, number))

    # Workers ----------------------------------------------------------------------------------------------------

    def start_worker(self, target: str, number: int, pid: int) -> None:
        """A worker process began."""
        self._db.execute("INSERT OR IGNORE INTO worker (target, number, pid) VALUES (?, ?, ?)", (target, number, pid))
        self._db.execute(
            "UPDATE worker SET pid = ?, starts = starts + 1 WHERE target = ? AND number = ?", (pid, target, number)
        )

    def count(self, target: str, number: int, *, inputs: int, steps: int, seconds: float, states: int,
              coordinates: int, new: bool) -> None:  # fmt: skip
        """Add what a worker did since it last said so."""
        self._db.execute(
            "UPDATE worker SET inputs = inputs + ?, steps = steps + ?, seconds = seconds + ?, states = ?,"
            " coordinates = ?, last_new = CASE WHEN ? THEN ? ELSE last_new END WHERE target = ? AND number = ?",
            (inputs, steps, seconds, states, coordinates, new, time.time(), target, number),
        )

    def workers(self) -> list[int]:
        """The process ids that workers had when they started last."""
        return [row[0] for row in self._db.execute("SELECT pid FROM worker ORDER BY target, number")]

    def sound(self) -> bool:
        """Whether the file is as it should be, every page of it."""
        answer: tuple[str] = self._db.execute("PRAGMA integrity_check").fetchone()
        return answer == ("ok",)

    def status(self) -> dict[str, Any]:
        """Numbers of the whole campaign, by target."""
        targets: dict[str, Any] = {}
        for target, inputs, steps, seconds, starts, states, coordinates, last in self._db.execute(
            "SELECT target, SUM(inputs), SUM(steps), SUM(seconds), SUM(starts), MAX(states), MAX(coordinates),"
            " MAX(last_new) FROM worker GROUP BY target ORDER BY target"
        ):
            corpus = self._db.execute("SELECT COUNT(*) FROM corpus WHERE target = ?", (target,)).fetchone()[0]
            targets[target] = {
                "inputs": inputs,
                "steps": steps,
                "cpu_seconds": round(seconds, 1),
                "starts": starts,
                "corpus": corpus,
                "states": states,
                "coordinates": coordinates,
                "last_new": last,
            }
        found = self._db.execute("SELECT oracle, COUNT(*) FROM finding GROUP BY oracle ORDER BY oracle").fetchall()
        return {"targets": targets, "findings": dict(found)}
