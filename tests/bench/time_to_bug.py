"""How long each arm takes to find each seeded bug: `python -m tests.bench.time_to_bug run|report`.

One trial is one process: an arm, a seed, and either all bugs of a target in watch mode, or one bug live, or the clean
build. Its clock is the process's CPU time after start-up. Trials go to an SQLite file as they end, so that a run that
is stopped goes on later and several runs add up; they come in random order, never arm after arm.
"""

from __future__ import annotations

import argparse
import csv
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from random import Random

from sevlab.core.plugins import load
from sevlab.fuzz.engine import make_engine
from sevlab.fuzz.runner import Runner
from sevlab.fuzz.targets import all_targets
from sevlab.plugins.seeded import BUGS

from tests.bench.arms import ARMS, PEERS, Canaries, Trial
from tests.bench.survival import a12, bootstrap, censored, holm, log_rank, mann_whitney, mean_ratio, restricted_mean

TARGET_OF = {
    **dict.fromkeys(("S01", "S02", "S03", "S04", "S06", "S07", "S09", "S10", "S11", "S12"), "ghcb"),
    **dict.fromkeys(("S14", "S15", "S16", "S17"), "vc"),
    **dict.fromkeys(("S22", "S23", "S24"), "sev.commands"),
    **dict.fromkeys(("S19", "S20", "S21"), "snp.commands"),
    **dict.fromkeys(("S05", "S08"), "snp.psc"),
    "S13": "hyperv",
    "S18": "snp.guest",
}
"""Which target can reach which bug."""

SCHEMA = """
create table if not exists trial (target text, bug text, mode text, arm text, seed integer, budget real,
    cpu real, runs integer, steps integer, detected real, by text, primary key (target, bug, mode, arm, seed, budget));
create table if not exists canary (target text, bug text, mode text, arm text, seed integer, budget real, seeded text,
    reached real, triggered real, primary key (target, bug, mode, arm, seed, budget, seeded));
"""


def open_database(path):
    database = sqlite3.connect(path, timeout=60)
    database.executescript(SCHEMA)
    return database


def planted_target(name, bugs, mode):
    """The target with these bugs planted."""
    found = all_targets()[name]
    options = {**found.options}
    if bugs:
        options["seeded"] = {"bugs": bugs, "mode": "live" if mode == "live" else "watch"}
    return found._replace(plugins=(*found.plugins, "seeded"), options=options)


def run_trial(database, target, bug, mode, arm, seed, budget):
    """One trial in this process, which ends with it. The seeded handlers themselves are not instrumented."""
    names = ",".join(sorted(name for name in BUGS if TARGET_OF[name] == target)) if mode == "watch" else bug
    engine = make_engine()
    if arm.startswith("P3"):
        engine.prepare(load(all_targets()[target].plugins))
    runner = Runner(planted_target(target, names, mode), seed=seed)
    canaries = Canaries()
    runner.oracles = runner.sink.oracles = (*runner.oracles, canaries)
    wanted = set(names.split(",")) - {""}

    def done(trial):
        return trial.detected is not None if mode == "live" else mode == "watch" and wanted <= set(canaries.triggered)

    def save(trial):
        key = (target, bug, mode, arm, seed, budget)
        with database:
            row = (*key, trial.spent, trial.runs, runner.executed, trial.detected, trial.by)
            database.execute("insert or replace into trial values (?,?,?,?,?,?,?,?,?,?,?)", row)
            for name in wanted:
                row = (*key, name, canaries.reached.get(name), canaries.triggered.get(name))
                database.execute("insert or replace into canary values (?,?,?,?,?,?,?,?,?)", row)

    trial = Trial(runner, engine, budget, seed, done, save)
    trial.begin()
    canaries.trial = trial
    runner.executed = 0
    ARMS[arm](trial)


def plan(options):
    """The trials that `options` ask for, in random order."""
    targets = all_targets()
    bugs = [name for name in (options.bugs.split(",") if options.bugs else sorted(BUGS)) if TARGET_OF[name] in targets]
    jobs = []
    for seed in range(1, options.trials + 1):
        for arm in options.arms.split(","):
            if options.mode == "live":
                jobs += [(TARGET_OF[bug], bug, "live", arm, seed) for bug in bugs]
            else:
                jobs += [(target, "", options.mode, arm, seed) for target in sorted({TARGET_OF[bug] for bug in bugs})]
    Random(1).shuffle(jobs)
    return jobs


def run_all(options):
    """Run what is not there yet, each trial in a process of its own."""
    database = open_database(options.database)
    for target, bug, mode, arm, seed in plan(options):
        key = (target, bug, mode, arm, seed, options.seconds)
        where = "target=? and bug=? and mode=? and arm=? and seed=? and budget=?"
        if database.execute(f"select 1 from trial where {where}", key).fetchone():
            continue
        words = [sys.executable, "-m", "tests.bench.time_to_bug", "trial", *map(str, key), str(options.database)]
        code = subprocess.run(words, check=False).returncode
        print(*key, "done" if not code else f"failed: {code}", flush=True)


# Report -----------------------------------------------------------------------------------------------------------


def times_of(database, mode, arm, bug, budget):
    """Times of one bug by one arm: triggered in watch mode, detected live; None where it never came."""
    if mode == "watch":
        query = "select triggered from canary where mode='watch' and arm=? and seeded=? and budget=? order by seed"
    else:
        query = "select detected from trial where mode='live' and arm=? and bug=? and budget=? order by seed"
    return [time for (time,) in database.execute(query, (arm, bug, budget))]


def cell(times, budget):
    """Of how many trials the event came, and the restricted mean time."""
    hits = sum(time is not None for time in times)
    return f"{hits}/{len(times)}, {restricted_mean(times, budget):.2f}" if times else "not run"


def best_peer(by_arm, budget):
    """The times of the peer arm that is best for a bug; None: no peer was run."""
    peers = [by_arm[arm] for arm in PEERS if by_arm.get(arm)]
    return min(peers, key=lambda times: restricted_mean(times, budget)) if peers else None


def marks(bug):
    """St and Cx."""
    return " ".join(word for word, has in (("St", bug.stateful), ("Cx", bug.contexts)) if has)


def table(database, mode, budget):
    """One row for each bug: for each arm how many trials had the event, and the restricted mean time."""
    rows = {}
    for name in BUGS:
        by_arm = {arm: times_of(database, mode, arm, name, budget) for arm in ARMS}
        if any(by_arm.values()):
            rows[name] = by_arm
    arms = [arm for arm in ARMS if any(by_arm[arm] for by_arm in rows.values())]
    if not arms:
        return []
    word = "triggered" if mode == "watch" else "detected"
    lines = [f"## {mode.capitalize()} mode, {budget:g} CPU seconds: {word}, and restricted mean time in seconds", ""]
    compared = {
        name: (by_arm["P3"], peer)
        for name, by_arm in rows.items()
        if by_arm["P3"] and (peer := best_peer(by_arm, budget)) is not None
    }
    ranks = holm([mann_whitney(ours, peer) for ours, peer in compared.values()])
    curves = holm([log_rank(censored(ours, budget), censored(peer, budget))[1] for ours, peer in compared.values()])
    tests = {name: f"{u:.2g}, {p:.2g}" for name, u, p in zip(compared, ranks, curves, strict=True)}
    columns = ["Bug", "St/Cx", *arms]
    columns += ["A12 of P3 against the best peer", "p: U, log-rank"] if compared else []
    columns += ["seen by (P3)"] if mode == "live" else []
    lines += [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for name, by_arm in rows.items():
        cells = [f"{name} {BUGS[name].title}", marks(BUGS[name]), *(cell(by_arm[arm], budget) for arm in arms)]
        if compared:
            cells += [f"{a12(*compared[name]):.2f}", tests[name]] if name in compared else ["", ""]
        if mode == "live":
            query = "select distinct \"by\" from trial where mode='live' and arm='P3' and bug=? and budget=? order by 1"
            cells.append(", ".join(by for (by,) in database.execute(query, (name, budget)) if by))
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    ours = [by_arm["P3"] for by_arm in rows.values() if by_arm["P3"]]
    half = sum(2 * sum(time is not None for time in times) >= len(times) for times in ours)
    lines.append(f"P3: {half} of {len(ours)} bugs {word} in at least half of the trials.\n")
    for hard in (True, False):
        found = [pair for name, pair in compared.items() if bool(marks(BUGS[name])) is hard]
        if found:
            low, high = bootstrap(found, budget)
            which = "marked St or Cx" if hard else "without a mark"
            lines.append(
                f"Best peer arm / P3, geometric mean over {len(found)} bugs {which}: {mean_ratio(found, budget):.2f}"
                f" (95 % by bootstrap: {low:.2f} to {high:.2f}).\n"
            )
    return lines


HEAD = """# Time to bug

Made by `python -m tests.bench.time_to_bug report` from the trials in `{raw}`; do not edit.

Each trial is one process with its own seed; the clock is its CPU time after start-up. All arms share the machine, its
boot, the oracles (the paired ones as a campaign asks them), the reset, the codec and the message table: P0 random
bytes, P1 the table without feedback, P2 a rule-based state machine of Hypothesis, P3 what `sevlab fuzz run` does:
atheris with our mutator, state counters and seeds. P3-state, P3-grammar and P3-seeds are P3 without one of its parts.
The planted handlers themselves are not instrumented. In watch mode all bugs of a target are planted, none acts, and the
time is that of the first trigger; in live mode one bug acts and the time is that of the first finding of any oracle. A
trial without the event counts as one that ran to the end (Kaplan-Meier). The peer arm that is best for the bug is the
one P3 is compared with; U is the exact two-sided Mann-Whitney test with ties, log-rank the one of Mantel, both adjusted
over the bugs of the table by Holm. Few trials give large p: with three against three the smallest p of U is 0.1.

The oracle of single fetches sees S03 and S04 by the second fetch itself, whether or not anybody races: live they are
detected earlier than they are triggered.
"""


def clean_table(database):
    """The control: every arm on the build without a bug."""
    sums = "count(*), sum(cpu), sum(runs), sum(detected is not null)"
    clean = database.execute(f"select arm, target, {sums} from trial where mode='clean' group by 1, 2").fetchall()
    if not clean:
        return ["Not run."]
    lines = ["| Arm | Target | Trials | CPU seconds | Inputs | Trials with an alarm |", "|" + " --- |" * 6]
    lines += [f"| {arm} | {name} | {n} | {cpu:.0f} | {runs} | {alarms} |" for arm, name, n, cpu, runs, alarms in clean]
    return lines


COLUMNS = ("target", "bug", "mode", "arm", "seed", "budget", "cpu", "runs", "steps", "detected", "by", "seeded",
           "reached", "triggered")  # fmt: skip


def write_raw(database, path):
    """Every trial with its canaries as comma-separated values."""
    columns, key = ", ".join(map(_quoted, COLUMNS)), ", ".join(KEY)
    query = f"select {columns} from trial left join canary using ({key}) order by {key}, seeded"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in database.execute(query):
            writer.writerow(
                "" if value is None else round(value, 4) if isinstance(value, float) else value for value in row
            )


def read_raw(path):
    """A database in memory of what `write_raw` wrote."""
    database = open_database(":memory:")
    with path.open(newline="") as file, database:
        for row in csv.DictReader(file):
            found = {name: row[name] if name in TEXT else float(row[name]) if row[name] else None for name in COLUMNS}
            values = tuple(found[name] for name in COLUMNS)
            database.execute(f"insert or replace into trial values ({', '.join('?' * 11)})", values[:11])
            if found["seeded"]:
                database.execute(f"insert into canary values ({', '.join('?' * 9)})", (*values[:6], *values[11:]))
    return database


KEY = COLUMNS[:6]
TEXT = ("target", "bug", "mode", "arm", "by", "seeded")


def _quoted(name):
    return f'"{name}"'


def page(raw):
    """The report on the trials in the file `raw`; a text of the same name beside it says what trials they are."""
    database, note = read_raw(raw), raw.with_suffix(".md")
    lines = [HEAD.format(raw=raw.name)]
    lines += ["## These trials", "", note.read_text().strip(), ""] if note.exists() else []
    for mode in ("live", "watch"):
        budgets = database.execute("select distinct budget from trial where mode=? order by 1 desc", (mode,)).fetchall()
        for (budget,) in budgets:
            lines += table(database, mode, budget)
    lines += ["## The clean build", "", *clean_table(database)]
    not_run = [name for name in BUGS if not database.execute("select 1 from canary where seeded=?", (name,)).fetchone()]
    lines += ["", "## Not run", "", ", ".join(not_run) or "Every bug was in a trial.", ""]
    count, cpu = database.execute("select count(*), coalesce(sum(cpu), 0) from trial").fetchone()
    lines.append(f"{count} trials, {cpu:.0f} CPU seconds in all.")
    return "\n".join(lines) + "\n"


def report(options):
    """Write the page and the raw data; from the raw data alone when there is no database."""
    raw = Path(options.raw)
    if Path(options.database).exists():
        write_raw(open_database(options.database), raw)
    Path(options.output).write_text(page(raw))


def main(arguments=None):
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["trial"]:
        target, bug, mode, arm, seed, budget, database = words[1:]
        os.nice(10)
        run_trial(open_database(database), target, bug, mode, arm, int(seed), float(budget))
        return
    parser = argparse.ArgumentParser(prog="time_to_bug", description=__doc__)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--database", default="time-to-bug.sqlite")
    parser.add_argument("--mode", choices=("watch", "live", "clean"), default="watch")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--bugs", default="")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--output", default="docs/benchmark.md")
    parser.add_argument("--raw", default="tests/bench/data/time_to_bug.csv")
    options = parser.parse_args(words)
    (run_all if options.what == "run" else report)(options)


if __name__ == "__main__":
    main()
