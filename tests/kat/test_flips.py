"""The known-answer tests can fail: with one expected value changed in its file, the set's own test does.

Each `tests/kat/test_<set>.py` may declare `FLIPS`: file below the set's folder -> names of expected fields. For each
field, the middle one of its occurrences in the file is changed in one place, and the set's test must fail.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.vectors import ROOT, vector_set

KAT = ROOT / "tests/kat"


def declared():
    """(set, file, field) of every FLIPS, read from the source so that no vector is loaded here."""
    for path in sorted(KAT.glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FLIPS":
                for file, fields in ast.literal_eval(node.value).items():
                    for field in fields:
                        yield path.stem.removeprefix("test_"), file, field


def changed(value):
    """`value` with one thing different: a bit of a number or of a hex digit, a letter of a text, an item of a list."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value ^ 1
    if isinstance(value, list):
        middle = len(value) // 2
        return [*value[:middle], changed(value[middle]), *value[middle + 1 :]] if value else [0]
    if isinstance(value, dict):
        key = sorted(value)[len(value) // 2]
        return value | {key: changed(value[key])}
    if value is None:
        return 1
    digits = [place for place, letter in enumerate(value) if letter.lower() in "0123456789abcdef"]
    place = digits[len(digits) // 2] if digits else len(value) // 2
    digit = value[place : place + 1]
    other = f"{int(digit, 16) ^ 1:x}" if digits else chr(ord(digit or "a") ^ 1)
    return value[:place] + other + value[place + 1 :]


def occurrences(item, field):
    """Every mapping in `item`, at any depth, that has `field`."""
    if isinstance(item, dict):
        if field in item:
            yield item
        for value in item.values():
            yield from occurrences(value, field)
    elif isinstance(item, list):
        for value in item:
            yield from occurrences(value, field)


def flip(path, field):
    """Change the middle occurrence of `field` in a JSON or JSON-lines file."""
    lines = path.suffix == ".jsonl"
    text = path.read_text()
    content = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    found = [holder for holder in occurrences(content, field) if holder[field] != {}]
    assert found, f"{path.name} has no field {field!r}"
    holder = found[len(found) // 2]
    holder[field] = changed(holder[field])
    path.chmod(0o644)
    path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content))


@pytest.mark.long
@pytest.mark.parametrize(("name", "file", "field"), list(declared()))
def test_a_changed_expected_value_is_noticed(name, file, field, tmp_path):
    shutil.copytree(vector_set(name), tmp_path / name)
    for other in vector_set(name).parent.iterdir():
        if other.name != name:
            (tmp_path / other.name).symlink_to(other)
    flip(tmp_path / name / file, field)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(KAT / f"test_{name}.py")],
        env=os.environ | {"SEVLAB_VECTORS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 1, result.stdout
