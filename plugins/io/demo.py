"""The demo chapter of I/O emulation."""

from __future__ import annotations

from collections.abc import Callable

from sevlab.core.config import GuestConfig, MachineConfig
from sevlab.core.cpu import CONTROL_SEV
from sevlab.core.events import CpuExit, MemoryWrite, Party, SetRegisters, Space
from sevlab.core.machine import Machine
from sevlab.core.svm import ExitCode, NpfError
from sevlab.plugins.io.coverage import COLUMNS, MATRIX
from sevlab.plugins.io.devices.board import devices
from sevlab.plugins.io.layout import ioio_word
from sevlab.plugins.io.records import Unserved

GREETING = b"Hello from a guest, one byte at a time and then all at once.\n"
LAPIC_SVR = 0xFEE0_00F0


def chapter(say: Callable[[str], object]) -> None:
    """Serial output by OUT and REP OUTS, an MMIO store to the APIC, and the same under SEV."""
    machine = Machine(MachineConfig(plugins=("io",), guests=(GuestConfig(memory_bytes=1 << 20),)))
    first, rest = GREETING[:19], GREETING[19:]
    for byte in first:
        machine.apply(SetRegisters(0, (("rax", byte), ("rip", 0x1000))))
        machine.apply(CpuExit(0, ExitCode.IOIO, ioio_word(0x3F8, 1, is_in=False, address_size=32), 0x1001, b"\xee", 0))
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, 0x8000, False, rest))
    machine.apply(SetRegisters(0, (("rsi", 0x8000), ("rcx", len(rest)))))
    word = ioio_word(0x3F8, 1, is_in=False, string=True, rep=True, address_size=32, segment=3)
    machine.apply(CpuExit(0, ExitCode.IOIO, word, 0x1002, b"\xf3\x6e", 0))
    board = devices(machine, machine.vcpus[0])
    say(f"   {len(first)} OUTs and one REP OUTS reached the serial port: {board.uart.output.decode()!r}")

    machine.apply(SetRegisters(0, (("rdi", LAPIC_SVR), ("rax", 0x1FF), ("rip", 0x2000))))
    store = CpuExit(0, ExitCode.NPF, NpfError.U | NpfError.W | NpfError.FINAL, LAPIC_SVR, b"\x67\x66\x89\x07", 0)
    machine.apply(store)
    say(f"   MOV [edi], eax with edi = {LAPIC_SVR:#x}: the APIC's SVR is {board.lapics[0].register(0xF0):#x}")

    machine.vcpus[0].vmcb.encryption_control |= CONTROL_SEV
    refused = machine.apply(CpuExit(0, ExitCode.IOIO, word, 0x1002, b"\xf3\x6e", 0)).first(Unserved)
    say(f"   The same REP OUTS from an SEV guest: {refused.reason if refused else 'served'}\n")
    say("   Which forms of an MMIO access each party serves:")
    for name, title in COLUMNS.items():
        served = sum(not getattr(row, name) for row in MATRIX.values())
        say(f"     {title:<36} {served:>2} of {len(MATRIX)}")
