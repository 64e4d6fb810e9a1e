"""Keeping a corpus small."""

from __future__ import annotations

from collections.abc import Sequence

from sevlab.fuzz.runner import Runner


def minimal(runner: Runner, inputs: Sequence[bytes]) -> list[bytes]:
    """Those inputs, shortest first, that reach a coordinate which no shorter one reaches."""
    return [data for data in sorted(inputs, key=lambda data: (len(data), data)) if runner.run_bytes(data).new]
