"""Build one of the guests in this folder."""

from __future__ import annotations

import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = (
    "-O1", "-ffreestanding", "-fno-pic", "-fno-pie", "-no-pie", "-mno-red-zone", "-mgeneral-regs-only",
    "-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables", "-nostdlib", "-static",
    "-Wl,--build-id=none",
)  # fmt: skip


def build(source: str, target: Path, *more: str) -> Path:
    """`source` as an ELF file at `target`, with `more` options of the compiler."""
    command = ["gcc", *FLAGS, *more, f"-Wl,-T,{HERE / 'flat.lds'}", "-o", str(target), str(HERE / source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not built.returncode, built.stderr
    return target
