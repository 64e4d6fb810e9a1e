"""Fuzz hypercalls: a hostile guest in every ABI, any registers, structures and array lengths."""

from __future__ import annotations

from sevlab.fuzz.harness import main

if __name__ == "__main__":
    main("hypercall")
