"""The engine's own paging beside the kernel's: the same guest, the same exits, the same time."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
from sevlab.core.generations import GENERATIONS
from sevlab.core.svm import ExitCode
from sevlab.plugins.engines import Booted, Feature, Paging, boot, compose
from sevlab.plugins.engines.launch import c_bit_mask
from sevlab.plugins.engines.loaders.image import GuestImage
from sevlab.plugins.engines.loaders.load import load_guest
from sevlab.plugins.engines.nested_room import NestedRoom
from sevlab.plugins.io import devices

MEMORY = 16 << 20
BASE = 0x7F_4000_0000


def booted(path: Path, feature: Feature, paging: Paging) -> Booted:
    machine = compose(memory_bytes=MEMORY, paging=paging)
    mask = c_bit_mask(machine, feature)
    image = load_guest(path, memory_bytes=MEMORY, encrypted=feature.encrypted, c_bit_mask=mask)
    return boot(machine, image, feature, paging=paging)


@pytest.mark.parametrize("feature", list(Feature))
def test_both_ways_give_the_same_run(flat_elf, feature):
    seen = []
    for paging in Paging:
        guest = booted(flat_elf, feature, paging)
        ended = guest.execution.run()
        run = guest.execution
        output = bytes(devices(guest.machine, run.vcpu).uart.output)
        seen.append((ended, run.exits, run.instructions, guest.machine.tsc(), output, run.mmu.switches))
    assert seen[0] == seen[1]
    assert seen[0][0].clean


def test_a_page_fault_arrives_with_its_address(flat_elf):
    guest = booted(flat_elf, Feature.SEV_ES, Paging.NESTED)
    guest.execution.run()
    assert guest.execution.vcpu.system.cr2 == 0x4000_0000


def test_a_device_behind_a_nested_fault_is_served(tmp_path):
    program = tmp_path / "lapic.bin"
    program.write_bytes(bytes.fromhex("bf 3000e0fe 8b1f fa f4"))  # MOV EDI, FEE00030h; MOV EBX, [RDI]
    guest = booted(program, Feature.PLAIN, Paging.NESTED)
    guest.execution.run()
    assert guest.execution.vcpu.regs.rbx == 0x0005_0014  # the version of the local APIC
    assert guest.execution.exits[ExitCode.NPF] == 1


def test_the_c_bit_lies_within_the_engines_addresses():
    part = GENERATIONS["narrow"]
    assert (part.c_bit, part.physical_bits) == (39, 40)
    machine = compose(memory_bytes=MEMORY, paging=Paging.NESTED)
    assert machine.cpuid(None, 0x8000_0008, 0)[0] & 0xFF == 40
    assert machine.cpuid(None, 0x8000_001F, 0)[1] & 0x3F == 39


def room(pages: int) -> tuple[NestedRoom, memoryview]:
    memory = mmap.mmap(-1, pages * 4096)
    return NestedRoom(memory, BASE), memoryview(memory).cast("Q")


def walk(words: memoryview, gpa: int) -> int:
    at = 0
    for shift in (39, 30, 21, 12):
        entry = words[at * 512 + (gpa >> shift & 511)]
        if not entry & 1 or shift == 12:
            return entry
        at = (entry & 0xFF_FFFF_F000) - BASE >> 12
    raise AssertionError


def test_a_withdrawn_page_has_neither_of_its_leaves():
    tables, words = room(16)
    tables.map(0x5000, 0x9000, writable=True)
    tables.map(1 << 39 | 0x5000, 0x9000, writable=False)
    assert walk(words, 0x5000) == 0x9067
    assert walk(words, 1 << 39 | 0x5000) == 0x9065
    assert tables.withdraw(0x9000)
    assert not walk(words, 0x5000)
    assert not walk(words, 1 << 39 | 0x5000)
    assert not tables.withdraw(0x9000)


def test_tables_that_do_not_fit_any_more_begin_anew():
    tables, words = room(7)
    tables.map(0, 0x1000, writable=True)
    tables.map(1 << 30, 0x2000, writable=True)
    tables.map(1 << 31, 0x3000, writable=True)
    assert not walk(words, 0)
    assert walk(words, 1 << 31) == 0x3067


def test_an_image_runs_without_paging_of_its_own_in_both_ways():
    for paging in Paging:
        machine = compose(memory_bytes=MEMORY, paging=paging)
        image = GuestImage("flat binary", 0x10_0000)
        image.add(0x10_0000, bytes.fromhex("c704250000200078563412 8b1c2500002000 fa f4"), "it", MEMORY)
        image.finish(0, MEMORY)
        guest = boot(machine, image, Feature.PLAIN, paging=paging)
        guest.execution.run()
        assert guest.execution.vcpu.regs.rbx == 0x1234_5678
        assert machine.access.hypervisor_read(guest.vm.memory_spa + 0x20_0000, 4) == bytes.fromhex("78563412")
