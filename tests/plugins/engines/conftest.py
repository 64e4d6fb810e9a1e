"""The flat guest, built once for all tests of the engines."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.guests.build import build


@pytest.fixture(scope="session")
def flat_elf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tests/guests/flat.c` as an ELF file."""
    pytest.importorskip("unicorn", reason="the engine unicorn is not installed (extra emu)")
    if shutil.which("gcc") is None:
        pytest.skip("gcc is missing: the flat guest cannot be built")
    return build("flat.c", tmp_path_factory.mktemp("guests") / "flat.elf")
