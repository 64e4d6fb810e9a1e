"""`sevlab show ghcb|ghcb-msr|vmsa|exitinfo`."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from sevlab.core.errors import ConfigError, FormatError
from sevlab.plugins.sev_es import Ghcb, initial_vmsa
from sevlab.plugins.sev_es.commands import show

from tests.plugins.sev_es.guests import page


def run(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture
def saved(tmp_path):
    def save(data, *, as_hex=False):
        path = tmp_path / "page"
        path.write_bytes(data.hex(" ", 4).encode() if as_hex else data)
        return path

    return save


@pytest.mark.parametrize("as_hex", [False, True])
def test_a_ghcb_request_is_named_field_by_field(saved, as_hex):
    result = run(show.ghcb, saved(page(0x7B, 0x3F8_0210, rax=0x41), as_hex=as_hex))
    assert result.exit_code == 0
    assert "IOIO (0x7b)" in result.output
    assert "OUT port 0x3f8, 1 byte(s)" in result.output
    assert "v 0x1f8         rax" in result.output


def test_stale_fields_are_shown_as_not_valid(saved):
    data = bytearray(page(0x89))
    data[0x1F8] = 7
    result = run(show.ghcb, saved(bytes(data)))
    assert "- 0x1f8         rax" in result.output


def test_each_broken_rule_is_named_and_the_answer_is_no(saved):
    data = bytearray(page(0x72, usage=0, rcx=1))
    data[0x10] = 1
    data[0x3F0] |= 1
    result = run(show.ghcb, saved(bytes(data)), "--json")
    assert result.exit_code == 1
    broken = {row["field"]: row for row in json.loads(result.output)["broken"]}
    assert set(broken) == {"reserved", "valid_bitmap", "rax"}
    assert broken["reserved"]["offset"] == 0x10
    assert "CPUID" in broken["rax"]["expected"]


def test_a_reply_says_what_the_hypervisor_meant(saved):
    data = bytearray(Ghcb.build(sw_exit_info_1=2, sw_exit_info_2=4, protocol_version=2))
    assert "refused: missing input" in run(show.ghcb, saved(bytes(data))).output
    data = Ghcb.build(sw_exit_info_1=1, sw_exit_info_2=0x8000_030D)
    assert "exception, vector 13" in run(show.ghcb, saved(data)).output


@pytest.mark.parametrize("data", [b"", bytes(4095), bytes(4097), b"zz" * 4096])
def test_a_page_of_another_size_names_file_size_and_expectation(saved, data):
    path = saved(data)
    result = run(show.vmsa, path)
    assert isinstance(result.exception, FormatError)
    assert str(path) in str(result.exception)
    assert "4096 bytes of Vmsa" in str(result.exception)


def test_a_file_that_is_not_there_is_named(tmp_path):
    result = run(show.ghcb, tmp_path / "nothing")
    assert result.exit_code == 2
    assert "nothing" in result.output


def test_a_dash_reads_the_standard_input():
    result = CliRunner().invoke(show.ghcb, ["-"], input=page(0x7B, 0x3F8_0210, rax=0x41))
    assert result.exit_code == 0
    assert "OUT port 0x3f8" in result.output


@pytest.mark.parametrize(
    ("value", "words", "code"),
    [("0x2", "sev info request", 0), ("0x2000133000001", "c_bit", 0), ("0x10100", "protocol version range", 0),
     ("0x21100", "PVALIDATE failed (linux)", 0),
     ("0x1d6b02000005", "reserved_29_12", 1), ("4096", "gfn", 0)],
)  # fmt: skip
def test_an_msr_value_is_decoded(value, words, code):
    result = run(show.ghcb_msr, value)
    assert words in result.output
    assert result.exit_code == code


@pytest.mark.parametrize("value", ["", "x", "-1", str(1 << 64), "0x003"])
def test_an_impossible_msr_value_is_named(value):
    assert isinstance(run(show.ghcb_msr, "--", value).exception, ConfigError)


def test_a_vmsa_shows_its_features_and_what_is_reserved(saved):
    result = run(show.vmsa, saved(initial_vmsa(sev_features=0x21)))
    assert result.exit_code == 0
    assert "snp_active, debug_swap" in result.output
    result = run(show.vmsa, saved(initial_vmsa(sev_features=1 << 40)), "--json")
    assert result.exit_code == 1
    assert json.loads(result.output)["broken"][0]["field"] == "sev_features"


@pytest.mark.parametrize(
    ("code", "value", "words"),
    [("ioio", "0x3f80211", "IN port 0x3f8, 1 byte(s)"), ("0x400", "0x100000006", "W, U, FINAL"), ("msr", "1", "WRMSR"),
     ("0x14", hex(1 << 63 | 3), "general register 3"), ("0x27", "6", "general register 6"),
     ("swint", "0x80", "INT 0x80"),
     ("0x4e", "6", "page fault error code 0x6"), ("cpuid", "5", "0x5"), ("event", "0x80000b0d", "vector")],
)  # fmt: skip
def test_exit_information_is_decoded(code, value, words):
    assert words in run(show.exitinfo, code, value).output


def test_reserved_bits_of_ioio_are_named():
    result = run(show.exitinfo, "ioio", hex(0x3F8_0212))
    assert result.exit_code == 1
    assert "expected zero" in result.output
    assert json.loads(run(show.exitinfo, "msr", "0", "--json").output)["meaning"] == "RDMSR"
