"""Fuzz guest messages of a hostile guest to the firmware."""

from __future__ import annotations

from sevlab.fuzz.harness import main

if __name__ == "__main__":
    main("snp.messages")
