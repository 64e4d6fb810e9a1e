"""Engines: a guest under the model beside Unicorn alone on the same loop, and the cost of leaving the guest."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

from sevlab.plugins.engines import Booted, Feature, boot, compose
from sevlab.plugins.engines.loaders.image import GuestImage

from tests.bench.harness import Bench, Row

MEMORY = 16 << 20
LOOP = bytes.fromhex("48ffc9 75fb f4")
"""DEC RCX; JNZ; HLT."""
INSTRUCTIONS_A_TICK = 4 * 2 / 5
"""Of the loop: two instructions in five bytes, where a tick is four."""
CPUIDS = bytes.fromhex("31c9") + b"\x90" * 50 + bytes.fromhex("0fa2 ebc8")
"""XOR ECX, ECX; 50 NOPs, so that a slice has not too many exits; CPUID; back to the start."""
SLICE = 1 << 20


def _guest(code: bytes) -> Booted:
    machine = compose(memory_bytes=MEMORY)
    image = GuestImage("flat binary", 0x10_0000)
    image.add(0x10_0000, code, "the loop", MEMORY)
    image.finish(0, MEMORY)
    return boot(machine, image, Feature.PLAIN)


def _under_the_model(code: bytes, instructions: int) -> float:
    run = _guest(code).execution
    run.vcpu.regs.rcx = 1 << 40
    run.watch = lambda now: now.end("enough") if now.instructions >= instructions else None
    started = time.process_time()
    run.run()
    return run.instructions * INSTRUCTIONS_A_TICK / (time.process_time() - started) / 1e6


def _alone(code: bytes, instructions: int, slice_: int) -> float:
    unicorn: Any = import_module("unicorn")
    const: Any = import_module("unicorn.x86_const")
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    uc.mem_map(0, 0x20_0000)
    uc.mem_write(0x10_0000, code)
    uc.reg_write(const.UC_X86_REG_RCX, 1 << 40 if slice_ else instructions // 2)
    started = time.process_time()
    done = 0
    while slice_ and done < instructions:
        uc.emu_start(0x10_0000, 0x1F_0000, count=slice_)
        done += slice_
    if not slice_:
        uc.emu_start(0x10_0000, 0x10_0005)
        done = instructions
    return done / (time.process_time() - started) / 1e6


def compute(bench: Bench) -> list[Row]:
    """The tight loop."""
    count = (4 if bench.quick else 40) * SLICE
    sliced, free = _alone(LOOP, count, SLICE), _alone(LOOP, count, 0)
    model = _under_the_model(LOOP, count)
    return [
        ("compute loop, of Unicorn in the same slices (aim 0.9)", model / sliced, f"{model:.0f} MIPS"),
        ("compute loop, of Unicorn without slices", model / free, f"{free:.0f} MIPS alone"),
    ]


def leaving(bench: Bench) -> list[Row]:
    """An intercepted CPUID of a plain guest, answered."""
    run = _guest(CPUIDS).execution
    wanted = 2_000 if bench.quick else 20_000
    run.watch = lambda now: now.end("enough") if sum(now.exits.values()) >= wanted else None
    started = time.process_time()
    run.run()
    micro = (time.process_time() - started) / sum(run.exits.values()) * 1e6
    return [("intercepted CPUID, there and back", micro, f"{micro:.1f} us")]


GROUPS = (compute, leaving)
