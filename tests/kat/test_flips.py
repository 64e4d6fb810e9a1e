"""The known-answer tests can fail: with one byte of one field flipped, the set's own test does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.vectors import ROOT, vector_set

SETS = {"nist/aes_xts.json": ("test_nist.py", ("key", "tweak", "pt", "ct"))}


@pytest.mark.slow
@pytest.mark.parametrize(("file", "field"), [(file, field) for file, (_, fields) in SETS.items() for field in fields])
def test_a_flipped_byte_is_noticed(file, field, tmp_path):
    folder = file.partition("/")[0]
    shutil.copytree(vector_set(folder), tmp_path / folder)
    path = tmp_path / file
    path.chmod(0o644)
    cases = json.loads(path.read_text())
    value = bytearray.fromhex(cases[7][field])
    value[len(value) // 2] ^= 0x10
    cases[7][field] = value.hex()
    path.write_text(json.dumps(cases))
    test = ROOT / "tests/kat" / SETS[file][0]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(test)],
        env=os.environ | {"SEVLAB_VECTORS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 1, result.stdout
