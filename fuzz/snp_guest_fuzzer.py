"""Fuzz the reference guest against a hypervisor that forges replies and page states."""

from __future__ import annotations

from sevlab.fuzz.harness import main

if __name__ == "__main__":
    main("snp.guest")
