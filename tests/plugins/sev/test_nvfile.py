from __future__ import annotations

import pytest
from sevlab.core.errors import FormatError
from sevlab.core.testing import make_machine
from sevlab.plugins.sev import Command, NvFile, Status, sev_state
from sevlab.plugins.sev.nvram import NV_AREA_BYTES


def test_keys_survive_in_the_file_and_change_with_it(tmp_path):
    path = tmp_path / "nvram"
    first = NvFile(make_machine("sev"), path)
    assert first.initialise() == Status.SUCCESS
    made = path.read_bytes()
    assert len(made) == NV_AREA_BYTES
    second = NvFile(make_machine("sev"), path)
    assert second.initialise(es=True) == Status.SUCCESS
    assert sev_state(second.machine).identity.pek == sev_state(first.machine).identity.pek
    assert second.run(Command.PLATFORM_STATUS).buffer.config == 1
    assert path.read_bytes() == made
    for _ in range(2):  # the same seed: its first new key is the one that the first machine made
        second.run(Command.PDH_GEN)
    assert path.read_bytes() != made


def test_a_damaged_file_is_refused_and_erased(tmp_path):
    path = tmp_path / "nvram"
    NvFile(make_machine("sev"), path).initialise()
    data = bytearray(path.read_bytes())
    data[77] ^= 1
    path.write_bytes(data)
    assert NvFile(make_machine("sev"), path).initialise() == Status.SECURE_DATA_INVALID
    assert path.read_bytes() == b"\xff" * NV_AREA_BYTES
    assert NvFile(make_machine("sev"), path).initialise() == Status.SUCCESS


@pytest.mark.parametrize("length", [0, 1, NV_AREA_BYTES - 1, NV_AREA_BYTES + 1])
def test_a_file_of_another_length_is_named_with_what_was_expected(tmp_path, length):
    path = tmp_path / "nvram"
    path.write_bytes(bytes(length))
    with pytest.raises(FormatError, match=f"nvram: offset .*expected 0x8000 bytes, found {length:#x}"):
        NvFile(make_machine("sev"), path).initialise()
