"""The flat guest, built once for all tests of the engines."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

GUESTS = Path(__file__).resolve().parents[2] / "guests"
FLAGS = (
    "-O1", "-ffreestanding", "-fno-pic", "-fno-pie", "-no-pie", "-mno-red-zone", "-mgeneral-regs-only",
    "-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables", "-nostdlib", "-static",
    "-Wl,--build-id=none",
)  # fmt: skip


@pytest.fixture(scope="session")
def flat_elf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tests/guests/flat.c` as an ELF file."""
    pytest.importorskip("unicorn", reason="the engine unicorn is not installed (extra emu)")
    if shutil.which("gcc") is None:
        pytest.skip("gcc is missing: the flat guest cannot be built")
    target = tmp_path_factory.mktemp("guests") / "flat.elf"
    command = ["gcc", *FLAGS, f"-Wl,-T,{GUESTS / 'flat.lds'}", "-o", str(target), str(GUESTS / "flat.c")]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not built.returncode, built.stderr
    return target
