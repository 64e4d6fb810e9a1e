"""Rules of the tree itself."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tomllib

import pytest

from tests.vectors import OWN, ROOT


def tracked(*patterns):
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.split()


@pytest.mark.parametrize("kind", OWN)
def test_external_data_is_byte_for_byte_what_the_manifest_says(kind):
    manifest = (OWN[kind] / "MANIFEST.sha256").read_text().splitlines()
    listed = {}
    for line in manifest:
        digest, _, name = line.partition("  ")
        listed[name.removeprefix("./")] = digest
    found = {
        path.relative_to(OWN[kind]).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in OWN[kind].rglob("*")
        if path.is_file() and path.name != "MANIFEST.sha256"
    }
    assert found == listed


def test_no_module_is_longer_than_the_style_allows():
    long = {
        path: count
        for path in tracked("core/*.py", "plugins/*.py", "traces/*.py", "fuzz/*.py")
        if (count := len((ROOT / path).read_text().splitlines())) > 500
    }
    assert not long


def test_no_file_names_a_registry_or_a_lock():
    for path in tracked():
        assert not re.search(r"(uv|poetry|pdm|package-lock)\.(lock|json)$", path)
        if path.startswith("tests/data/") or path == "tests/packaging/test_tree.py":
            continue
        text = (ROOT / path).read_bytes()
        assert b"/simple" not in text, path
        assert b"index-url" not in text, path


def test_versions_agree_and_every_classifier_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert project["version"] in changelog


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        re.split(r"[=;]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = [
        *project["dependencies"],
        *(item for group in project["optional-dependencies"].values() for item in group),
    ]
    names = {re.split(r"[\[<>=; ]", item)[0].lower().replace("_", "-") for item in wanted} - {"sevlab"}
    assert names <= pinned
