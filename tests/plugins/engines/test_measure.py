"""`sevlab measure guest`: the digest that `sevlab run` prints, from the files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sevlab.core.cli import root
from sevlab.core.errors import ConfigError


def sevlab(*arguments: str | Path) -> Result:
    return CliRunner().invoke(root, [str(argument) for argument in arguments])


@pytest.mark.parametrize("paging", ["own", "nested"])
@pytest.mark.parametrize("feature", ["sev", "sev-es"])
def test_both_commands_name_the_same_digest(flat_elf, feature, paging):
    options = ["--feature", feature, "--memory", "16 MiB", "--engine-paging", paging]
    measured = sevlab("measure", "guest", flat_elf, *options).stdout.strip()
    run = json.loads(sevlab("run", flat_elf, *options, "--json").stdout)
    assert measured == run["launch_digest"]
    assert len(measured) == 64


def test_a_changed_byte_is_found_in_its_page(flat_elf, tmp_path):
    changed = tmp_path / "changed.elf"
    changed.write_bytes(flat_elf.read_bytes().replace(b"rep outsb:", b"rep outsB:"))
    files = []
    for name, program in (("a", flat_elf), ("b", changed)):
        listed = sevlab("measure", "guest", program, "--feature", "sev-es", "--memory", "16 MiB", "--json")
        files.append(tmp_path / name)
        files[-1].write_text(listed.stdout)
    result = sevlab("measure", "diff", *files)
    assert result.exit_code == 1
    assert [line.split()[2] for line in result.stdout.splitlines() if line.startswith("  page")] == ["0x100000"]
    assert sevlab("measure", "diff", files[0], files[0]).exit_code == 0


def test_a_plain_guest_has_no_digest(flat_elf):
    assert isinstance(sevlab("measure", "guest", flat_elf).exception, ConfigError)
