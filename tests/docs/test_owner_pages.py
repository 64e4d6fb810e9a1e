"""The commands on the pages of measure and attest give the output that stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from click.testing import CliRunner
from sevlab.core import cli

from tests.vectors import ROOT, vector_set

PAGES = ("measure", "attest", "sev")


def commands(page):
    """(command line, output) of every console block of a page, in order."""
    text = (ROOT / f"docs/{page}.md").read_text()
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for part in block.split("$ ")[1:]:
            line, _, output = part.partition("\n")
            yield line, output


def run(line, folder):
    """What a command of the page prints; `sevlab` runs in this process, everything else in a shell."""
    if not line.startswith("sevlab "):
        subprocess.run(["bash", "-c", line], cwd=folder, check=True)
        return ""
    command, _, target = line.partition(" > ")
    words = [
        str(path.relative_to(folder)) if "*" in word else word
        for word in shlex.split(command)[1:]
        for path in (sorted(folder.glob(word)) if "*" in word else [word])
    ]
    result = CliRunner().invoke(cli.root, words)
    output = result.output
    if isinstance(result.exception, cli.SevlabError):
        output += f"sevlab: error: {result.exception}\n"
    if target:
        (folder / target).write_text(output)
        return ""
    return output


@pytest.mark.skipif(sys.platform == "win32", reason="the pages use a POSIX shell")
@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_what_its_commands_print(page, tmp_path, monkeypatch):
    vectors = tmp_path / "tests/data/vectors"
    vectors.parent.mkdir(parents=True)
    vectors.symlink_to(vector_set("launch").parent)
    monkeypatch.chdir(tmp_path)
    found = list(commands(page))
    assert len(found) >= 5
    for line, output in found:
        assert run(line, tmp_path) == output, line
