"""The demo chapter of SEV-ES: a guest that nobody can look into prints a line on its serial port."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sevlab.core.config import GuestConfig, MachineConfig
from sevlab.core.cpu import Vcpu
from sevlab.core.events import CpuExit, Data, MemoryRead, MemoryWrite, Party, Schedule, SetRegisters, Space, VmExit
from sevlab.core.exitinfo import ioio_word
from sevlab.core.machine import Machine
from sevlab.core.svm import ExitCode, exit_name
from sevlab.core.vocabulary import Outcome
from sevlab.plugins.sev import Policy, launch_guest
from sevlab.plugins.sev_es.profiles import initial_vmsa
from sevlab.plugins.sev_es.records import GhcbReply, GhcbRequest, GuestSetup, MsrReply, VcDelivered
from sevlab.plugins.sev_es.startup import set_up_vcpus

GHCB_GPA, TEXT_GPA = 0x5000, 0x8000
LINE = b"Hello from a guest whose registers nobody sees\n"
LONG_MODE_CS, LONG_MODE_EFER = (8, 0x29B, 0xFFFF_FFFF, 0), 0x1501
OUT, REP_OUTS = b"\xee", b"\xf3\x6e"
COM1 = 0x3F8
STRING = ioio_word(COM1, 1, is_in=False, string=True, rep=True, segment=3)


def chapter(say: Callable[[str], object]) -> None:
    """Launch a SEV-ES guest, let it print through its GHCB, then change its save area and enter it again."""
    config = MachineConfig(
        plugins=("io", "sme", "sev", "sev_es"),
        guests=(GuestConfig(memory_bytes=1 << 20),),
        options={"sev_es": {"guest": "linux"}},
    )
    machine = Machine(config)
    launch_guest(machine, 0, policy=Policy.ES, loads={TEXT_GPA: LINE.ljust(64, b"\0")}, vmsas=[initial_vmsa()])
    set_up_vcpus(machine, 0)
    vcpu = machine.vcpus[0]
    machine.apply(Schedule())
    vcpu.system.cs, vcpu.system.efer = LONG_MODE_CS, LONG_MODE_EFER
    outcome = machine.apply(GuestSetup(0, GHCB_GPA))
    answer = outcome.first(MsrReply)
    if answer is not None:
        say(f"   Over the MSR: {answer.request:#x} -> {answer.value:#x} (versions 1 to 2, C-bit 51)\n")
    _print(machine, say, LINE[:2])
    _print_string(machine, vcpu, say)
    board: Any = machine.components["io"]  # whose devices these are is no business of this plugin
    say(f"\n   The serial port has got: {board.vms[0].uart.output.decode()!r}")
    _tamper(machine, vcpu, say)


def _describe(say: Callable[[str], object], outcome: Outcome) -> None:
    for record in outcome.records:
        if isinstance(record, VcDelivered):
            say(f"   guest       #VC, error code {exit_name(record.error_code)}")
        elif isinstance(record, GhcbRequest):
            fields = ", ".join(f"{name}={value:#x}" for name, value in record.fields)
            say(f"   guest       GHCB: info 1 {record.info_1:#x}, info 2 {record.info_2}, valid {fields}")
        elif isinstance(record, VmExit):
            say(f"   hypervisor  #VMEXIT {exit_name(record.exit_code)}")
        elif isinstance(record, GhcbReply):
            say(f"   hypervisor  reply: info 1 {record.info_1}, info 2 {record.info_2}")


def _print(machine: Machine, say: Callable[[str], object], text: bytes) -> None:
    """One OUT for each byte."""
    for number, byte in enumerate(text):
        machine.apply(SetRegisters(0, (("rax", byte), ("rdx", COM1), ("rip", 0x1000))))
        outcome = machine.apply(CpuExit(0, ExitCode.IOIO, ioio_word(COM1, 1, is_in=False), 0, OUT, 0))
        if not number:
            say(f"   The guest executes OUT DX, AL with {chr(byte)!r}:")
            _describe(say, outcome)


def _print_string(machine: Machine, vcpu: Vcpu, say: Callable[[str], object]) -> None:
    """The rest by REP OUTSB: its private memory goes through the shared buffer."""
    registers = {"rsi": TEXT_GPA + 2, "rcx": len(LINE) - 2, "rdx": COM1, "rip": 0x1002}
    machine.apply(SetRegisters(0, tuple(registers.items())))
    say("\n   The guest executes REP OUTSB with the rest of the line, out of its private memory:")
    outcome = machine.apply(CpuExit(0, ExitCode.IOIO, STRING, 0, REP_OUTS, 0))
    _describe(say, outcome)
    gpa = machine.access.translate_gpa(vcpu, TEXT_GPA)
    seen = machine.apply(MemoryRead(Party.HYPERVISOR, 0, Space.SPA, gpa or 0, False, 16)).first(Data)
    if seen is not None:
        say(f"   hypervisor  reads that memory: {seen.data.hex(' ', 4)}")


def _tamper(machine: Machine, vcpu: Vcpu, say: Callable[[str], object]) -> None:
    """A byte of the save area, changed in its ciphertext."""
    rax_spa = vcpu.vmcb.vmsa_pa + 0x1F8
    say("\n   The hypervisor changes one byte of the guest's save area and executes VMRUN:")
    machine.apply(MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, rax_spa, False, b"\x41"))
    outcome = machine.apply(Schedule())
    refused = outcome.first(VmExit)
    if refused is not None:
        say(f"   hypervisor  #VMEXIT {exit_name(refused.exit_code)}: the guest never runs again")
