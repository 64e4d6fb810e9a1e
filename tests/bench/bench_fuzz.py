"""Fuzzing: inputs a second of each target, what the oracles cost, and how fast a corpus loads."""

from __future__ import annotations

import time
from random import Random

from sevlab.fuzz.runner import Runner
from sevlab.fuzz.targets import target_named
from sevlab.plugins.sev_es import Ghcb, Vmgexit
from sevlab.plugins.sev_es.fuzzing import GHCB_GPA

from tests.bench.harness import Bench, Row

CPUID = Vmgexit(0, GHCB_GPA, Ghcb.build(sw_exit_code=0x72, sw_exit_info_1=0, sw_exit_info_2=0, rax=0, rcx=0))


def sequences(bench: Bench) -> list[Row]:
    """Ten GHCB messages: alone, with feedback, with the oracles that need one run."""
    watched = Runner(target_named("ghcb"))
    bare = Runner(target_named("ghcb"), oracles=())
    bare.machine.fetches.keep_log(keep=False)
    steps = (CPUID,) * 10
    number = 100 if bench.quick else 1000

    def apply():
        for step in steps:
            bare.machine.apply(step)
        bare.machine.reset()

    base = bench(apply, number)
    feedback = bench(lambda: bare.run(steps), number)
    oracles = bench(lambda: watched.run(steps), number)
    data = watched.codec.encode(steps)
    typed = bench(lambda: watched.codec.encode(watched.mutator.mutate(watched.codec.decode(data))), number)
    return [
        ("ten VMGEXITs and a reset", 1.0, f"{base:.0f} us"),
        ("with state feedback", feedback / base, f"{feedback:.0f} us"),
        ("with feedback and the oracles that need one run", oracles / base, f"{oracles:.0f} us"),
        ("the oracles' share of the loop", (oracles - feedback) / oracles, "target 0.2"),
        ("one typed mutation with decoding and encoding, to the run", typed / oracles, f"{typed:.0f} us"),
    ]


def rates(bench: Bench) -> list[Row]:
    """Inputs and steps a CPU second by typed mutation of the seeds, without instrumentation."""
    rows: list[Row] = []
    for name in ("ghcb", "sev.commands", "vc", "io"):
        runner, rng = Runner(target_named(name), seed=1), Random(1)
        kept = runner.seeds()
        started, inputs = time.process_time(), 0
        while time.process_time() - started < (0.5 if bench.quick else 5):
            steps = runner.mutator.mutate(rng.choice(kept))
            if runner.run(steps, learn=True).new:
                kept.append(steps)
            inputs += 1
        took = time.process_time() - started
        rows.append((f"{name}: inputs", 1.0, f"{inputs / took:.0f}/s, {runner.executed / took:.0f} steps/s"))
    return rows


GROUPS = (sequences, rates)
