"""SEV: loading guest memory, and the shortest commands through the mailbox."""

from __future__ import annotations

import hashlib
import statistics
import time

from sevlab.core.config import GuestConfig
from sevlab.core.events import AspCommand
from sevlab.core.testing import make_machine
from sevlab.plugins import sev
from sevlab.plugins.sev import Command, driver

from tests.bench.harness import Bench, Row

LOAD_BYTES = 16 << 20


def _seconds(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def loading(bench: Bench) -> list[Row]:
    machine = make_machine("sev", guests=(GuestConfig(memory_bytes=2 * LOAD_BYTES),))
    guest = sev.begin_launch(machine, 0)
    spa = machine.hypervisor.vms[0].memory_spa
    data = bytes(range(256)) * (LOAD_BYTES // 256)
    fields = driver.BUFFERS[Command.LAUNCH_UPDATE_DATA].build(handle=guest.handle, spa=spa, length=LOAD_BYTES)
    step = AspCommand("sev", Command.LAUNCH_UPDATE_DATA, driver.scratch_page(machine), fields)
    hashing, loading_ = [], []
    for _ in range(3 if bench.quick else 15):
        driver.put(machine, spa, data)
        loading_.append(_seconds(lambda: machine.apply(step)))
        hashing.append(_seconds(lambda: hashlib.sha256(data).digest()))
    ours, alone = statistics.median(loading_), statistics.median(hashing)
    return [
        (
            "LAUNCH_UPDATE_DATA of 16 MiB, of SHA-256 alone",
            alone / ours,
            f"{ours * 1e3:.1f} ms, SHA-256 {alone * 1e3:.1f} ms (target 0.7)",
        )
    ]


def commands(bench: Bench) -> list[Row]:
    machine = make_machine("sev", guests=1)
    guest = sev.launch_guest(machine, 0)
    spa = driver.scratch_page(machine)
    rows: list[Row] = []
    nop = AspCommand("sev", Command.NOP, 0, b"")
    base = bench(lambda: machine.apply(nop))
    rows.append(("NOP through the mailbox", 1.0, f"{base:.1f} us"))
    for command, fields in ((Command.PLATFORM_STATUS, {}), (Command.GUEST_STATUS, {"handle": guest.handle})):
        step = AspCommand("sev", command, spa, driver.BUFFERS[command].build(**fields))
        took = bench(lambda step=step: machine.apply(step))
        rows.append((f"{command.name} through the mailbox, to NOP", took / base, f"{took:.1f} us (target 15)"))
    return rows


def sessions(bench: Bench) -> list[Row]:
    machine = make_machine("sev", guests=1)
    sev.initialise(machine)
    machine.mark()
    start = AspCommand("sev", Command.INIT, driver.scratch_page(machine), bytes(0x14))

    def initialise():
        machine.apply(AspCommand("sev", Command.SHUTDOWN, 0, b""))
        machine.apply(AspCommand("sev", Command.PLATFORM_RESET, 0, b""))
        machine.apply(start)

    scalar = 0x1234567
    point = sev.crypto.public_point(scalar)
    agree = bench(lambda: sev.crypto.ecdh(scalar, point), 20)
    made = bench(initialise, 5)
    return [("INIT with all keys made new, to one ECDH on P-384", made / agree, f"{made / 1e3:.1f} ms")]


GROUPS = (loading, commands, sessions)
