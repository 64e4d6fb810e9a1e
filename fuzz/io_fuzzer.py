"""Fuzz emulation of instructions and devices for a hostile guest."""

from __future__ import annotations

from sevlab.fuzz.harness import main

if __name__ == "__main__":
    main("io")
