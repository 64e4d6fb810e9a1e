"""Fuzzing: what feedback, oracles and mutation cost, the rates of targets, and atheris against an empty target."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from random import Random

from sevlab.core.errors import ConfigError
from sevlab.core.events import AspCommand, AspStatus
from sevlab.core.machine import Machine
from sevlab.fuzz.paired import Paired
from sevlab.fuzz.runner import Runner
from sevlab.fuzz.targets import all_targets, target_named
from sevlab.plugins.sev import Command, GuestState, driver

from tests.bench.atheris_rate import MESSAGES, PLUGINS
from tests.bench.harness import Bench, Row
from tests.plugins.sev.test_states import prepare
from tests.plugins.sev.world import World


def sequences(bench: Bench) -> list[Row]:
    """Ten GHCB messages as the mutator makes them, five plugins: alone, with feedback, with the oracles of one run."""
    target = target_named("ghcb")._replace(steps=("sev_es.vmgexit",), plugins=PLUGINS)
    watched, bare = Runner(target, seed=1), Runner(target, oracles=(), seed=1)
    bare.machine.fetches.keep_log(keep=False)
    made = [tuple(watched.mutator.step() for _ in range(MESSAGES)) for _ in range(50 if bench.quick else 500)]

    def apply():
        for steps in made:
            for step in steps:
                bare.machine.apply(step)
            bare.machine.reset()

    def run(runner):
        for steps in made:
            runner.run(steps)

    def mutate():
        for steps in made:
            watched.codec.decode(watched.codec.encode(watched.mutator.mutate(steps)))

    def every(call):
        return bench(call, 1) / len(made)

    base, feedback, oracles = every(apply), every(lambda: run(bare)), every(lambda: run(watched))
    typed = every(mutate)
    paired = Paired(watched)
    checks = (("non-interference", paired.interference), ("differential", paired.differential))
    shares = [(name, every(lambda judge=judge: [judge(steps) for steps in made])) for name, judge in checks]
    return [
        ("ten GHCB messages and a reset", 1.0, f"{base:.0f} us"),
        ("the same with state feedback", feedback / base, f"{feedback:.0f} us"),
        ("the same with feedback and the six oracles of one run", oracles / base, f"{oracles:.0f} us"),
        ("share of the six oracles in the loop", (oracles - feedback) / oracles, "target 0.2"),
        *(
            (f"share of {name}, every {Paired.EVERY}th input", cost / Paired.EVERY / oracles, f"{cost:.0f} us each")
            for name, cost in shares
        ),
        ("one typed mutation with its bytes, to such a run", typed / oracles, f"{typed:.0f} us"),
    ]


def against_empty(bench: Bench) -> list[Row]:
    """Ten messages under atheris and an empty target side by side: how many empty inputs one such input takes."""
    seconds = 3 if bench.quick else 15
    ratios, rates = [], []
    for _ in range(1 if bench.quick else 3):
        words = [[sys.executable, "-m", "tests.bench.atheris_rate", kind, str(seconds)] for kind in ("empty", "ghcb")]
        running = [
            subprocess.Popen(word, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for word in words
        ]
        empty, ours = (float(process.communicate()[0].split()[0]) for process in running)
        ratios.append(empty / ours)
        rates.append((empty, ours))
    median = statistics.median(ratios)
    empty, ours = rates[ratios.index(median)]
    note = f"{ours:.0f}/s of {empty:.0f}/s a CPU second; floor 150, aim 100"
    return [("empty atheris inputs in one of ten GHCB messages", median, note)]


def rates(bench: Bench) -> list[Row]:
    """Inputs and steps a CPU second by typed mutation of the seeds, not instrumented."""
    rows: list[Row] = []
    for name in sorted(all_targets()):
        runner, rng = Runner(target_named(name), seed=1), Random(1)
        kept = runner.seeds() or [runner.mutator.fresh()]
        started, inputs, runner.executed = time.process_time(), 0, 0
        while time.process_time() - started < (0.3 if bench.quick else 3):
            steps = runner.mutator.mutate(rng.choice(kept))
            if runner.run(steps, learn=True).new:
                kept.append(steps)
            inputs += 1
        took = time.process_time() - started
        rows.append((f"{name}: inputs", 1.0, f"{inputs / took:.0f}/s, {runner.executed / took:.0f} steps/s"))
    return rows


def accepted() -> dict[Command, tuple[Machine, AspCommand]]:
    """Each command of the mailbox with a machine whose states accept it, marked."""
    found: dict[Command, tuple[Machine, AspCommand]] = {}
    for state in GuestState:
        for command in set(driver.BUFFERS) - set(found):
            world = World()
            if state is not GuestState.UNINIT:
                world.reach(state)
            elif command in (Command.INIT, Command.INIT_EX):
                world.need(Command.SHUTDOWN)
            layout = driver.BUFFERS[command]
            try:
                fields = prepare(world, command)
            except ConfigError:  # what must come before is not accepted in this state
                continue
            world.machine.mark()
            buffer = b"" if layout is None else layout.build(**fields)
            step = AspCommand("sev", command, world.place(0), buffer)
            answer = world.machine.apply(step).first(AspStatus)
            world.machine.reset()
            if answer is not None and not answer.status:
                found[command] = (world.machine, step)
    return found


def mailbox(bench: Bench) -> list[Row]:
    """Commands of the SEV mailbox, drawn from the table with equal chances, each in a state that accepts it."""
    found = accepted()
    rng, number = Random(1), 500 if bench.quick else 10_000
    drawn = rng.choices(sorted(found), k=number)

    def apply(command):
        machine, step = found[command]
        machine.apply(step)
        machine.reset()

    for command in found:
        apply(command)
    slowest = sorted(((bench(lambda command=command: apply(command), 20), command) for command in found), reverse=True)
    took = bench(lambda: [apply(command) for command in drawn], 1) / number
    worst = ", ".join(f"{command.name} {cost:.0f} us" for cost, command in slowest[:3])
    missing = ", ".join(command.name for command in driver.BUFFERS if command not in found) or "none"
    return [
        ("mailbox commands", 1.0, f"{1e6 / took:.0f}/s, target 5000; {len(found)} kinds, not accepted: {missing}"),
        ("the slowest of them, to the mean", slowest[0][0] / took, worst),
    ]


GROUPS = (sequences, mailbox, against_empty, rates)
