"""Writing and reading traces, to msgpack and zstd alone; recording, to the machine alone."""

from __future__ import annotations

import io
import time

import msgpack
import zstandard
from sevlab.core import events as ev
from sevlab.core.config import MachineConfig
from sevlab.core.testing import make_machine
from sevlab.traces.reader import TraceReader
from sevlab.traces.record import Recorder
from sevlab.traces.replay_recorded import replay_recorded
from sevlab.traces.schema import Entry, Header, vocabulary_of
from sevlab.traces.writer import COMPRESSION_LEVEL, TraceWriter

from tests.bench.harness import Bench, Row

HEADER = Header(config=MachineConfig(plugins=("io",)))


def _entries(count: int) -> list[Entry]:
    """Exits to ports as a booting guest makes them: few addresses, many values."""
    return [
        Entry(
            n * 40_000 + n * n % 9973,
            n % 2,
            ev.CpuExit(n % 2, 0x7B, 0x3F8_0210 | n % 8 << 16, 0xFFFF_FFFF_8160_A3F3 + n % 97, b"\xee", 0),
            (ev.VmExit(n % 2, 0x7B, 0x3F8_0210 | n % 8 << 16, n * n % 251), ev.Resumed(n % 2, 0x1000 + n % 97)),
        )
        for n in range(count)
    ]


def files(bench: Bench) -> list[Row]:
    """Write and read of entries with three records each."""
    entries = _entries(2_000 if bench.quick else 60_000)
    vocabulary = vocabulary_of(("io",))
    records = 3 * len(entries)
    started = time.process_time()
    floor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL)
    arrays = [(1, *entry[:2], *entry.step) for entry in entries], [tuple(r) for e in entries for r in e.outcome]
    started = time.process_time()
    raw = b"".join(map(msgpack.packb, arrays[0])) + b"".join(map(msgpack.packb, arrays[1]))
    packed = floor.compress(raw)
    floor_write = time.process_time() - started
    started = time.process_time()
    unpacker = msgpack.Unpacker(use_list=False, max_buffer_size=len(raw))
    unpacker.feed(zstandard.ZstdDecompressor().decompress(packed))
    assert sum(1 for _ in unpacker) == records
    floor_read = time.process_time() - started
    file = io.BytesIO()
    started = time.process_time()
    with TraceWriter(file, HEADER, vocabulary=vocabulary) as writer:
        for entry in entries:
            writer.append(entry)
    write = time.process_time() - started
    count = len(entries)
    del entries, arrays
    reader = TraceReader(file, vocabulary=vocabulary)
    started = time.process_time()
    assert sum(1 for _ in reader) == count
    read = time.process_time() - started
    seek = bench(lambda: reader[count // 2], number=10)
    return [
        ("write a trace, to msgpack and zstd alone", write / floor_write, f"{records / write / 1e3:,.0f} k records/s"),
        ("read a trace, to zstd and msgpack alone", read / floor_read, f"{records / read / 1e3:,.0f} k records/s"),
        ("bytes an entry", len(file.getvalue()) / count, f"{len(file.getvalue()) / count:.1f} bytes"),
        ("any entry by its number, its block unpacked before", seek, f"{seek:.1f} us"),
    ]


def recording(bench: Bench) -> list[Row]:
    """A step with a recorder that compares snapshots, and one that does not."""
    steps = [ev.MemoryWrite(1, 0, 0, 0x1000 + n % 64, False, b"x") for n in range(300 if bench.quick else 2_000)]

    def took(watch: bool | None) -> tuple[float, io.BytesIO]:
        machine, file = make_machine("sme", "io", guests=1), io.BytesIO()
        recorder = None if watch is None else Recorder(machine, file, watch=watch)
        started = time.process_time()
        for step in steps:
            machine.apply(step)
        seconds = time.process_time() - started
        if recorder is not None:
            recorder.close()
        return seconds / len(steps) * 1e6, file

    plain, _ = took(None)
    blind, _ = took(watch=False)
    watched, file = took(watch=True)
    reader = TraceReader(file)
    started = time.process_time()
    assert not replay_recorded(reader).divergences
    replay = (time.process_time() - started) / len(steps) * 1e6
    return [
        ("a recorded step, to the step alone", blind / plain, f"{blind:.1f} us"),
        ("the same with snapshots compared", watched / plain, f"{watched:.0f} us"),
        ("replay of a recording, compose included", replay / plain, f"{replay:.1f} us a step"),
    ]


GROUPS = (files, recording)
