"""Fuzz a guest's #VC handler against a hostile hypervisor."""

from __future__ import annotations

from sevlab.fuzz.harness import main

if __name__ == "__main__":
    main("vc")
