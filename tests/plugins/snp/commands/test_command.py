"""`sevlab show command` decodes every declared buffer, and says in words what it cannot use."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core import cli
from sevlab.plugins.snp.commands.command import KNOWN


def show(*words):
    return CliRunner().invoke(cli.root, ["show", "command", *words])


@pytest.mark.parametrize("number", KNOWN)
def test_every_command_is_decoded_by_name_and_by_number(number):
    _, declared = KNOWN[number]
    data = bytes(range(declared.buffer_bytes))
    by_name, by_number = (
        show(name, "--hex", data.hex(), "--json") for name in (declared.command.name.lower(), hex(number))
    )
    assert by_name.exit_code == 0
    assert by_name.output == by_number.output
    decoded = json.loads(by_name.output)
    assert [field["name"] for field in decoded["fields"]] == list(declared.buffer.FIELDS if declared.buffer else ())
    for field in decoded["fields"]:
        value = getattr(declared.buffer.from_bytes(data), field["name"])
        assert field["value"] == (value.hex() if isinstance(value, bytes) else value)
    assert show(hex(number)).exit_code == 0


def test_the_list_has_every_command():
    rows = json.loads(show("--json").output)
    assert [row["number"] for row in rows] == [int(number) for number in KNOWN]
    assert len(show().output.splitlines()) == len(KNOWN)


def test_bytes_that_should_be_zero_are_pointed_out():
    problems = json.loads(show("launch_measure", "--hex", "01000000ff" + "00" * 15, "--json").output)["problems"]
    assert problems == ["unnamed bytes from 0x4 are ff000000: expected zero"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nonsense",), "expected a number, or one of INIT"),
        (("0x62",), "expected a number, or one of INIT"),
        (("activate", "--hex", "xyz"), "expected pairs of hexadecimal digits"),
        (("activate", "--hex", "00"), "offset 0x1, ACTIVATE: expected 0x8 bytes, found 0x1 bytes"),
        (("nop", "--hex", "00"), "offset 0x0, NOP: expected 0x0 bytes, found 0x1 bytes"),
    ],
)
def test_what_cannot_be_used_is_explained(words, message):
    result = show(*words)
    assert message in str(result.exception)


def test_a_file_is_read_and_not_mixed_with_digits(tmp_path):
    path = tmp_path / "buffer.bin"
    path.write_bytes(bytes(8))
    assert show("activate", str(path)).exit_code == 0
    assert "found both" in str(show("activate", str(path), "--hex", "00").exception)
    path.write_bytes(bytes(9))
    assert "buffer.bin: offset 0x8" in str(show("activate", str(path)).exception)


@given(st.sampled_from(list(KNOWN)), st.data())
def test_any_bytes_of_the_right_length_are_shown(number, data):
    size = KNOWN[number][1].buffer_bytes
    image = data.draw(st.binary(min_size=size, max_size=size))
    assert show(hex(number), "--hex", image.hex()).exit_code == 0
