"""What fuzzing of exits needs, as data: which exits there are, with instructions that cause them, and a target."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.events import CpuExit, Party, SetRegisters
from sevlab.core.oracle import Target
from sevlab.core.payload import Message, Payload
from sevlab.core.svm import ExitCode, NpfError
from sevlab.plugins.io.layout import IoioInfo, ioio_word

if TYPE_CHECKING:
    from sevlab.core.machine import Machine
    from sevlab.core.vocabulary import Record

LAPIC, IOAPIC, NOWHERE = 0xFEE0_0000, 0xFEC0_0000, 0xFD00_0000
PORTS = (0x20, 0x21, 0x40, 0x43, 0x61, 0x64, 0x70, 0x71, 0x80, 0x92, 0xA1, 0x3F8, 0x3FD, 0x402, 0x510, 0x511, 0x514,
         0x608, 0xCF8, 0xCFC)  # fmt: skip
"""Ports of the board's devices."""

INSTRUCTIONS: dict[ExitCode, bytes] = {
    ExitCode.CPUID: b"\x0f\xa2",
    ExitCode.RDTSC: b"\x0f\x31",
    ExitCode.RDTSCP: b"\x0f\x01\xf9",
    ExitCode.RDPMC: b"\x0f\x33",
    ExitCode.HLT: b"\xf4",
    ExitCode.INVD: b"\x0f\x08",
    ExitCode.WBINVD: b"\x0f\x09",
    ExitCode.VMMCALL: b"\x0f\x01\xd9",
    ExitCode.MONITOR: b"\x0f\x01\xc8",
    ExitCode.MWAIT: b"\x0f\x01\xc9",
    ExitCode.DR7_READ: b"\x0f\x21\xf8",
    ExitCode.DR7_WRITE: b"\x0f\x23\xf8",
    ExitCode.CR0_READ: b"\x0f\x20\xc0",
    ExitCode.CR0_WRITE: b"\x0f\x22\xc0",
    ExitCode.INVLPG: b"\x0f\x01\x38",
    ExitCode.XSETBV: b"\x0f\x01\xd1",
    ExitCode.PAUSE: b"\xf3\x90",
    ExitCode.SWINT: b"\xcd\x80",
}
"""The shortest instruction behind an exit. Source: 24594, instruction pages."""

READS = (b"\x8a\x07", b"\x8b\x07", b"\x48\x8b\x07", b"\x0f\xb6\x07", b"\x0f\xbf\x07", b"\x3b\x07", b"\xf3\xa4")
WRITES = (b"\x88\x07", b"\x89\x07", b"\x48\x89\x07", b"\xc7\x07\x01\x00\x00\x00", b"\xf3\xaa", b"\xf3\xa5", b"\x87\x07")
"""Loads and stores through RDI: MOV, MOVZX, MOVSX, CMP, STOS, MOVS, XCHG."""


def _ports() -> list[Message]:
    found = []
    for port in PORTS:
        for is_in, string, insn in (
            (False, False, b"\xee"),
            (True, False, b"\xec"),
            (False, True, b"\xf3\x6e"),
            (True, True, b"\xf3\x6c"),
        ):
            word = ioio_word(port, 1, is_in=is_in, string=string, rep=string, segment=3 if string else 0)
            fields = {name: word >> info.low_bit & info.maximum for name, info in IoioInfo.FIELDS.items()}
            record = {"exit_code": int(ExitCode.IOIO), "insn": insn, "next_rip": 0}
            found.append(Message(int(ExitCode.IOIO), "IOIO", IoioInfo, record, fields))
    return found


def _exits() -> list[Message]:
    found = [
        Message(int(code), code.name, record={"exit_code": int(code), "exit_info_1": 0, "insn": insn, "next_rip": 0})
        for code, insn in INSTRUCTIONS.items()
    ]
    for write, insn in ((0, b"\x0f\x32"), (1, b"\x0f\x30")):
        record = {"exit_code": int(ExitCode.MSR), "exit_info_1": write, "insn": insn, "next_rip": 0}
        found.append(Message(int(ExitCode.MSR), "MSR", record=record))
    for gpa in (LAPIC, LAPIC + 0xF0, LAPIC + 0x300, IOAPIC, IOAPIC + 0x10, NOWHERE):
        for error, forms in ((NpfError.U, READS), (NpfError.U | NpfError.W, WRITES)):
            for insn in forms:
                record = {
                    "exit_code": int(ExitCode.NPF),
                    "exit_info_1": int(error | NpfError.FINAL),
                    "exit_info_2": gpa,
                    "insn": insn,
                    "next_rip": 0,
                }
                found.append(Message(int(ExitCode.NPF), "NPF", record=record))
    return found


PAYLOADS: tuple[Payload, ...] = (
    Payload(
        "exit",
        "exit_info_1",
        lambda record: int(record.exit_code) if isinstance(record, CpuExit) else None,
        (*_ports(), *_exits()),
    ),
)


def _seeds(_machine: Machine) -> tuple[tuple[Record, ...], ...]:
    """One of each exit, with the registers that it looks at."""
    registers = (("rax", 1), ("rcx", 4), ("rdx", 0x3F8), ("rdi", LAPIC), ("rsi", 0x8000), ("rip", 0x1000))
    (payload,) = PAYLOADS
    seeds = []
    for message in payload.messages:
        word = 0 if message.layout is None else int.from_bytes(message.layout.build(**message.fields), "little")
        values = {"exit_info_1": word, "exit_info_2": 0, **message.record}
        exit_ = CpuExit(0, *(values[name] for name in CpuExit._fields[1:]))
        seeds.append((SetRegisters(0, (*registers, ("rdi", values["exit_info_2"] or LAPIC))), exit_))
    return tuple(seeds)


TARGETS: tuple[Target, ...] = (
    Target(
        "io",
        Party.GUEST,
        ("exit", "registers", "write", "io.line", "io.serial", "advance", "schedule", "race"),
        (),
        ("io",),
        "Emulation of instructions and devices for a hostile guest: ports, device memory, registers, every exit.",
        seeds=_seeds,
    ),
)
