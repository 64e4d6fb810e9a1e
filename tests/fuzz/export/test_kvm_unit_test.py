from __future__ import annotations

import shutil
import subprocess

import pytest
from sevlab.fuzz.export import export
from sevlab.plugins.sev_es import Vmgexit
from sevlab.traces.reader import TraceReader
from sevlab.traces.record import Recorder

from tests.plugins.sev_es.guests import GHCB_GPA, encrypted_machine

GCC = shutil.which("gcc")
needs_gcc = pytest.mark.skipif(GCC is None, reason="no gcc on this machine")
STRICT = ("-std=gnu99", "-Wall", "-Wextra", "-Werror")


@pytest.fixture(scope="module")
def text(finding, given):
    return export(finding, "kvm-unit-test", given=given)


def compiled(text, folder, *flags):
    (folder / "test.c").write_text(text)
    subprocess.run([GCC, *STRICT, *flags, "-o", folder / "test", folder / "test.c"], check=True)
    return subprocess.run([folder / "test"], check=True, capture_output=True).stdout


@needs_gcc
def test_the_pages_that_it_makes_are_ours(text, finding, tmp_path):
    with TraceReader(finding) as reader:
        steps = [entry.step for entry in reader if isinstance(entry.step, Vmgexit)]
    expected = b"".join(step.ghcb_msr.to_bytes(8, "little") + step.page.ljust(4096, b"\0") for step in steps)
    assert len(steps) == 4
    assert compiled(text, tmp_path) == expected


@needs_gcc
def test_a_finding_without_a_vmgexit_compiles_too(tmp_path):
    machine = encrypted_machine()
    with Recorder(machine, tmp_path / "empty.sevtrace") as recorder:
        recorder.end()
        machine.apply(Vmgexit(0, GHCB_GPA, bytes(5000)))  # longer than a page: no GHCB
    assert compiled(export(tmp_path / "empty.sevtrace", "kvm-unit-test"), tmp_path) == b""


@needs_gcc
def test_the_half_for_kvm_unit_tests_compiles_against_its_interface(text, tmp_path):
    (tmp_path / "libcflat.h").write_text(
        "extern void report(_Bool pass, const char *format, ...) __attribute__((format(printf, 2, 3)));\n"
        "extern void report_info(const char *format, ...) __attribute__((format(printf, 1, 2)));\n"
        "extern int report_summary(void);\n"
    )
    (tmp_path / "test.c").write_text(text)
    subprocess.run([GCC, *STRICT, "-ffreestanding", "-I", tmp_path, "-c", "-o", tmp_path / "test.o",
                    tmp_path / "test.c"], check=True)  # fmt: skip


def test_an_address_in_the_ghcb_moves_with_it(text):
    assert "0x3a8, 8, ghcb_gpa + 0x840); /* sw_scratch */" in text
    assert "return ghcb_gpa;" in text


def test_what_no_guest_can_do_is_said(text):
    assert "Not here: the state that the trace sets" in text


def test_a_message_cannot_end_the_comment(text):
    head = text[: text.index("#include")]
    assert head.count("*/") == 1
    assert "buffer.bounds" in head
