"""GHCB traffic of a real guest: import, replay against the reference guest, and corrupted requests."""

import json
from functools import cache
from itertools import islice

import pytest
from sevlab.core.events import GuestExit
from sevlab.core.svm import ExitCode
from sevlab.traces.importers.catalogue import open_capture
from sevlab.traces.importers.ghcb_lines import exit_info
from sevlab.traces.importers.log_records import GhcbMsrTraffic, GhcbPageTraffic
from sevlab.traces.replay.ghcb import GhcbReplay

from tests.vectors import capture_set

NAME = "guest-sev-es/linux-6.1-boot.ghcb.jsonl.xz"
SHORT = 400


def entries_of(count=None):
    return islice(open_capture(capture_set(NAME)).entries(), count)


@cache
def short():
    return tuple(entries_of(SHORT))


@pytest.mark.parametrize(
    ("insn", "rdx", "port", "size", "is_in"),
    [
        ("ee", 0x3F8, 0x3F8, 1, 0),
        ("ec", 0x3FD, 0x3FD, 1, 1),
        ("66ed", 0xCFE, 0xCFE, 2, 1),
        ("ef", 0xCF8, 0xCF8, 4, 0),
        ("e680", 0, 0x80, 1, 0),
        ("e564", 9, 0x64, 4, 1),
    ],
)
def test_a_port_access_is_determined_by_its_bytes(insn, rdx, port, size, is_in):
    assert exit_info(ExitCode.IOIO, bytes.fromhex(insn) + b"\x90" * 8, rdx) == port << 16 | size << 4 | is_in


def test_the_first_exchange_has_four_msr_requests():
    first = short()[0]
    assert (first.step.exit_code, first.step.rip) == (ExitCode.CPUID, 0x1001A4C)
    assert [record.request & 0xFFF for record in first.outcome] == [4] * 4
    assert first.outcome[0] == GhcbMsrTraffic(0x8000000000000004, 0x8000001F00000005)


@pytest.mark.slow
def test_the_guests_requests_are_those_of_the_reference_guest():
    tally = GhcbReplay().run(short())
    assert [group.first.text() for group in tally.divergences.values()] == []
    assert tally.total_exchanges == SHORT
    assert not tally.bare
    assert dict(tally.explained) == {"the kernel asks before its GHCB is set up": 1}


@pytest.mark.long
def test_the_whole_boot():
    capture = open_capture(capture_set(NAME))
    tally = GhcbReplay().run(capture.entries())
    assert [group.first.text() for group in tally.divergences.values()] == []
    assert dict(tally.exchanges) == {"ioio": 74_626, "cpuid": 645, "msr": 32, "wbinvd": 3, "dr7_write": 1}
    assert sum(tally.explained.values()) == 2
    assert capture.log.summary()["events"] == {"vc": 75_307, "ghcb": 75_301, "msr": 29}


def damaged(change):
    rows = list(short())
    at = next(n for n, entry in enumerate(rows) if n > 100 and entry.step.exit_code == ExitCode.IOIO)
    page = rows[at].outcome[0]
    assert isinstance(page, GhcbPageTraffic)
    rows[at] = rows[at]._replace(outcome=(change(page),))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0x390, 0x398, 0x3F8, 0x1F8])
def test_a_corrupted_field_of_a_request_is_noticed(offset):
    def change(page):
        qwords = {**dict(page.qwords), offset: dict(page.qwords).get(offset, 0) ^ 0x10}
        return page._replace(qwords=tuple(qwords.items()))

    rows = damaged(change)
    assert any(0x1F8 in dict(record.qwords) for entry in rows for record in entry.outcome if len(record) > 2)
    assert GhcbReplay().run(rows).total_diverged >= 1


@pytest.mark.slow
def test_a_request_too_few_or_too_many_is_noticed():
    rows = list(short())
    assert GhcbReplay().run([rows[0]._replace(outcome=rows[0].outcome[:-1]), *rows[1:5]]).total_diverged == 1
    assert GhcbReplay().run([rows[0]._replace(outcome=(*rows[0].outcome, rows[0].outcome[0]))]).total_diverged == 1


@pytest.mark.parametrize(
    "line",
    ["{}", "[]", '["vc"]', '["vc",1,2,"x","",[],"0",0]', '["ghcb",1,2]', '["no"]', "[[[[[", '["msr",1,"0x0",5,6]'],
)
def test_lines_that_make_no_sense_are_counted(line, tmp_path):
    path = tmp_path / "log.jsonl"
    good = json.dumps(["msr", 1, "0x0", "0x4", "0x5"])
    path.write_text(f"{good}\n{line}\n{good}\n")
    capture = open_capture(path)
    entries = list(capture.entries())
    assert capture.log.summary()["rejected"] == 1
    assert sum(len(entry.outcome) for entry in entries) == 2
    assert not any(isinstance(entry.step, GuestExit) for entry in entries)
