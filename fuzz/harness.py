"""The shared main of the harnesses: `python -m sevlab.fuzz.<target>_fuzzer [libFuzzer options] [CORPUS...]`.

A finding ends the run, as libFuzzer's users expect: the input is in a `crash-` file. `--seeds DIR` writes the target's
seeds, `--dictionary FILE` its dictionary, and both end at once; `--builtin` runs the loop that needs no atheris.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from hashlib import sha1
from pathlib import Path

from sevlab.core.oracle import Finding
from sevlab.core.plugins import load
from sevlab.core.vocabulary import Record
from sevlab.fuzz.atheris_engine import AtherisEngine
from sevlab.fuzz.builtin_engine import BuiltinEngine
from sevlab.fuzz.dictionaries import write_dictionary
from sevlab.fuzz.engine import Budget, Engine
from sevlab.fuzz.runner import Run, Runner
from sevlab.fuzz.targets import target_named


class Found(Exception):
    """An oracle's finding, as an exception for engines that know nothing else."""

    def __init__(self, finding: Finding, steps: Sequence[Record]) -> None:
        lines = [f"{finding.oracle}: {finding.rule}: {finding.message}", *(f"  {step}" for step in steps)]
        super().__init__("\n".join(lines))


def seed_bytes(runner: Runner) -> list[bytes]:
    """The target's seeds as inputs."""
    return [runner.codec.encode(steps) for steps in runner.seeds()]


def self_check(runner: Runner, instrumented: int, seeds: Sequence[bytes]) -> list[str]:
    """What a user must know before an hour is lost: instrumentation, seeds, states. Raises nothing, says all."""
    lines = [f"{instrumented} functions instrumented" if instrumented else "no code coverage: nothing is instrumented"]
    feedback = runner.feedback
    for data in seeds:
        runner.run_bytes(data)
    if not feedback.machines:
        lines.append("no state feedback: no plugin of this target has state counters")
    else:
        lines.append(f"{len(feedback.states)} states of {', '.join(feedback.machines)} reached by the seeds")
    lines.append(f"{len(seeds)} seeds" if seeds else "no seeds: the first inputs come from the declarations alone")
    runner.executed = 0
    return lines


def main(name: str, arguments: Sequence[str] | None = None) -> None:
    """Run the harness of target `name`."""
    options = list(sys.argv[1:] if arguments is None else arguments)
    target = target_named(name)
    plain = {"--builtin", "--seeds", "--dictionary"} & set(options)
    engine: Engine = BuiltinEngine() if plain else AtherisEngine(options)
    instrumented = engine.prepare(load(target.plugins))
    runner = Runner(target)
    seeds = seed_bytes(runner)
    if options[:1] == ["--seeds"]:
        for seed in seeds:
            Path(options[1], sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)
        return
    if options[:1] == ["--dictionary"]:
        payloads = [payload for found in runner.messages.by_kind.values() for payload in found]
        Path(options[1]).write_text(write_dictionary(payloads, runner.codec))
        return
    for line in self_check(runner, instrumented, seeds):
        print(f"{name}: {line}", file=sys.stderr)  # noqa: T201  # libFuzzer's own lines go there too

    def told(steps: Sequence[Record], run: Run) -> bool:
        if run.findings:
            raise Found(run.findings[0], steps)
        return True

    runs = next((int(option.partition("=")[2]) for option in options if option.startswith("-runs=")), 1000)
    engine.fuzz(runner, seeds, Budget(runs=runs) if engine.name == "builtin" else Budget(), told)
