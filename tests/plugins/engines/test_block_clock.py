"""Time by executed code: exact, without end, and never in the guest's sight."""

from __future__ import annotations

import pytest
from sevlab.core.machine import Machine
from sevlab.plugins.engines import Booted, Feature, boot, compose
from sevlab.plugins.engines.loaders.image import GuestImage

unicorn = pytest.importorskip("unicorn", reason="the engine unicorn is not installed (extra emu)")
MEMORY = 16 << 20
ENTRY = 0x10_0000


def guest(code: str) -> Booted:
    machine: Machine = compose(memory_bytes=MEMORY)
    image = GuestImage("flat binary", ENTRY)
    image.add(ENTRY, bytes.fromhex(code), "the code", MEMORY)
    image.finish(0, MEMORY)
    return boot(machine, image, Feature.PLAIN)


def run_for(booted: Booted, ticks: int, *, slice_: int | None = None) -> None:
    run = booted.execution
    if slice_ is not None:
        run._slice = lambda: slice_  # type: ignore[method-assign]
    run.watch = lambda now: now.end("enough") if now.now() >= ticks else None
    run.run()


def test_a_loop_takes_a_tick_for_every_four_bytes_of_code():
    booted = guest("48ffc1 ebfb")  # INC RCX; JMP back: five bytes
    run_for(booted, 100_000, slice_=1000)
    run = booted.execution
    assert abs(run.vcpu.regs.rcx * 5 / 4 - run.instructions) <= 2


@pytest.mark.parametrize("slice_", [1, 2, 7, 1000])
def test_the_shortest_slice_gets_on(slice_):
    booted = guest("90" * 200 + "48ffc1 e930ffffff")  # a block that is longer than the slice
    run_for(booted, 3000, slice_=slice_)
    assert booted.execution.vcpu.regs.rcx >= 50


def test_ticks_do_not_depend_on_the_slices():
    counts = []
    for slice_ in (3, 1 << 20):
        booted = guest("48ffc1 4881f9 00100000 75f4 fa f4")  # until RCX is 1000h; CLI; HLT
        run_for(booted, 1 << 30, slice_=slice_)
        counts.append(booted.execution.instructions)
    assert counts[0] == counts[1] == (0x1000 * 12 + 2) // 4


def test_the_step_over_an_invlpg_is_not_seen_when_time_runs_out():
    # MOV RAX, 1 << 40; INVLPG [RAX]; PUSHF; POP RBX; OR RCX, RBX; JMP to INVLPG
    booted = guest("48b80000000000010000 0f0138 9c 5b 4809d9 ebf6")
    run_for(booted, 2000, slice_=1)
    run = booted.execution
    assert run.vcpu.regs.rcx & 0x102 == 2  # flags were pushed, and none had TF


def test_flags_that_are_not_set_are_not_pushed():
    booted = guest("31c0 ffc0 9c 5b fa f4")  # XOR EAX, EAX (Z, P); INC EAX (neither); PUSHF; POP RBX; CLI; HLT
    booted.execution.run()
    assert booted.execution.vcpu.regs.rbx & 0x8D5 == 0


def test_another_host_is_refused_with_a_reason(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(Exception, match="x86-64 code"):
        guest("f4")


def test_a_block_that_is_left_in_its_middle_counts_what_was_executed():
    booted = guest(("0fa2" + "90" * 10) * 3 + "faf4" + "90" * 20)  # CPUID, ten NOPs, three times; CLI; HLT
    booted.execution.run()
    assert booted.execution.instructions == (3 * 10 + 1) // 4  # CPUID and HLT are the hypervisor's
