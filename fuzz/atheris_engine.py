"""The atheris engine: libFuzzer's loop over instrumented handlers, with our mutator and our state counters.

Handlers and plugins are instrumented in place, after they are imported and before the machine is composed; layouts,
memory and codecs are not, so that coverage speaks of behaviour. libFuzzer ends the process when it is done.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from hashlib import sha1
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from types import CodeType, FunctionType

from sevlab.core.plugins import PluginSet
from sevlab.fuzz.atheris_counters import AtherisCounters
from sevlab.fuzz.corpus import StateCorpus
from sevlab.fuzz.engine import Budget, Incoming, Told, nothing
from sevlab.fuzz.handlers import handler_modules
from sevlab.fuzz.mutators import Steps
from sevlab.fuzz.runner import Runner

LISTEN_SECONDS = 2.0
RAW, OURS = 0.05, 0.6
"""How often libFuzzer's own mutations change the bytes, and how often we choose the input to go on from."""


class AtherisEngine:
    """libFuzzer through atheris. `arguments` are more options of libFuzzer."""

    name = "atheris"

    def __init__(self, arguments: Sequence[str] = ()) -> None:
        self._arguments = list(arguments)
        self._counters = AtherisCounters()

    def prepare(self, plugins: PluginSet) -> int:
        """Instrument every function of the handlers' modules in place, closures included; returns how many."""
        wanted = frozenset(handler_modules(plugins))
        patched: dict[CodeType, CodeType] = {}
        count = 0
        for function in [item for item in gc.get_objects() if isinstance(item, FunctionType)]:
            code = function.__code__
            if function.__module__ not in wanted or not code.co_filename.endswith(".py"):
                continue
            if code not in patched:
                patched[code] = self._counters.instrument(code)
            function.__code__ = patched[code]
            count += 1
        return count

    def fuzz(
        self, runner: Runner, corpus: Sequence[bytes], budget: Budget, told: Told, incoming: Incoming = nothing
    ) -> None:
        """Run and end the process; `told` returning False ends it too."""
        import atheris

        counters = runner.feedback.counters = self._counters
        folder = Path(mkdtemp(prefix="sevlab-fuzz-"))
        for number, data in enumerate(corpus):
            (folder / f"{number:06}").write_bytes(data)
        rng = Random(budget.seed)
        codec, mutator, kept = runner.codec, runner.mutator, StateCorpus()

        listened = [time.monotonic()]

        def one_input(data: bytes) -> None:
            if time.monotonic() - listened[0] > LISTEN_SECONDS:  # libFuzzer reads its folder again every second
                listened[0] = time.monotonic()
                for other in incoming():
                    (folder / sha1(other, usedforsecurity=False).hexdigest()).write_bytes(other)
            steps = codec.decode(data)
            run = runner.run(steps, learn=True)
            counters.report()
            if run.new:
                kept.add(tuple(steps[: run.useful]), run.state)
            if not told(steps, run):
                sys.stdout.flush()
                raise KeyboardInterrupt

        # libFuzzer offers a seed for each mutation; one generator for all of them is as repeatable, and costs nothing.
        # It knows nothing of states, so half of the time we choose what to go on from.
        def mutate(data: bytes, max_size: int, _seed: int) -> bytes:
            way = rng.random()
            if way < RAW and data:
                return bytes(atheris.Mutate(data, len(data) + 16))
            steps = kept.make(mutator, rng) if way < RAW + OURS else mutator.mutate(codec.decode(data))
            return written(steps, max_size, data)

        def crossover(first: bytes, second: bytes, max_size: int, _seed: int) -> bytes:
            return written(mutator.crossover(codec.decode(first), codec.decode(second)), max_size, first)

        def written(steps: Steps, max_size: int, instead: bytes) -> bytes:
            made = codec.encode(steps)
            return made if len(made) <= max_size else instead

        options = [
            f"-max_len={budget.max_bytes}",
            f"-seed={budget.seed}",
            "-detect_leaks=0",
            "-len_control=0",
            "-reload=1",
        ]
        options += [f"-max_total_time={int(budget.seconds)}"] if budget.seconds else []
        options += [f"-runs={budget.runs}"] if budget.runs else []
        arguments = [sys.argv[0], *options, *self._arguments, str(folder)]
        atheris.Setup(arguments, one_input, custom_mutator=mutate, custom_crossover=crossover)
        atheris.Fuzz()
