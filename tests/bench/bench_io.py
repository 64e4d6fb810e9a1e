"""Emulation of I/O; the ratios are to the exit loop without a device: an exit that only resumes the guest."""

from __future__ import annotations

from sevlab.core.config import GuestConfig
from sevlab.core.events import CpuExit, SetRegisters
from sevlab.core.svm import ExitCode, NpfError
from sevlab.core.testing import make_machine
from sevlab.plugins import io
from sevlab.plugins.io.decode import _decode_at

from tests.bench.harness import Bench, Row

APIC_SVR = 0xFEE0_00F0
STORE = b"\x67\x66\x89\x07"  # mov [edi],eax
STRING_BYTES = 4096


def emulation(bench: Bench) -> list[Row]:
    machine = make_machine("io", guests=(GuestConfig(memory_bytes=1 << 20),))
    vcpu = machine.vcpus[0]
    machine.apply(SetRegisters(0, (("rdi", APIC_SVR), ("rax", 0x1FF), ("rip", 0x2000))))
    handlers = machine.tables.exits
    records = machine._records

    def served(exit_):
        handler = handlers[exit_.exit_code]

        def call():
            handler(machine, vcpu, exit_)
            records.clear()

        return call

    resumed = bench(lambda: machine.apply(CpuExit(0, ExitCode.INTR, 0, 0, b"", 0)))
    fault = NpfError.U | NpfError.W | NpfError.FINAL
    store = served(CpuExit(0, ExitCode.NPF, fault, APIC_SVR, STORE, 0))

    def first_time():
        _decode_at.cache_clear()
        store()

    out = served(CpuExit(0, ExitCode.IOIO, io.ioio_word(0x80, 1, is_in=False), 0x1001, b"\xee", 0))
    rows: list[Row] = []
    for name, call, target in (
        ("MMIO MOV, instruction seen before", store, 25),
        ("MMIO MOV, decoded for the first time", first_time, 25),
        ("OUT to a port", out, 5),
    ):
        took = bench(call)
        rows.append((f"{name}, to a bare exit", took / resumed, f"{took:.1f} us (target {target})"))
    for name, port in (("the serial port", 0x3F8), ("the debug console", 0xE9), ("nothing", 0x1234)):
        word = io.ioio_word(port, 1, is_in=False, string=True, rep=True, address_size=32, segment=3)
        string = served(CpuExit(0, ExitCode.IOIO, word, 0x1002, b"\xf3\x6e", 0))

        def whole(string=string):
            vcpu.regs.rsi, vcpu.regs.rcx = 0x8000, STRING_BYTES
            string()

        took = bench(whole, 200)
        machine.reset()
        rows.append(
            (f"REP OUTS of 4096 bytes to {name}, to a bare exit", took / resumed, f"{took:.0f} us (target 400)")
        )
    return rows


GROUPS = (emulation,)
