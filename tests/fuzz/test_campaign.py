from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from sevlab.core.cli import root
from sevlab.core.errors import CampaignError
from sevlab.core.oracle import Finding
from sevlab.fuzz.campaign import Plan, prepare
from sevlab.fuzz.corpus import minimal
from sevlab.fuzz.runner import Runner
from sevlab.fuzz.seeds import seeds_of_file
from sevlab.fuzz.setup import Setup
from sevlab.fuzz.store import FILE, Store, identity_of
from sevlab.fuzz.targets import target_named
from sevlab.fuzz.triage import Triage, findings_of, smallest, trace_path, write_trace
from sevlab.fuzz.worker import Worker
from sevlab.plugins.sev_es import Ghcb, Vmgexit
from sevlab.plugins.sev_es.fuzzing import GHCB_GPA
from sevlab.traces.reader import TraceReader
from sevlab.traces.replay_recorded import replay_recorded

from tests.fuzz import faulty
from tests.fuzz.endurance import endure

GIVEN = {"faulty": faulty}
FAULTY = Setup(given=("faulty=tests.fuzz.faulty",))
BAD = Vmgexit(0, GHCB_GPA, Ghcb.build(sw_exit_code=0x89, sw_exit_info_1=0, sw_exit_info_2=0x31))
GOOD = Vmgexit(0, GHCB_GPA, Ghcb.build(sw_exit_code=0x72, sw_exit_info_1=0, sw_exit_info_2=0, rax=0, rcx=0))


def command(*arguments):
    return CliRunner().invoke(root, ["fuzz", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def runner():
    return Runner(target_named("ghcb"), given=GIVEN)


@pytest.fixture
def store(tmp_path, runner):
    store = Store(tmp_path / "campaign", create=True)
    FAULTY.keep(store)
    finding = runner.run((GOOD, GOOD, BAD, GOOD)).findings[0]
    assert store.add_finding("ghcb", finding, runner.codec.encode((GOOD, GOOD, BAD, GOOD)), flaky=False)
    return store


def test_a_finding_is_known_by_oracle_rule_handler_and_state():
    one = Finding("o", "r", "m", "h", "s")
    assert identity_of(one) == identity_of(one._replace(message="other"))
    changed = [one._replace(**{name: "x"}) for name in ("oracle", "rule", "handler", "state")]
    assert len({identity_of(finding) for finding in (one, *changed)}) == 5


def test_a_finding_seen_again_is_counted(store, runner):
    finding = runner.run((BAD,)).findings[0]
    assert not store.add_finding("ghcb", finding, b"x", flaky=False)
    assert [stored.seen for stored in store.findings()] == [2]


def test_triage_leaves_one_simple_step_and_a_trace_that_replays(store, runner):
    work = Triage(store)
    (stored,) = work.all()
    (step,) = runner.codec.decode(stored.minimised)
    assert Ghcb.from_bytes(step.page.ljust(4096, b"\0")).sw_exit_code == 0x89
    path = trace_path(store, stored)
    with TraceReader(path) as reader:
        assert not replay_recorded(reader, given=GIVEN).divergences
    with TraceReader(path) as reader:
        assert any("buffer.bounds" in str(entry.outcome) for entry in reader)
    lines = "\n".join(work.story(stored))
    assert "buffer.bounds" in lines
    assert "sw_exit_code=0x89" in lines
    assert "rule: A handler never leaves a checked buffer" in lines
    assert " instead of " in lines  # what a correct machine answers


def test_a_foreign_or_newer_directory_is_refused_and_left_alone(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    with pytest.raises(CampaignError, match="not empty and no campaign"):
        Store(foreign, create=True)
    with pytest.raises(CampaignError, match="no campaign here"):
        Store(tmp_path / "nothing")
    newer = Store(tmp_path / "newer", create=True)
    newer.set_meta("version", 99)
    newer.close()
    with pytest.raises(CampaignError, match="version 99, expected 1"):
        Store(tmp_path / "newer")
    (foreign / FILE).write_bytes(b"not a database, but a text that is long enough to be read as one" * 20)
    with pytest.raises(CampaignError, match="not a campaign"):
        Store(foreign)
    assert (foreign / "mine.txt").read_text() == "mine"


def test_a_campaign_goes_on_with_the_plugins_and_options_that_it_began_with(store):
    prepare(store.folder, Plan(targets=("ghcb",), setup=FAULTY), fresh=False)
    with pytest.raises(CampaignError, match=r"began with --given faulty=.*cannot go on with --set seeded.bugs=S07"):
        prepare(store.folder, Plan(targets=("ghcb",), setup=Setup(settings=("seeded.bugs=S07",))), fresh=False)


def test_a_fresh_campaign_does_not_touch_one_that_is_there(store):
    with pytest.raises(CampaignError, match="there is a campaign here"):
        prepare(store.folder, Plan(targets=("ghcb",)), fresh=True)
    prepare(store.folder, Plan(targets=("ghcb",)), fresh=False)
    assert len(store.findings()) == 1
    assert len(store.inputs("ghcb")) > 20


def test_a_corpus_is_minimal_when_each_input_reaches_something(runner):
    data = [runner.codec.encode(steps) for steps in ((GOOD,), (GOOD, GOOD), (BAD,))]
    fresh = Runner(target_named("ghcb"))
    kept = minimal(fresh, data)
    assert data[1] not in kept
    assert data[0] in kept


def test_a_recorded_trace_is_seeds_and_another_file_is_an_input(tmp_path, runner):
    path = tmp_path / "x.sevtrace"
    write_trace(runner, (GOOD, GOOD), path)
    assert [runner.codec.decode(data)[-2:] for data in seeds_of_file(path, runner)][-1] == (GOOD, GOOD)
    other = tmp_path / "crash-1"
    other.write_bytes(b"abc")
    assert list(seeds_of_file(other, runner)) == [b"abc"]


def test_minimisation_of_forty_steps_ends_in_time(runner):
    started = time.monotonic()
    steps = smallest(runner, (*[GOOD] * 20, BAD, *[GOOD] * 19), "invariant", "buffer.bounds")
    assert time.monotonic() - started < 8
    assert len(steps) == 1
    assert findings_of(runner, steps)


@pytest.mark.slow
def test_a_campaign_finds_tells_and_exports_a_fault(tmp_path):
    folder = tmp_path / "c"
    given = ("--given", "faulty=tests.fuzz.faulty", "--engine", "builtin", "--seconds", 0, "--runs", 600)
    result = command("run", "ghcb", "--campaign", folder, *given)
    assert result.exit_code == 1, result.output
    assert "invariant: buffer.bounds" in result.output
    listed = command("triage", folder)
    assert "reproduce: sevlab replay" in listed.output
    identity = Store(folder).findings()[0].identity
    assert command("export", folder, identity, "-o", tmp_path / "t.py").exit_code == 0
    assert json.loads(command("status", folder, "--json").output)["targets"]["ghcb"]["inputs"] == 600
    assert "minimised" in command("triage", folder, "--json").output
    smaller = command("minimise", folder, identity[:6], "--seconds", 1)
    assert "1 before, 1 now" in smaller.output
    covered = command("cover", folder, "--html", tmp_path / "c.html", "--json")
    document = json.loads(covered.output)
    assert document["surface"]["totals"]["messages"][0] > 20
    assert any(
        row["module"].endswith("sev_es.events") and row["lines"] > len(row["not_run"]) for row in document["code"]
    )
    assert "Code of the handlers" in (tmp_path / "c.html").read_text()
    assert "messages: " in command("cover", folder, "--no-code").output
    before = len(Store(folder).inputs("ghcb"))
    assert command("corpus", "minimise", folder, "ghcb").exit_code == 0
    assert 0 < len(Store(folder).inputs("ghcb")) <= before


@pytest.mark.slow
def test_the_same_seed_gives_the_same_corpus_and_the_same_findings_twice(tmp_path):
    kept = []
    limits = ("--engine", "builtin", "--seconds", 0, "--runs", 400, "--set", "seeded.bugs=S07")
    for name in ("one", "two"):
        command("run", "ghcb", "--campaign", tmp_path / name, *limits)
        store = Store(tmp_path / name)
        found = [(stored.identity, stored.data, stored.seen, stored.flaky) for stored in store.findings()]
        kept.append((store.inputs("ghcb"), found))
    assert kept[0] == kept[1]
    assert len(kept[0][0]) > 50
    assert kept[0][1]


@pytest.mark.slow
def test_a_killed_campaign_keeps_what_it_found_and_goes_on(tmp_path):
    arguments = [sys.executable, "-m", "sevlab.fuzz.worker", str(tmp_path / "c"), "ghcb", "0"]
    options = {"engine": "builtin", "seed": 1, "seconds": 60, "runs": 0}
    prepare(tmp_path / "c", Plan(targets=("ghcb",), setup=FAULTY), fresh=True).close()
    process = subprocess.Popen([*arguments, json.dumps(options)])
    store = Store(tmp_path / "c")
    deadline = time.monotonic() + 40
    while not store.findings() and time.monotonic() < deadline:
        time.sleep(0.1)
    shown = store.findings()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert shown
    with sqlite3.connect(tmp_path / "c" / FILE) as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    found = {stored.identity for stored in Store(tmp_path / "c").findings()}
    assert {stored.identity for stored in shown} <= found


@pytest.mark.long
def test_atheris_workers_find_a_fault(tmp_path):
    pytest.importorskip("atheris")
    given = ("--given", "faulty=tests.fuzz.faulty", "--engine", "atheris", "--seconds", 25, "--workers", 2)
    result = command("run", "ghcb", "--campaign", tmp_path / "c", *given)
    assert result.exit_code == 1, result.output
    assert "buffer.bounds" in result.output


@pytest.mark.long
def test_a_campaign_under_attack_loses_nothing(tmp_path):
    campaign = endure(tmp_path / "c", seconds=120, every=8)
    assert campaign.shown
    assert campaign.killed >= 3


def test_what_is_found_again_is_counted_at_the_next_report(store, runner):
    worker = Worker(store, runner, 0)
    finding = runner.run((BAD,)).findings[0]
    other = finding._replace(rule="other")
    for _ in range(3):
        worker._keep((BAD,), (other,))
    assert [stored.seen for stored in store.findings()] == [1, 1]
    worker.report()
    assert {stored.rule: stored.seen for stored in store.findings()} == {finding.rule: 1, "other": 3}


def test_a_full_disk_is_said_and_what_was_written_stays(store):
    before = store.inputs("ghcb")
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(CampaignError, match=r"campaign\.sqlite: database or disk is full; what was written before is"):
        store.add_input("ghcb", bytes(1 << 20))
    assert store.inputs("ghcb") == before
    assert store.sound()
