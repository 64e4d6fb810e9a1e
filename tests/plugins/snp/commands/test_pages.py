"""`sevlab show secrets|cpuid-page|rmp`: what they print, what they hide, what they refuse."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from sevlab.core import cli
from sevlab.core.errors import FormatError
from sevlab.plugins.snp.cpuid_table import build_table
from sevlab.plugins.snp.guest_pages import SecretsPage
from sevlab.plugins.snp.layout import RmpEntry


def show(*arguments):
    return CliRunner().invoke(cli.root, ["show", *map(str, arguments)])


@pytest.fixture
def secrets(tmp_path):
    file = tmp_path / "secrets.bin"
    file.write_bytes(SecretsPage.build(format_version=3, vmpck0=b"\xab" * 32, tsc_factor=200))
    return file


def test_secrets_are_shown_without_keys_unless_asked(secrets):
    result = show("secrets", secrets)
    assert result.exit_code == 0
    assert "ab" * 32 not in result.output
    assert "(hidden)" in result.output
    assert "(wiped)" in result.output
    assert "ab" * 32 in show("secrets", secrets, "--keys").output
    assert json.loads(show("secrets", secrets, "--json").output)["tsc_factor"] == 200


def test_a_cut_secrets_page_is_refused(tmp_path):
    file = tmp_path / "cut.bin"
    file.write_bytes(bytes(100))
    assert isinstance(show("secrets", file).exception, FormatError)


def test_a_cpuid_page(tmp_path):
    file = tmp_path / "cpuid.bin"
    file.write_bytes(build_table(((0x8000_001F, 0, (1, 2, 3, 4)), (7, 1, (5, 6, 7, 8))), 4096))
    assert "8000001f" in show("cpuid-page", file).output
    rows = json.loads(show("cpuid-page", file, "--json").output)
    assert [(row["eax_in"], row["ecx_in"], row["edx"]) for row in rows] == [(0x8000_001F, 0, 4), (7, 1, 8)]


@pytest.mark.parametrize("count", [0, 65])
def test_a_cpuid_page_with_an_impossible_count(tmp_path, count):
    file = tmp_path / "cpuid.bin"
    file.write_bytes(count.to_bytes(4, "little") + bytes(4092))
    error = show("cpuid-page", file).exception
    assert isinstance(error, FormatError)
    assert "count" in str(error)


def test_rmp_entries(tmp_path):
    file = tmp_path / "rmp.bin"
    entry = RmpEntry.build(assigned=1, validated=1, asid=5, gpa_page=0x123, vmpl0=0xF, vmsa=1)
    file.write_bytes(bytes(16) + entry)
    result = show("rmp", file, "--first", "0x1000000")
    assert result.exit_code == 0
    assert "000001001000  GUEST_VALID" in result.output
    assert "HYPERVISOR" not in result.output
    assert "HYPERVISOR" in show("rmp", file, "--all").output
    rows = json.loads(show("rmp", file, "--json").output)
    assert [(row["spa"], row["state"], row["asid"]) for row in rows] == [(0x1000, "GUEST_VALID", 5)]


@pytest.mark.parametrize("length", [0, 15, 17])
def test_rmp_needs_whole_entries(tmp_path, length):
    file = tmp_path / "rmp.bin"
    file.write_bytes(bytes(length))
    assert isinstance(show("rmp", file).exception, FormatError)


def test_rmp_needs_a_number_for_its_first_page(tmp_path):
    file = tmp_path / "rmp.bin"
    file.write_bytes(bytes(16))
    assert show("rmp", file, "--first", "x").exit_code == 2
