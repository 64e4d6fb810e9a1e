from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core import events as ev
from sevlab.core.config import GuestConfig
from sevlab.core.errors import ConfigError, InvariantViolation, PluginError, TraceFormatError
from sevlab.core.hookspecs import hookimpl
from sevlab.core.machine import Machine
from sevlab.core.oracle import Finding, OracleSink
from sevlab.core.pages import PageImage
from sevlab.core.testing import make_machine, step_strategy
from sevlab.traces.machine_state import pack_pages, pack_snapshot, unpack_snapshot
from sevlab.traces.reader import TraceReader
from sevlab.traces.record import Recorder, recording
from sevlab.traces.records import End, Found, Mark, Pages, Reset, State, Unwritable, Violation
from sevlab.traces.replay_recorded import machine_of, perform, replay_recorded
from sevlab.traces.schema import vocabulary_of

VOCABULARY = make_machine("sme", "io").vocabulary
GUESTS = (GuestConfig(name="a", vcpus=2), GuestConfig(name="b"))
SYSCFG = 0xC001_0010


def replay(file, **kwargs):
    given = kwargs.get("given")
    reader = TraceReader(file, vocabulary=vocabulary_of(("sme", "io"), given))
    return reader, replay_recorded(reader, **kwargs)


actions = st.one_of(
    step_strategy(VOCABULARY),
    step_strategy(VOCABULARY),
    st.sampled_from(["reset", "mark", "poke", "restore", "guest"]),
)


def act(machine: Machine, action, saved) -> None:
    if action == "reset":
        machine.reset()
    elif action == "mark":
        machine.mark()
    elif action == "poke":
        machine.vcpus[0].regs.rax += 7
    elif action == "restore":
        machine.restore(saved)
    elif action == "guest":
        machine.create_guest(GuestConfig(name=f"late{len(machine.vcpus)}"))
    else:
        machine.apply(action)


@given(st.lists(actions, max_size=10), st.lists(actions, max_size=3))
def test_whatever_is_done_to_a_machine_replays_without_divergence(done, before):
    machine = make_machine("sme", "io", guests=GUESTS, memory_bytes=128 << 20)
    saved = machine.snapshot()
    for action in before:
        act(machine, action, saved)
    file = io.BytesIO()
    with Recorder(machine, file) as recorder:
        for action in done:
            act(machine, action, saved)
        wanted = machine.snapshot()
        machine.apply(ev.HostCpuid(0x8000_001F, 0))  # state set after the last step is state that no step saw
    _, result = replay(file)
    assert result.divergences == ()
    assert result.entries == recorder.entries
    assert "apply" not in vars(machine)
    assert wanted == machine.snapshot()


def test_a_changed_outcome_is_a_divergence():
    machine = make_machine("sme", "io", guests=GUESTS)
    file = io.BytesIO()
    with Recorder(machine, file):
        machine.apply(ev.MemoryWrite(1, 0, 0, 0x1000, False, b"secret"))
        machine.apply(ev.MemoryRead(1, 0, 0, 0x1000, False, 6))
    reader = TraceReader(file)
    entries = list(reader)
    entries[1] = entries[1]._replace(outcome=(ev.Data(b"secreT"),))
    reader.numbered = lambda *_: iter(enumerate(entries))
    result = replay_recorded(reader)
    assert [str(item) for item in result.divergences] == [
        "entry 1: record 0, data.data: expected 736563726554, found 736563726574"
    ]
    entries[1] = entries[1]._replace(outcome=(ev.Data(b"secret"), ev.Done()))
    assert str(replay_recorded(reader).divergences[0]) == "entry 1: record 1: expected done(), found nothing"


def test_only_until_and_stop_at_first_limit_the_replay_of_a_recording():
    machine = make_machine("sme", "io", guests=GUESTS)
    file = io.BytesIO()
    with Recorder(machine, file):
        for _ in range(3):
            machine.apply(ev.MemoryWrite(1, 0, 0, 0x1000, False, b"secret"))
            machine.apply(ev.MemoryRead(1, 0, 0, 0x1000, False, 6))
    reader = TraceReader(file)
    entries = [entry._replace(outcome=(ev.Data(b"no"),)) if n % 2 else entry for n, entry in enumerate(reader)]
    reader.numbered = lambda first, until: iter(list(enumerate(entries))[first:until])
    assert len(replay_recorded(reader).divergences) == 3
    assert replay_recorded(reader, stop_at_first=True)[:2] == (2, 2)
    assert replay_recorded(reader, until=3)[:2] == (3, 3)
    assert len(replay_recorded(reader, only=frozenset(("read",))).divergences) == 3
    assert not replay_recorded(reader, only=frozenset(("write",))).divergences
    assert replay_recorded(reader, only=frozenset(("write",))).entries == 6


class Breaking:
    """A plugin whose handler of `advance` breaks an invariant at 7 ticks and a Python rule at 8."""

    REQUIRES = ()

    @staticmethod
    @hookimpl
    def sevlab_register(builder):
        def make(original):
            def handler(machine, step):
                original(machine, step)
                if step.ticks == 7:
                    raise InvariantViolation("clock.seven", "seven ticks")
                if step.ticks == 8:
                    raise KeyError("eight")

            return handler

        builder.steps.replace(ev.AdvanceClock, make)


class LateClock:
    name = "late-clock"
    documentation = "time passes"

    def step_end(self, machine, step, outcome):
        return (Finding(self.name, "late", f"{machine.clock.tsc}"),) if machine.clock.tsc == 5 else ()

    def sequence_end(self, machine):
        return (Finding(self.name, "end", "over"),)


def test_what_leaves_the_machine_is_recorded_and_happens_again():
    machine = make_machine("sme", given={"breaking": Breaking})
    file = io.BytesIO()
    with Recorder(machine, file):
        machine.apply(ev.AdvanceClock(1))
        with pytest.raises(InvariantViolation):
            machine.apply(ev.AdvanceClock(7))
        with pytest.raises(KeyError):
            machine.apply(ev.AdvanceClock(8))
        machine.apply(ev.AdvanceClock(2))
    reader, result = replay(file, given={"breaking": Breaking})
    assert result.divergences == ()
    assert [entry.outcome[0] for entry in reader][1:3] == [
        Violation("clock.seven", "clock.seven: seven ticks"),
        Violation("KeyError", "'eight'"),
    ]
    with pytest.raises(PluginError, match="no plugin 'breaking'"):
        replay(file)


def test_findings_are_recorded_and_found_again():
    machine = make_machine("sme", given={"breaking": Breaking})
    machine.sink = OracleSink((LateClock(),))
    file = io.BytesIO()
    with Recorder(machine, file) as recorder:
        machine.apply(ev.AdvanceClock(5))
        machine.reset()
        machine.apply(ev.AdvanceClock(7))
        machine.apply(ev.AdvanceClock(1))
        recorder.end()
    reader, result = replay(file, given={"breaking": Breaking}, oracles=(LateClock(),))
    assert result.divergences == ()
    steps = [type(entry.step) for entry in reader]
    assert steps == [ev.AdvanceClock, Reset, ev.AdvanceClock, ev.AdvanceClock, End]
    entries = list(reader)
    assert entries[0].outcome[-1] == Found("late-clock", "late", "5", "", "")
    assert entries[2].outcome[-1] == Found("invariant", "clock.seven", "seven ticks", "advance", "")
    assert entries[4].outcome == (Found("late-clock", "end", "over", "", ""),)
    with pytest.raises(ConfigError, match="oracle 'late-clock'"):
        replay(file, given={"breaking": Breaking})


def test_state_from_elsewhere_is_a_record_of_its_own():
    machine = make_machine("sme", guests=1)
    file = io.BytesIO()
    with Recorder(machine, file):
        machine.apply(ev.AdvanceClock(1))
        machine.vcpus[0].regs.rip = 0x1234
        machine.apply(ev.AdvanceClock(1))
        machine.mark()
        machine.apply(ev.AdvanceClock(1))
        machine.reset()
    kinds = [type(entry.step) for entry in TraceReader(file)]
    assert kinds == [ev.AdvanceClock, State, ev.AdvanceClock, Mark, ev.AdvanceClock, Reset]


def test_a_step_that_no_trace_can_hold_is_named_and_its_effect_kept():
    machine = make_machine("sme", guests=1)
    file = io.BytesIO()
    with Recorder(machine, file):
        machine.apply(ev.SetRegisters(0, (("rax", 1 << 64),)))
        machine.apply(ev.AspRegisterWrite(0, 1 << 70))
        machine.apply(ev.AdvanceClock(1))
    reader, result = replay(file)
    assert result.divergences == ()
    entries = list(reader)
    assert type(entries[0].step) is Unwritable
    assert "registers holds" in entries[0].step.reason


def test_a_machine_that_nothing_is_done_to_leaves_no_file(tmp_path: Path):
    with recording(tmp_path / "a") as paths:
        make_machine("sme")
    assert paths == []
    assert list((tmp_path / "a").iterdir()) == []


def test_machines_made_out_of_sight_are_recorded(tmp_path: Path):
    with recording(tmp_path) as paths:
        for ticks in (1, 2):
            make_machine("sme").apply(ev.AdvanceClock(ticks))
    make_machine("sme").apply(ev.AdvanceClock(3))
    assert [path.name for path in paths] == ["machine-1.sevtrace", "machine-2.sevtrace"]
    for ticks, path in enumerate(paths, 1):
        with TraceReader(path) as reader:
            assert [entry.step for entry in reader] == [ev.AdvanceClock(ticks)]
            assert replay_recorded(reader).divergences == ()


def test_a_recording_with_a_gap_is_not_replayed_past_it():
    machine = make_machine("sme")
    file = io.BytesIO()
    recorder = Recorder(machine, file)
    for ticks in range(3):
        machine.apply(ev.AdvanceClock(ticks))
        recorder._writer.flush()
    recorder.close()
    data = bytearray(file.getvalue())
    data[TraceReader(file).index.blocks[1].offset + 20] ^= 1
    with pytest.raises(TraceFormatError, match="entries 1 to 1 are lost"):
        replay(io.BytesIO(bytes(data)))
    assert replay(io.BytesIO(bytes(data)), until=1)[1].entries == 1


def test_a_snapshot_survives_its_bytes():
    machine = make_machine("sme", "io", guests=GUESTS, caches=True)
    machine.apply(ev.HostMsr(SYSCFG, True, 1 << 23))
    machine.apply(ev.MemoryWrite(1, 0, 0, 0x5000, True, b"x" * 5000))
    snapshot = machine.snapshot()
    assert unpack_snapshot(pack_snapshot(snapshot)) == snapshot


def test_a_snapshot_packs_only_what_changed():
    machine = make_machine("sme", "io", guests=GUESTS)
    before = machine.snapshot()
    machine.vcpus[0].regs.rax = 5
    after = machine.snapshot()
    part = pack_snapshot(after, before)
    assert unpack_snapshot(part, before) == after
    assert len(part) < 2000
    machine.create_guest(GuestConfig(name="c"))
    grown = machine.snapshot()
    assert unpack_snapshot(pack_snapshot(grown, before), before) == grown
    assert unpack_snapshot(pack_snapshot(before, grown), grown) == before
    assert unpack_snapshot(pack_snapshot(after, after), after) == after
    with pytest.raises(TraceFormatError, match="keeps a part that the machine does not have"):
        unpack_snapshot(part)


class Sum:
    """A value of a plugin that msgpack does not carry; a fresh one is known by its class alone."""

    def __init__(self, total=0):
        self.total = total

    def __eq__(self, other):
        return isinstance(other, Sum) and self.total == other.total

    def __hash__(self):
        return self.total


@pytest.mark.parametrize("total", [0, 1])
def test_a_state_with_a_value_of_its_own_kind_is_kept_while_it_is_fresh(total, monkeypatch):
    monkeypatch.setattr(Sum, "__module__", "sevlab_sum")
    monkeypatch.setitem(sys.modules, "sevlab_sum", SimpleNamespace(Sum=Sum))
    machine = make_machine("sme", guests=1)
    file = io.BytesIO()
    with Recorder(machine, file):
        machine.apply(ev.AdvanceClock(1))
        machine.components["sum"] = Sum(total)
        machine.apply(ev.AdvanceClock(1))
    entries = list(TraceReader(file))
    if total:
        assert "Sum" in entries[1].step.reason
        assert "no data that a trace can hold" in entries[1].step.reason
    else:
        before = make_machine("sme", guests=1).snapshot()
        after = unpack_snapshot(entries[1].step.snapshot, before)
        assert after.state.values[-1][1].values[-1] == ("sum", Sum(0))
    assert len(entries) == 3


@given(st.binary(max_size=100))
def test_any_bytes_are_a_snapshot_or_refused(data):
    with pytest.raises(TraceFormatError, match="machine state"):
        unpack_snapshot(data)


@pytest.mark.parametrize("name", ["os:system", "builtins:int", "subprocess:Popen", "no.such:Thing", "sys:modules", ""])
def test_a_snapshot_makes_nothing_but_state(name):
    import msgpack

    for code in (1, 2, 3, 5, 7):
        packed = msgpack.packb(msgpack.ExtType(code, msgpack.packb([name, ["true"]])))
        with pytest.raises(TraceFormatError, match="machine state: (no class|extension)"):
            unpack_snapshot(packed)


TEST_FILE = """
from sevlab.core.events import AdvanceClock
from sevlab.core.testing import make_machine

def test_good():
    make_machine("sme").apply(AdvanceClock(1))

def test_bad():
    make_machine("sme").apply(AdvanceClock(2))
    assert False

def test_without_machine():
    assert False
"""


@pytest.mark.slow
@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.long)])
def test_pytest_keeps_the_traces_of_failing_tests(tmp_path: Path, all_of_them):
    (tmp_path / "test_it.py").write_text(TEST_FILE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--sevlab-record={tmp_path / 'kept'}"]
    command += ["--sevlab-record-all"] if all_of_them else []
    run = subprocess.run(
        [*command, "test_it.py"], cwd=tmp_path, capture_output=True, text=True, check=False, env={"PATH": ""}
    )
    assert "2 failed, 1 passed" in run.stdout, run.stdout + run.stderr
    kept = sorted(path.parent.name for path in (tmp_path / "kept").rglob("*.sevtrace"))
    assert kept == ["test_it.py_test_bad", "test_it.py_test_good"] if all_of_them else ["test_it.py_test_bad"]
    assert run.stdout.count("see it again with: sevlab replay") == 1
    for path in (tmp_path / "kept").rglob("*.sevtrace"):
        with TraceReader(path) as reader:
            assert replay_recorded(reader).divergences == ()


@pytest.mark.long
def test_recordings_of_whole_folders_of_tests_replay(tmp_path: Path):
    """Every machine of whole folders of tests: those of plugins that only the test knows cannot be composed again."""
    root = Path(__file__).parents[2]
    names = ("dispatch", "event_channel", "hyperv", "grant_table")
    areas = ["core/test_machine.py", "core/test_memory.py", "plugins/sme", "plugins/snp/test_svsm.py"]
    areas += [f"plugins/xen/test_{name}.py" for name in names]
    options = [f"--sevlab-record={tmp_path}", "--sevlab-record-all", "-m", "not long and not slow"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    subprocess.run([*command, *(str(root / "tests" / area) for area in areas)], cwd=root, check=True)
    replayed, diverging, missing = 0, [], []
    for path in tmp_path.rglob("*.sevtrace"):
        with TraceReader(path) as reader:
            try:
                result = replay_recorded(reader)
            except (PluginError, TraceFormatError) as error:
                missing.append(str(error))
                continue
        replayed += 1
        if result.divergences:
            diverging.append(path.parent.name)
    assert replayed > 150
    assert all("no plugin" in error or "is a plugin missing" in error for error in missing)
    patched = {"test_a_sink_turns_a_violation", "test_a_violation_leaves_apply"}  # they put a handler into the tables
    assert all(any(name in path for name in patched) for path in diverging), diverging


def test_a_state_of_many_pages_is_split_and_replays(tmp_path):
    machine = make_machine("sme")
    target = tmp_path / "large.sevtrace"
    with Recorder(machine, target) as recorder:
        for pfn in range(3000):
            machine.memory.write(pfn << 12, pfn.to_bytes(4, "little"), None, 4)
        recorder.settle()
        machine.apply(ev.AdvanceClock(5))
    with TraceReader(target) as reader:
        steps = [entry.step for _, entry in reader.numbered()]
        assert [type(step) for step in steps] == [State, Pages, Pages, Pages, ev.AdvanceClock]
        replayed = machine_of(reader.header)
        for step in steps:
            perform(replayed, step)
        assert replay_recorded(reader).divergences == ()
    assert replayed.snapshot() == machine.snapshot()


def test_pages_under_a_key_that_is_not_there_are_refused():
    page = PageImage(7, bytes(4096), b"\x01")
    with pytest.raises(TraceFormatError, match="no memory key 7"):
        perform(make_machine("sme"), Pages(pack_pages(((1, page),))))
