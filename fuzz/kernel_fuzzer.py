"""Fuzz the kernel itself: any bytes are a list of steps, and nothing may leave `Machine.apply`.

`python -m sevlab.fuzz.kernel_fuzzer -max_total_time=60 [CORPUS]`; the options are libFuzzer's.
"""

from __future__ import annotations

import sys

import sevlab.core.crypto
import sevlab.core.layout
import sevlab.core.memory  # noqa: F401  # imported before the instrumentation, so that it leaves them alone

PLUGINS = ("sme",)


def main() -> None:
    """Run the harness."""
    import atheris

    with atheris.instrument_imports(include=["sevlab"]):
        from sevlab.fuzz.targets import kernel_target

    target = kernel_target(PLUGINS)
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
