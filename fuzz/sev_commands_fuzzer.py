"""Fuzz SEV mailbox commands of a hostile hypervisor."""

from __future__ import annotations

from sevlab.fuzz.harness import main

if __name__ == "__main__":
    main("sev.commands")
