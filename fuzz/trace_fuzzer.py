"""Fuzz the readers of files: any bytes are entries or a refusal, with flat memory and a true account of what is lost.

`python -m sevlab.fuzz.trace_fuzzer [kvm|xentrace|ghcb|ccp|file] -max_total_time=60 [CORPUS]`: an importer, or without a
name the reader of `.sevtrace`. The options are libFuzzer's; `--seeds DIR` writes inputs to start from, and ends.
"""

from __future__ import annotations

import sys
from hashlib import sha1
from pathlib import Path

import sevlab.core.machine  # noqa: F401  # imported before the instrumentation, so that it leaves the kernel alone


def main() -> None:
    """Run the harness."""
    import atheris

    with atheris.instrument_imports(include=["sevlab"]):
        from sevlab.fuzz.import_targets import IMPORTERS, import_target
        from sevlab.fuzz.trace_targets import seeds, trace_target

    name = sys.argv.pop(1) if sys.argv[1:] and sys.argv[1] in IMPORTERS else ""
    if sys.argv[1:2] == ["--seeds"]:
        for seed in IMPORTERS[name].seeds() if name else seeds():
            Path(sys.argv[2], sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)
        return
    atheris.Setup(sys.argv, import_target(name) if name else trace_target())
    atheris.Fuzz()


if __name__ == "__main__":
    main()
