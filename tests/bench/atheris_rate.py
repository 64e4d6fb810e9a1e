"""How many inputs a CPU second atheris makes and runs: `python -m tests.bench.atheris_rate empty|ghcb SECONDS`.

`empty` is a target of one instrumented branch; `ghcb` runs sequences of ten GHCB messages, made by the typed mutator,
on instrumented handlers of five plugins with the oracles that need one run. Prints one number. The first quarter of the
time is not counted: libFuzzer and the caches warm up.
"""

from __future__ import annotations

import sys
import time

from sevlab.core.plugins import load
from sevlab.fuzz.atheris_engine import AtherisEngine
from sevlab.fuzz.engine import Budget
from sevlab.fuzz.runner import Runner
from sevlab.fuzz.targets import target_named

MESSAGES = 10
MAX_LEN = 1 << 14
WARM = 0.25
PLUGINS = ("io", "sev_es", "snp")


class Meter:
    """Counts calls; after `seconds` it prints calls a CPU second, and says that it is over."""

    def __init__(self, seconds):
        self.start = time.process_time()
        self.warm = seconds * WARM
        self.end = seconds
        self.calls = 0
        self.since = None

    def over(self):
        self.calls += 1
        if self.calls & 63:
            return False
        spent = time.process_time() - self.start
        if self.since is None:
            if spent > self.warm:
                self.since, self.calls = spent, 0
        elif spent > self.end:
            print(self.calls / (spent - self.since), flush=True)
            return True
        return False


def empty(seconds):
    import atheris

    meter = Meter(seconds)

    @atheris.instrument_func
    def one_input(data):
        if len(data) > MAX_LEN:
            raise ValueError

    def counted(data):
        one_input(data)
        if meter.over():
            raise KeyboardInterrupt

    options = [f"-max_len={MAX_LEN}", "-seed=1", "-detect_leaks=0", "-len_control=0"]
    atheris.Setup([sys.argv[0], *options], counted)
    atheris.Fuzz()


def ghcb(seconds):
    target = target_named("ghcb")._replace(steps=("sev_es.vmgexit",), plugins=PLUGINS)
    engine = AtherisEngine()
    engine.prepare(load(PLUGINS))
    runner = Runner(target, seed=1)
    mutate, crossover, extend = runner.mutator.mutate, runner.mutator.crossover, runner.mutator.extend

    def ten(steps):
        return (*steps, *(runner.mutator.step() for _ in range(MESSAGES - len(steps))))[:MESSAGES]

    runner.mutator.mutate = lambda steps: ten(mutate(ten(steps)))
    runner.mutator.fresh = lambda: ten(())
    runner.mutator.extend = lambda steps: ten(extend(steps[: MESSAGES // 2]))
    runner.mutator.crossover = lambda first, second: ten(crossover(first, second))
    seeds = [runner.codec.encode(ten(steps)) for steps in runner.seeds()]
    meter = Meter(seconds)
    engine.fuzz(runner, seeds, Budget(max_bytes=MAX_LEN), lambda _steps, _run: not meter.over())


if __name__ == "__main__":
    {"empty": empty, "ghcb": ghcb}[sys.argv[1]](float(sys.argv[2]))
