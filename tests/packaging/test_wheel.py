"""What is shipped: the wheel's files are the tree's, and a clean environment can use it."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.vectors import ROOT

PACKAGES = ("core", "plugins", "traces", "fuzz")

pytestmark = pytest.mark.long


def run(*command, cwd=None):
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def build(kind, into, source=ROOT):
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", into, source)
    (made,) = into.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", tmp_path_factory.mktemp("wheel"))


def environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    return folder / "bin"


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """A fresh environment with the wheel and pytest, pinned as the suite is."""
    programs = environment(tmp_path_factory.mktemp("clean"))
    constraints = ROOT / "constraints.txt"
    run(programs / "pip", "install", "-q", "-c", constraints, wheel, "pytest", "hatchling")
    return programs


def test_the_wheel_holds_exactly_the_four_packages(wheel):
    tracked = run("git", "ls-files", *PACKAGES, cwd=ROOT).split()
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == {f"sevlab/{path}" for path in tracked}
    assert {f"sevlab/{package}/py.typed" for package in PACKAGES} <= set(names)


def test_the_sdist_builds_the_same_wheel(wheel, tmp_path):
    sdist = build("sdist", tmp_path / "sdist")
    run("tar", "xf", sdist, "-C", tmp_path)
    (source,) = [path for path in tmp_path.iterdir() if path.name.startswith("sevlab-")]
    again = build("wheel", tmp_path / "wheel", source)
    first, second = zipfile.ZipFile(wheel), zipfile.ZipFile(again)
    contents = [{name: archive.read(name) for name in archive.namelist()} for archive in (first, second)]
    assert contents[0] == contents[1]


def test_a_clean_environment_runs_doctor_and_the_demo(clean, tmp_path):
    report = json.loads(run(clean / "sevlab", "doctor", "--json", cwd=tmp_path))
    states = {row["name"]: row["state"] for row in report["capabilities"]}
    assert states["aes-xts"] == "present"
    assert states["plugin sme"] == "present"
    assert states["atheris"] == "not installed"
    assert "the same bytes" in run(clean / "sevlab", "demo", cwd=tmp_path)


def test_a_new_plugin_package_installs_and_passes_its_own_test(clean, tmp_path):
    run(clean / "sevlab", "plugins", "new", "doorbell", "--into", tmp_path)
    package = tmp_path / "sevlab-doorbell"
    run(clean / "pip", "install", "-q", "--no-build-isolation", "--no-deps", package)
    assert " passed" in run(clean / "python", "-m", "pytest", "-q", cwd=package)
    shown = json.loads(run(clean / "sevlab", "plugins", "show", "doorbell", "--json", cwd=tmp_path))
    assert shown["handles"] == {"host MSR": ["0xc0011ff0"]}


def test_a_strangers_distribution_is_found_by_its_entry_point(clean, tmp_path):
    run(clean / "pip", "install", "-q", "--no-build-isolation", "--no-deps", ROOT / "tests/stranger")
    rows = json.loads(run(clean / "sevlab", "plugins", "list", "--json", cwd=tmp_path))
    assert {row["name"]: row["distribution"] for row in rows}["stranger"] == "sevlab-stranger"
    assert run(clean / "sevlab", "greet", cwd=tmp_path) == "hello from a stranger\n"
