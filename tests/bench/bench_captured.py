"""Captured guests: import to `trace-cmd report` where it is installed, replay, and assessment."""

from __future__ import annotations

import io
import resource
import shutil
import subprocess
import time
from pathlib import Path

from sevlab.core.machine import Machine
from sevlab.traces.assess.judge import Assessor
from sevlab.traces.importers.kvm_text import KvmText
from sevlab.traces.importers.source import open_source
from sevlab.traces.replay.engine import Replay, machine_config
from sevlab.traces.schema import Header
from sevlab.traces.writer import TraceWriter

from tests.bench.harness import Bench, Row

ROOT = Path(__file__).resolve().parents[2]
PLACES = (ROOT / "tests/data/captures", ROOT.parent / "shared/data/captures", ROOT.parents[1] / "shared/data/captures")
SHORT, WHOLE = "kvm-svm-tiny", "kvm-svm-linux-microvm-smp2"


def _capture(name: str) -> Path | None:
    return next((place / name for place in PLACES if (place / name).exists()), None)


def _text(name: str) -> list[str]:
    path = _capture(f"{name}.trace.txt.xz")
    assert path is not None
    source = open_source(path)
    try:
        return list(source.text())
    finally:
        source.close()


def captures(bench: Bench) -> list[Row]:
    """Lines a second of the import, unpacking excluded; exchanges a second of replay and assessment."""
    name = SHORT if bench.quick else WHOLE
    lines = _text(name)
    started = time.process_time()
    for _ in KvmText("ftrace", lines).entries():
        pass
    imported = len(lines) / (time.process_time() - started)
    started = time.process_time()
    with TraceWriter(io.BytesIO(), Header(config=machine_config(2))) as writer:
        for entry in KvmText("ftrace", lines).entries():
            writer.append(entry)
    written = len(lines) / (time.process_time() - started)
    entries = list(KvmText("ftrace", lines).entries())
    tool = _tool(name)
    rows: list[Row] = [
        ("import of KVM text, to trace-cmd report -N", imported / tool if tool else 0.0, f"{imported:,.0f} lines/s"),
        ("the same with the trace written", written / tool if tool else 0.0, f"{written:,.0f} lines/s"),
    ]
    replay = Replay(Machine(machine_config(2)))
    started = time.process_time()
    tally = replay.run(entries)
    seconds = time.process_time() - started
    rows.append(("replay, all checks on", 0.0, f"{tally.total_exchanges / seconds:,.0f} exchanges/s"))
    assessor = Assessor("sev-es")
    started = time.process_time()
    result = assessor.run(entries)
    seconds = time.process_time() - started
    rows.append(("assessment with exchanges executed", 0.0, f"{result.exits / seconds:,.0f} exchanges/s"))
    return rows


def _tool(name: str) -> float:
    """Lines a second of `trace-cmd report -N` on the binary twin; 0 where either is missing."""
    twin, tool = _capture(f"{name}.trace.dat.xz"), shutil.which("trace-cmd")
    if twin is None or tool is None:
        return 0.0
    plain = Path("/tmp") / f"sevlab-bench-{name}.dat"  # removed below
    source = open_source(twin)
    try:
        plain.write_bytes(source.stream.read())
        started = _children()
        out = subprocess.run([tool, "report", "-N", "-i", str(plain)], capture_output=True, check=True).stdout
        return out.count(b"\n") / (_children() - started)
    finally:
        source.close()
        plain.unlink(missing_ok=True)


def _children() -> float:
    """CPU seconds of the processes that were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


GROUPS = (captures,)
