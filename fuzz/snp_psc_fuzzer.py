"""Fuzz page state changes and RMP instructions of a hostile guest."""

from __future__ import annotations

from sevlab.fuzz.harness import main

if __name__ == "__main__":
    main("snp.psc")
