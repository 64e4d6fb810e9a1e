"""Where the external vectors and captures are, for all known-answer tests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN = {"vectors": ROOT / "tests/data/vectors", "captures": ROOT / "tests/data/captures"}
SHARED = {name: ROOT.parent / "shared/data" / name for name in OWN}
VARIABLES = {"vectors": "SEVLAB_VECTORS", "captures": "SEVLAB_CAPTURES"}


def _root(kind: str) -> Path:
    named = os.environ.get(VARIABLES[kind])
    if named:
        return Path(named)
    return OWN[kind] if OWN[kind].is_dir() else SHARED[kind]


def _set(kind: str, name: str) -> Path:
    path = _root(kind) / name
    if path.exists():
        return path
    message = f"{kind} set {name!r} is not in {_root(kind)}"
    if os.environ.get("SEVLAB_STRICT_VECTORS") == "1" and (OWN[kind] / name).exists():
        pytest.fail(f"{message}, but the tree's own copy holds it")
    pytest.skip(message, allow_module_level=True)


def vector_set(name: str) -> Path:
    """Folder of a set of vectors; skips with the set's name when it is not there."""
    return _set("vectors", name)


def capture_set(name: str) -> Path:
    """File or folder of captures; skips with its name when it is not there."""
    return _set("captures", name)


def load_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text())
