"""The atheris engine: libFuzzer's loop over instrumented handlers, with our mutator and our state counters.

Handlers and plugins are instrumented in place, after they are imported and before the machine is composed; layouts,
memory and codecs are not, so that coverage speaks of behaviour. libFuzzer ends the process when it is done.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterable, Sequence
from hashlib import sha1
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from types import CodeType, FunctionType

from sevlab.core.plugins import PluginSet
from sevlab.fuzz.engine import Budget, Incoming, Told, nothing, typed_mutation
from sevlab.fuzz.feedback import AtherisCounters
from sevlab.fuzz.runner import Runner

HANDLERS = ("sevlab.core.steps", "sevlab.core.asp", "sevlab.core.hypervisor", "sevlab.core.cpu", "sevlab.core.delivery")
"""The kernel's own behaviour."""

LEFT_ALONE = (".commands", ".demo", ".fuzzing", ".layout", ".buffers", ".numbers", ".command")
"""Modules of a plugin without behaviour of their own, by the end of their names."""

LISTEN_SECONDS = 2.0
RAW = 0.1
"""How often libFuzzer's own mutations change the bytes."""


def handler_modules(plugins: PluginSet) -> tuple[str, ...]:
    """The modules whose functions are instrumented for a set of plugins."""
    packages = tuple(plugin.module.__name__ for plugin in plugins.plugins)
    found = [
        name
        for name in sys.modules
        if any(name == package or name.startswith(package + ".") for package in packages)
        and not name.endswith(LEFT_ALONE)
    ]
    return (*HANDLERS, *sorted(found))


def instrument(modules: Iterable[str]) -> int:
    """Instrument every function of `modules` in place, closures included; returns how many."""
    import atheris

    wanted = frozenset(modules)
    patched: dict[CodeType, CodeType] = {}
    count = 0
    for function in [item for item in gc.get_objects() if isinstance(item, FunctionType)]:
        code = function.__code__
        if function.__module__ not in wanted or not code.co_filename.endswith(".py"):
            continue
        if code not in patched:
            patched[code] = atheris.patch_code(code, True)
        function.__code__ = patched[code]
        count += 1
    return count


class AtherisEngine:
    """libFuzzer through atheris. `arguments` are more options of libFuzzer."""

    name = "atheris"

    def __init__(self, arguments: Sequence[str] = ()) -> None:
        self._arguments = list(arguments)

    def fuzz(
        self, runner: Runner, corpus: Sequence[bytes], budget: Budget, told: Told, incoming: Incoming = nothing
    ) -> None:
        """Run and end the process; `told` returning False ends it too."""
        import atheris

        runner.feedback.counters = AtherisCounters()
        folder = Path(mkdtemp(prefix="sevlab-fuzz-"))
        for number, data in enumerate(corpus):
            (folder / f"{number:06}").write_bytes(data)
        rng = Random(budget.seed)
        codec, mutator = runner.codec, runner.mutator

        listened = [time.monotonic()]

        def one_input(data: bytes) -> None:
            if time.monotonic() - listened[0] > LISTEN_SECONDS:  # libFuzzer reads its folder again every second
                listened[0] = time.monotonic()
                for other in incoming():
                    (folder / sha1(other, usedforsecurity=False).hexdigest()).write_bytes(other)
            steps = codec.decode(data)
            if not told(data, steps, runner.run(steps, learn=True)):
                sys.stdout.flush()
                raise KeyboardInterrupt

        def mutate(data: bytes, max_size: int, seed: int) -> bytes:
            rng.seed(seed)
            if rng.random() < RAW and data:
                return bytes(atheris.Mutate(data, len(data) + 16))
            mutator.reseed(seed)
            made = typed_mutation(runner, data, rng)
            return made if len(made) <= max_size else data

        def crossover(first: bytes, second: bytes, max_size: int, seed: int) -> bytes:
            mutator.reseed(seed)
            made = codec.encode(mutator.crossover(codec.decode(first), codec.decode(second)))
            return made if len(made) <= max_size else first

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
