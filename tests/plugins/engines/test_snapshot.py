"""A running guest that is put back does again what it did."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sevlab.core.events import CpuExit
from sevlab.core.svm import ExitCode
from sevlab.core.vocabulary import Record
from sevlab.plugins.engines import Booted, Feature, Paging, boot, compose
from sevlab.plugins.engines.block_trace import BlockTrace
from sevlab.plugins.engines.launch import c_bit_mask
from sevlab.plugins.engines.loaders.image import GuestImage
from sevlab.plugins.engines.loaders.load import load_guest
from sevlab.plugins.engines.snapshot import Snapshot, run_to
from sevlab.plugins.io import devices
from sevlab.plugins.sev_es import Vmgexit

MEMORY = 16 << 20
START = 0x10_0000


def flat(path: Path) -> Booted:
    machine = compose(memory_bytes=MEMORY)
    feature = Feature.SEV_ES
    image = load_guest(path, memory_bytes=MEMORY, encrypted=True, c_bit_mask=c_bit_mask(machine, feature))
    return boot(machine, image, feature)


def plain(code: str) -> Booted:
    machine = compose(memory_bytes=MEMORY)
    image = GuestImage("flat binary", START)
    image.add(START, bytes.fromhex(code), "the code", MEMORY)
    image.finish(0, MEMORY)
    return boot(machine, image, Feature.PLAIN)


def nth(number: int, *kinds: type):
    """The step number `number` of these kinds."""
    seen = 0

    def wanted(step: Record) -> bool:
        nonlocal seen
        seen += isinstance(step, kinds)
        return isinstance(step, kinds) and seen == number

    return wanted


def state(guest: Booted) -> tuple:
    run = guest.execution
    return guest.machine.snapshot(), run.engine.snapshot(), run.exits.copy(), run.ended, run.pending_ticks


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(1, 80), length=st.integers(1, 30), kind=st.sampled_from([CpuExit, Vmgexit]))
def test_run_restore_run_equals_run(flat_elf, start, length, kind):
    guest = flat(flat_elf)
    assert run_to(guest.execution, nth(start, kind))
    snapshot = Snapshot(guest.execution)
    before = state(guest)
    reached = []
    for _ in range(3):
        run_to(guest.execution, nth(length, kind))
        reached.append(state(guest))
        snapshot.restore()
        assert state(guest) == before
    assert reached[0] == reached[1] == reached[2]


def test_a_guest_put_back_ends_as_one_that_never_stopped(flat_elf):
    alone, stopped = flat(flat_elf), flat(flat_elf)
    assert run_to(stopped.execution, nth(40, CpuExit))
    snapshot = Snapshot(stopped.execution)
    run_to(stopped.execution, nth(5, Vmgexit))
    snapshot.restore()
    assert stopped.execution.run() == alone.execution.run()
    assert stopped.execution.vcpu.regs.rip == alone.execution.vcpu.regs.rip
    one, other = (devices(guest.machine, guest.execution.vcpu).uart.output for guest in (alone, stopped))
    assert one == other
    assert stopped.machine.memory.dram(0, MEMORY) == alone.machine.memory.dram(0, MEMORY)


def test_code_that_changes_itself_is_put_back():
    # CPUID; INC BYTE [the 5 below]; MOV AL, 5; HLT
    guest = plain("0fa2 fe0501000000 b005 f4")
    run = guest.execution
    assert run_to(run, lambda step: isinstance(step, CpuExit) and step.exit_code == ExitCode.CPUID)
    snapshot = Snapshot(run)
    for _ in range(3):
        assert run.run().reason.startswith("halted")
        assert run.vcpu.regs.rax & 0xFF == 6
        snapshot.restore()


def test_code_that_somebody_else_changed_is_not_what_was_translated_before():
    """The guest's addresses are not those of memory, which is what the engine is told."""
    guest = plain("0fa2 b005 f4")  # CPUID; MOV AL, 5; HLT
    run = guest.execution
    assert run_to(run, lambda step: isinstance(step, CpuExit) and step.exit_code == ExitCode.CPUID)
    snapshot = Snapshot(run)
    for value in (7, 9):
        run.run()
        assert run.vcpu.regs.rax & 0xFF == 5
        snapshot.restore()
        place = guest.vm.memory_spa + START + 3
        assert place != START + 3
        guest.machine.access.hypervisor_write(place, bytes((value,)))
        run.engine.spoiled(place & -4096)
        run.run()
        assert run.vcpu.regs.rax & 0xFF == value
        snapshot.restore()


def test_a_changed_page_table_is_put_back_with_its_translations():
    # MOV EBX, 400000h; CPUID; MOV AL, [RBX]; INC BYTE [PDE of 400000h + 2, to 410000h's 2 MiB: 600000h]; MOV CR3; ...
    code = "bb00004000 0fa2 bb00004000 8a03 8004251220080020 0f20d9 0f22d9 8a23 f4"
    guest = plain(code)
    run = guest.execution
    guest.machine.access.hypervisor_write(guest.vm.memory_spa + 0x40_0000, b"\x11")
    guest.machine.access.hypervisor_write(guest.vm.memory_spa + 0x60_0000, b"\x22")
    assert run_to(run, lambda step: isinstance(step, CpuExit) and step.exit_code == ExitCode.CPUID)
    snapshot = Snapshot(run)
    for _ in range(3):
        run.run()
        assert run.vcpu.regs.rax & 0xFFFF == 0x2211
        snapshot.restore()


def test_blocks_in_the_range_are_noted_once_and_one_in_the_stop_range_ends_the_run():
    # MOV ECX, 5; loop: DEC ECX; JNZ loop; CPUID; HLT
    guest = plain("b905000000 ffc9 75fc 0fa2 f4")
    run = guest.execution
    trace = BlockTrace(run.engine)
    trace.trace(START, START + 0x100)
    trace.begin()
    assert run_to(run, lambda step: isinstance(step, CpuExit))
    addresses = [trace.address_of(edge) for edge in trace.edges()]
    assert addresses == [START, START + 5, START + 9]
    assert not trace.take_stop()
    snapshot = Snapshot(run)
    trace.stop_in(START + 11, START + 12)
    trace.begin()
    run.engine.run(1000)
    assert trace.take_stop()
    assert run.vcpu.regs.rip == START + 11
    snapshot.restore()
    trace.stop_in(0, 0)
    trace.begin()
    assert run.run().reason.startswith("halted")


@pytest.mark.parametrize("again", [1, 2])
def test_a_snapshot_of_a_snapshot(flat_elf, again):
    guest = flat(flat_elf)
    assert run_to(guest.execution, nth(20, CpuExit))
    Snapshot(guest.execution)
    assert run_to(guest.execution, nth(7 * again, CpuExit))
    later = Snapshot(guest.execution)
    before = state(guest)
    guest.execution.run()
    later.restore()
    assert state(guest) == before


def test_a_guest_that_walks_by_the_engine_is_put_back_too(flat_elf):
    machine = compose(memory_bytes=MEMORY, paging=Paging.NESTED)
    mask = c_bit_mask(machine, Feature.SEV_ES)
    image = load_guest(flat_elf, memory_bytes=MEMORY, encrypted=True, c_bit_mask=mask)
    guest = boot(machine, image, Feature.SEV_ES, paging=Paging.NESTED)
    assert run_to(guest.execution, nth(20, Vmgexit))
    snapshot = Snapshot(guest.execution)
    before = state(guest)
    reached = []
    for _ in range(3):
        run_to(guest.execution, nth(20, Vmgexit))
        reached.append(state(guest))
        snapshot.restore()
        assert state(guest) == before
    assert reached[0] == reached[1] == reached[2]
