"""Fuzz SNP mailbox commands and RMP instructions of a hostile hypervisor."""

from __future__ import annotations

from sevlab.fuzz.harness import main

if __name__ == "__main__":
    main("snp.commands")
