"""What cannot be a guest is said before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from sevlab.core.errors import SevlabError
from sevlab.plugins.engines.commands.run import run
from sevlab.plugins.engines.loaders.elf import HEADER, PROGRAM
from sevlab.plugins.engines.loaders.linux import KNOWN_END, BootParams

X86_64, AARCH64 = 62, 183
MARK = b"Memory Encryption Features active"


def elf(content: bytes, *, machine: int = X86_64, physical: int = 0x10_0000) -> bytes:
    head = HEADER.pack(b"\x7fELF\x02\x01\x01" + bytes(9), 2, machine, 1, physical, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    program = PROGRAM.pack(1, 7, 64 + 56, physical, physical, len(content), len(content), 4096)
    return head + program + content


def bzimage(**fields: int) -> bytes:
    values = {"setup_sects": 4, "boot_flag": 0xAA55, "header": 0x5372_6448, "version": 0x20F, "xloadflags": 1}
    head = bytearray(BootParams.build(**values | fields)[:KNOWN_END])
    head[0x201] = 0x66
    return bytes(head) + bytes(8192)


def refusal(tmp_path: Path, data: bytes, *arguments: str) -> str:
    program = tmp_path / "guest"
    program.write_bytes(data)
    result = CliRunner().invoke(run, [str(program), *arguments])
    assert isinstance(result.exception, SevlabError)
    assert not result.output
    return str(result.exception)


@pytest.mark.parametrize("feature", ["sev", "sev-es"])
def test_a_kernel_that_knows_no_encryption_does_not_start_encrypted(tmp_path, feature):
    said = refusal(tmp_path, elf(b"\xf4 Linux version 6.1"), "--feature", feature)
    assert "built without CONFIG_AMD_MEM_ENCRYPT" in said


def test_a_kernel_that_knows_it_starts(tmp_path):
    program = tmp_path / "vmlinux"
    program.write_bytes(elf(b"\xfa\xf4 Linux version 6.1 " + MARK))
    result = CliRunner().invoke(run, [str(program), "--feature", "sev"])
    assert result.exit_code == 0
    assert "halted: interrupts are off" in result.output


def test_another_architecture_is_named(tmp_path):
    assert "expected 62 (x86-64), found 183" in refusal(tmp_path, elf(b"\xf4", machine=AARCH64))


def test_a_kernel_of_32_bits_is_named(tmp_path):
    assert "a 64-bit kernel" in refusal(tmp_path, bzimage(xloadflags=0))


def test_a_kernel_of_an_old_boot_protocol_is_named(tmp_path):
    assert "2.12 or newer" in refusal(tmp_path, bzimage(version=0x20B))


def test_a_kernel_that_is_cut_off_is_named(tmp_path):
    assert "found" in refusal(tmp_path, bzimage(payload_offset=0x1000, payload_length=0x10_0000))


def test_a_kernel_that_does_not_fit_asks_for_memory(tmp_path):
    wanted = bzimage(pref_address=0x100_0000, init_size=64 << 20, cmdline_size=255)
    assert "raise --memory" in refusal(tmp_path, wanted, "--memory", "64 MiB")
    assert "raise --memory" in refusal(tmp_path, elf(b"\xf4", physical=0x100_0000), "--memory", "16 MiB")


def test_a_command_line_that_the_kernel_does_not_take_is_named(tmp_path):
    kernel = bzimage(pref_address=0x100_0000, init_size=1 << 20, cmdline_size=16)
    assert "the kernel takes 16" in refusal(tmp_path, kernel, "--append", "console=ttyS0 and more")


def test_a_segment_outside_the_file_is_named(tmp_path):
    assert "inside the file" in refusal(tmp_path, elf(b"\xf4" * 64)[:-32])
