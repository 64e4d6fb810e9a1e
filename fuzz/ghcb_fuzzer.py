"""Fuzz a hypervisor's GHCB and MSR-protocol handling."""

from __future__ import annotations

from sevlab.fuzz.harness import main

if __name__ == "__main__":
    main("ghcb")
