from __future__ import annotations

import lzma

import pytest
from click.testing import CliRunner
from sevlab.core.cli import root
from sevlab.core.events import GuestExit
from sevlab.fuzz.runner import Runner
from sevlab.fuzz.seeds import at_home, seeds_of_file, stimuli
from sevlab.fuzz.targets import target_named
from sevlab.plugins.sev_es import Ghcb, Vmgexit
from sevlab.plugins.sev_es.fuzzing import GHCB_GPA
from sevlab.traces.importers.log_records import GhcbMsrTraffic, GhcbPageTraffic
from sevlab.traces.schema import Entry

from tests.vectors import ROOT

ELSEWHERE = 0x420_2000
LINES = 3000
BOOT = ROOT / "tests/data/captures/guest-sev-es/linux-6.1-boot.ghcb.jsonl.xz"
CCP = ROOT / "tests/data/logs/ccp.txt"


@pytest.fixture(scope="module")
def runner():
    return Runner(target_named("ghcb"))


def reached(runner, files):
    """Coordinates that a target's own seeds reach, and those that the files add."""
    for steps in runner.seeds():
        runner.run(steps, learn=True)
    before = len(runner.feedback.reached)
    findings = [finding for path in files for data in seeds_of_file(path, runner)
                for finding in runner.run_bytes(data).findings]  # fmt: skip
    assert findings == []
    return before, len(runner.feedback.reached) - before


def test_what_a_guest_sent_its_hypervisor_is_sent_again():
    page = Ghcb.build(sw_exit_code=0x72, rax=7, rcx=0, sw_scratch=ELSEWHERE + 0x800)
    qwords = tuple(
        (offset, number)
        for offset in range(0, 4096, 8)
        if (number := int.from_bytes(page[offset : offset + 8], "little"))
    )
    traffic = GhcbPageTraffic(ELSEWHERE, qwords, 2, 0, b"data", (), b"")
    step = GuestExit(*(field.type() for field in GuestExit.SPEC.fields))
    sent = list(stimuli(Entry(0, 0, step, (GhcbMsrTraffic(2, 3), traffic))))
    assert sent[:2] == [step, Vmgexit(0, 2, b"")]
    image = Ghcb.from_bytes(sent[2].page)
    assert sent[2].ghcb_msr == ELSEWHERE
    assert (image.sw_exit_code, image.rax, image.protocol_version) == (0x72, 7, 2)
    assert sent[2].page[0x800:0x804] == b"data"


def test_a_message_from_elsewhere_lies_where_the_targets_guest_has_it(runner):
    page = Ghcb.build(sw_exit_code=0x7B, sw_exit_info_1=ELSEWHERE - 1, sw_scratch=ELSEWHERE + 0x800)
    moved = at_home(runner, Vmgexit(0, ELSEWHERE, page))
    assert moved.ghcb_msr == GHCB_GPA
    image = Ghcb.from_bytes(moved.page)
    assert (image.sw_scratch, image.sw_exit_info_1) == (GHCB_GPA + 0x800, ELSEWHERE - 1)
    assert at_home(runner, Vmgexit(0, 2, b"")) == Vmgexit(0, 2, b"")


@pytest.mark.slow
def test_the_boot_of_a_real_linux_raises_what_is_reached_at_the_start(runner, tmp_path):
    log, trace = tmp_path / "boot.ghcb.jsonl", tmp_path / "boot.sevtrace"
    with lzma.open(BOOT, "rt") as lines:
        log.write_text("".join(line for _, line in zip(range(LINES), lines, strict=False)))
    imported(log, trace)
    before, more = reached(runner, [trace])
    assert before > 100
    assert more > 10


@pytest.mark.slow
def test_a_recorded_session_of_the_ccp_driver_raises_what_is_reached_at_the_start(tmp_path):
    trace = tmp_path / "ccp.sevtrace"
    imported(CCP, trace)
    for name, least in (("sev.commands", 5), ("snp.commands", 20)):
        assert reached(Runner(target_named(name)), [trace])[1] > least


def imported(log, trace):
    result = CliRunner().invoke(root, ["import", str(log), "-o", str(trace)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
