"""A replay that was stopped goes on where it was, and counts as if it had not been."""

from shutil import copyfile

import pytest
from sevlab.core.errors import TraceFormatError
from sevlab.traces.importers.catalogue import open_capture
from sevlab.traces.replay import engine
from sevlab.traces.replay.files import Choice, open_entries, replay_file
from sevlab.traces.replay.progress import progress_path
from sevlab.traces.writer import TraceWriter

from tests.vectors import capture_set

pytestmark = pytest.mark.slow
TINY = "kvm-svm-tiny.trace.txt.xz"


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "KEEP_EVERY", 1000)
    path = tmp_path / TINY
    copyfile(capture_set(TINY), path)
    return path


@pytest.fixture
def stopped(log):
    """A log, and a trace of it, whose replay was stopped after 2500 exchanges: the state after 2000 is kept."""
    capture = open_capture(log)
    trace = log.with_name("log.sevtrace")
    with TraceWriter(trace, capture.header) as writer:
        for entry in capture.entries():
            writer.append(entry)
    for path in (log, trace):
        replay_file(path, Choice(resume=True, until=2500))
        assert progress_path(path).exists()
    return log, trace


def test_the_result_is_that_of_a_replay_at_once(stopped, monkeypatch):
    whole = replay_file(stopped[0], Choice()).document()
    applied = []
    exchange = engine.Replay.exchange
    monkeypatch.setattr(engine.Replay, "exchange", lambda self, *rest: applied.append(1) or exchange(self, *rest))
    for path in stopped:
        applied.clear()
        assert replay_file(path, Choice(resume=True)).document() == whole
        assert len(applied) == whole["total"]["exchanges"] - 2000
        assert not progress_path(path).exists()


def test_other_options_another_log_and_damage_are_refused(stopped):
    path = progress_path(stopped[0])
    with pytest.raises(TraceFormatError, match="of another log or other options"):
        replay_file(stopped[0], Choice(resume=True, start=5))
    data = path.read_bytes()
    for damaged in (b"", data[:-1], data[: len(data) // 2], b"\x80", b"\xc0", data.replace(b"sevlab", b"severe")):
        path.write_bytes(damaged)
        with pytest.raises(TraceFormatError, match="remove it to begin anew"):
            replay_file(stopped[0], Choice(resume=True))


def test_without_the_option_nothing_is_written_beside_the_log(log):
    replay_file(log, Choice(until=1500))
    assert [path.name for path in log.parent.iterdir()] == [log.name]


def test_a_trace_is_closed_behind_its_use(stopped):
    with open_entries(stopped[1]) as opened:
        assert sum(1 for _ in opened.entries) > 3000
    assert opened.entries._file.closed
