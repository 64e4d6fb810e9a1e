"""Engines: guests under the model beside Unicorn alone on the same loops, and what leaving a guest costs."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from sevlab.plugins.engines import Booted, Feature, Paging, boot, compose
from sevlab.plugins.engines.launch import c_bit_mask
from sevlab.plugins.engines.loaders.image import TABLES_GPA, GuestImage
from sevlab.plugins.engines.loaders.load import load_guest

from tests.bench.harness import Bench, Row
from tests.guests.build import build

MEMORY = 32 << 20
ENTRY = 0x10_0000
LOOP = bytes.fromhex("48ffc9 75fb f4")
"""DEC RCX; JNZ; HLT: two instructions in five bytes, where a tick of the model's time is four bytes."""
STORES = bytes.fromhex("48ff83 00002000 4883c340 81e3f8ff0f00 48ffc9 75eb f4")
"""INC qword [RBX + 200000h]; ADD RBX, 64; AND EBX, FFFF8h; DEC RCX; JNZ; HLT: five instructions in 22 bytes."""
TOUCHES = bytes.fromhex("8a83 00004000 81c300100000 81e3ffffff00 48ffc9 75e9 f4")
"""MOV AL, [RBX + 400000h]; ADD EBX, 4096; AND EBX, FFFFFFh; DEC RCX; JNZ; HLT: another page each time."""
SWITCHES = bytes.fromhex("880425 00006000 880425 0000e000 48ffc9 75ed f4")
"""MOV [600000h], AL; MOV [E00000h], AL; DEC RCX; JNZ; HLT: one page as private and as shared."""
CPUIDS = bytes.fromhex("31c9") + b"\x90" * 50 + bytes.fromhex("0fa2 ebc8")
"""XOR ECX, ECX; 50 NOPs, so that a slice has not too many exits; CPUID; back to the start."""
SLICE = 1 << 20


def _guest(code: bytes, feature: Feature = Feature.PLAIN, paging: Paging = Paging.OWN) -> Booted:
    machine = compose(memory_bytes=MEMORY, paging=paging)
    mask = c_bit_mask(machine, feature)
    image = GuestImage("flat binary", ENTRY)
    image.add(ENTRY, code, "the loop", MEMORY)
    image.finish(mask, MEMORY)
    tables = bytearray(image.loads[TABLES_GPA])
    shared = TABLES_GPA + 0x2000 + 7 * 8 - TABLES_GPA
    tables[shared : shared + 8] = (0x60_0000 | 0xE3).to_bytes(8, "little")  # E00000h leads to 600000h, without C-bit
    image.loads[TABLES_GPA] = bytes(tables)
    return boot(machine, image, feature, paging=paging)


def _seconds(guest: Booted, rounds: int) -> float:
    run = guest.execution
    run.vcpu.regs.rcx = rounds
    started = time.process_time()
    run.run()
    return time.process_time() - started


def _alone(code: bytes, rounds: int, slice_: int = 0) -> float:
    """Unicorn without paging and without the model, in slices of so many instructions or in one piece."""
    unicorn: Any = import_module("unicorn")
    const: Any = import_module("unicorn.x86_const")
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    uc.mem_map(0, MEMORY)
    uc.mem_write(ENTRY, code)
    uc.reg_write(const.UC_X86_REG_RCX, rounds)
    end, at = ENTRY + len(code) - 1, ENTRY
    started = time.process_time()
    while at != end:
        uc.emu_start(at, end, count=slice_)
        at = uc.reg_read(const.UC_X86_REG_RIP)
    return time.process_time() - started


def loops(bench: Bench) -> list[Row]:
    """The tight loop and the memory loop."""
    rows = []
    for name, code, instructions, aim in (("compute", LOOP, 2, "0.9"), ("memory", STORES, 5, "0.6")):
        rounds = (1 if bench.quick else 10) * (1 << 21)
        sliced, free = _alone(code, rounds, SLICE), _alone(code, rounds)
        for paging in Paging:
            model = _seconds(_guest(code, paging=paging), rounds)
            mips = f"{rounds * instructions / model / 1e6:.0f} MIPS"
            rows.append((f"{name} loop, {paging.value}, of Unicorn in slices (aim {aim})", sliced / model, mips))
            rows.append((f"{name} loop, {paging.value}, of Unicorn without slices", free / model, ""))
    return rows


def leaving(bench: Bench) -> list[Row]:
    """An intercepted CPUID of a plain guest, answered."""
    run = _guest(CPUIDS).execution
    wanted = 2_000 if bench.quick else 20_000
    run.watch = lambda now: now.end("enough") if sum(now.exits.values()) >= wanted else None
    started = time.process_time()
    run.run()
    micro = (time.process_time() - started) / sum(run.exits.values()) * 1e6
    return [("intercepted CPUID, there and back, us", micro, "")]


def pages(bench: Bench) -> list[Row]:
    """A miss of the engine's TLB, and a page that changes hands twice; less what the loop costs without."""
    rows: list[Row] = []
    for paging in Paging:
        guest = _guest(TOUCHES, paging=paging)
        rounds = 20_000 if bench.quick else 100_000
        first = _seconds(guest, 4096)
        fills = guest.execution.mmu.fills
        rows.append((f"first touch of a page, {paging.value}, us", first / fills * 1e6, f"{fills} pages"))
        again = _guest(TOUCHES, paging=paging)
        micro = (_seconds(again, rounds + 4096) - first) / rounds * 1e6
        aim = " (aim 8)" if paging is Paging.OWN else ""
        rows.append((f"touch of a page that the TLB lacks, {paging.value}, us{aim}", micro, ""))
    for paging in Paging:
        guest = _guest(SWITCHES, Feature.SEV, paging)
        rounds = 1_000 if bench.quick else 10_000
        micro = _seconds(guest, rounds) / rounds * 1e6
        pairs = guest.execution.mmu.switches / 2
        rows.append((f"a page private, shared, private, {paging.value}, us (aim 40)", micro, f"{pairs:.0f} pairs"))
    return rows


def round_trips(bench: Bench) -> list[Row]:
    """#VC, GHCB, VMGEXIT, IRET of the flat guest for one CPUID."""
    if shutil.which("gcc") is None or shutil.which("nm") is None:
        return []
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        target = build("flat.c", Path(folder, "flat.elf"))
        symbols = subprocess.run(["nm", str(target)], check=True, capture_output=True, text=True).stdout
        places = {line.split()[2]: int(line.split()[0], 16) for line in symbols.splitlines()}
        for paging in Paging:
            seconds = [_cpuids(target, places, paging, count) for count in (0, 1_000 if bench.quick else 20_000)]
            micro = (seconds[1] - seconds[0]) / (1_000 if bench.quick else 20_000) * 1e6
            rows.append((f"#VC, GHCB, VMGEXIT, IRET, {paging.value}, us (aim 50)", micro, ""))
    return rows


def _cpuids(target: Path, places: dict[str, int], paging: Paging, count: int) -> float:
    machine = compose(memory_bytes=MEMORY, paging=paging)
    mask = c_bit_mask(machine, Feature.SEV_ES)
    image = load_guest(target, memory_bytes=MEMORY, encrypted=True, c_bit_mask=mask)
    guest = boot(machine, image, Feature.SEV_ES, paging=paging)
    vcpu = guest.execution.vcpu
    for name, value in (("mode", 1), ("iterations", count)):
        machine.access.guest_physical_write(vcpu, places[name], value.to_bytes(8, "little"), c_bit=True)
    started = time.process_time()
    ended = guest.execution.run()
    assert ended.clean
    return time.process_time() - started


GROUPS = (loops, leaving, pages, round_trips)
