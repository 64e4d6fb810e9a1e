"""How long each arm takes to find each seeded bug: `python -m tests.bench.time_to_bug run|report`.

One trial is one process: an arm, a seed, and either all bugs of a target in watch mode, or one bug live, or the clean
build. Its clock is the process's CPU time after start-up. Trials go to an SQLite file as they end, so that a run that
is stopped goes on later and several runs add up; they come in random order, never arm after arm.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from random import Random

from sevlab.fuzz.runner import Runner, chosen_oracles
from sevlab.fuzz.targets import all_targets
from sevlab.plugins.seeded import BUGS

from tests.bench.arms import ARMS, PEERS, Canaries, Trial
from tests.bench.survival import a12, bootstrap, mean_ratio, restricted_mean

TARGET_OF = {
    **dict.fromkeys(("S01", "S02", "S03", "S04", "S06", "S07", "S09", "S10", "S11", "S12"), "ghcb"),
    **dict.fromkeys(("S14", "S15", "S16", "S17"), "vc"),
    **dict.fromkeys(("S22", "S23", "S24"), "sev.commands"),
    **dict.fromkeys(("S19", "S20", "S21"), "snp.commands"),
    **dict.fromkeys(("S05", "S08"), "snp.psc"),
    "S13": "hypercall",
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


def run_trial(database, target, bug, mode, arm, seed, budget):
    """One trial in this process."""
    found = all_targets()[target]
    names = ",".join(sorted(name for name in BUGS if TARGET_OF[name] == target)) if mode == "watch" else bug
    options = {**found.options}
    if names:
        options["seeded"] = {"bugs": names, "mode": "live" if mode == "live" else "watch"}
    planted = found._replace(plugins=(*found.plugins, "seeded"), options=options)
    canaries = Canaries()
    probe = Runner(planted, seed=seed)
    runner = Runner(planted, seed=seed, oracles=(*chosen_oracles(planted, probe.plugins), canaries))
    wanted = set(names.split(","))

    def done(trial):
        if mode == "live":
            return trial.detected is not None
        return mode == "watch" and wanted <= set(canaries.triggered)

    trial = Trial(runner, budget, seed, done)
    trial.begin()
    canaries.start = trial.start
    runner.executed = 0
    ARMS[arm](trial)
    key = (target, bug, mode, arm, seed, budget)
    with database:
        row = (*key, trial.spent, trial.runs, runner.executed, trial.detected, trial.by)
        database.execute("insert or replace into trial values (?,?,?,?,?,?,?,?,?,?,?)", row)
        for name in wanted - {""}:
            row = (*key, name, canaries.reached.get(name), canaries.triggered.get(name))
            database.execute("insert or replace into canary values (?,?,?,?,?,?,?,?,?)", row)


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


def table(database, mode, budget):
    """One row for each bug: for each arm how many trials had the event, and the restricted mean time."""
    arms = [arm for arm in ARMS if any(times_of(database, mode, arm, bug, budget) for bug in BUGS)]
    if not arms:
        return []
    word = "triggered" if mode == "watch" else "detected"
    lines = [f"## {mode.capitalize()} mode, {budget:g} CPU seconds: {word}, and restricted mean time in seconds", ""]
    lines += [
        "| Bug | St/Cx | " + " | ".join(arms) + " | A12, P3 against best peer |",
        "|" + " --- |" * (len(arms) + 3),
    ]
    pairs = {True: [], False: []}
    for name, bug in BUGS.items():
        by_arm = {arm: times_of(database, mode, arm, name, budget) for arm in arms}
        if not any(by_arm.values()):
            continue
        cells = []
        for times in by_arm.values():
            hits = sum(time is not None for time in times)
            cells.append(f"{hits}/{len(times)}, {restricted_mean(times, budget):.2f}" if times else "not run")
        peers = [by_arm[arm] for arm in PEERS if by_arm.get(arm)]
        effect = ""
        if peers and by_arm.get("P3"):
            best = min(peers, key=lambda times: restricted_mean(times, budget))
            pairs[bug.stateful or bug.contexts].append((by_arm["P3"], best))
            effect = f"{a12(by_arm['P3'], best):.2f}"
        kind = " ".join(word for word, has in (("St", bug.stateful), ("Cx", bug.contexts)) if has)
        lines.append(f"| {name} {bug.title} | {kind} | {' | '.join(cells)} | {effect} |")
    lines.append("")
    for hard, found in pairs.items():
        if found:
            low, high = bootstrap(found, budget)
            which = "marked St or Cx" if hard else "without a mark"
            lines.append(
                f"Best peer arm / P3, geometric mean over {len(found)} bugs {which}: {mean_ratio(found, budget):.2f}"
                f" (95 % by bootstrap: {low:.2f} to {high:.2f}).\n"
            )
    return lines


HEAD = """# Time to bug

Made by `python -m tests.bench.time_to_bug report` from the raw data of its trials; do not edit.

Each trial is one process with its own seed; the clock is its CPU time after start-up. All arms share the machine, the
oracles, the reset and the message table: P0 random bytes, P1 the table without feedback, P2 a rule-based state machine
of Hypothesis, P3 the built-in loop of our campaigns guided by states; P3-state, P3-grammar and P3-seeds are P3 without
one of its parts. In watch mode all bugs of a target are planted, none acts, and the time is that of the first trigger;
in live mode one bug acts and the time is that of the first finding of any oracle. A trial without the event counts as
one that ran to the end (Kaplan-Meier); the peer arm that is best for the bug is the one P3 is compared with.
"""


def report(options):
    """Write the page."""
    database = open_database(options.database)
    lines = [HEAD]
    for mode in ("watch", "live"):
        for (budget,) in database.execute(
            "select distinct budget from trial where mode=? order by 1", (mode,)
        ).fetchall():
            lines += table(database, mode, budget)
    lines += ["## The clean build", ""]
    sums = "count(*), sum(cpu), sum(runs), sum(detected is not null)"
    clean = database.execute(f"select arm, {sums} from trial where mode='clean' group by arm").fetchall()
    if clean:
        lines += ["| Arm | Trials | CPU seconds | Inputs | Trials with an alarm |", "|" + " --- |" * 5]
        lines += [f"| {arm} | {count} | {cpu:.0f} | {runs} | {alarms} |" for arm, count, cpu, runs, alarms in clean]
    else:
        lines.append("Not run.")
    not_run = [name for name in BUGS if not database.execute("select 1 from canary where seeded=?", (name,)).fetchone()]
    lines += ["", "## Not run", "", ", ".join(not_run) or "Every bug was in a trial.", ""]
    count, cpu = database.execute("select count(*), coalesce(sum(cpu), 0) from trial").fetchone()
    lines.append(f"{count} trials, {cpu:.0f} CPU seconds in all.")
    Path(options.output).write_text("\n".join(lines) + "\n")


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
    options = parser.parse_args(words)
    (run_all if options.what == "run" else report)(options)


if __name__ == "__main__":
    main()
