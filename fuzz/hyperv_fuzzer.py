"""Fuzz Hyper-V's hypercalls as Xen serves them: sets of processors, flushes, interrupts."""

from __future__ import annotations

from sevlab.fuzz.harness import main

if __name__ == "__main__":
    main("hyperv")
