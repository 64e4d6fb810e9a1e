"""Fuzz the kernel itself: any bytes are a list of steps, and nothing may leave `Machine.apply`."""

from __future__ import annotations

from sevlab.fuzz.harness import main

if __name__ == "__main__":
    main("kernel")
