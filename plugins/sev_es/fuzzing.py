"""What fuzzing of the GHCB needs, as data: what a VMGEXIT carries, targets with guests that run, and oracles."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from sevlab.core.config import GuestConfig
from sevlab.core.cpu import CONTROL_SEV_ES
from sevlab.core.events import CpuExit, Party, Schedule, SetRegisters
from sevlab.core.exitinfo import IoioInfo, ioio_word
from sevlab.core.layout import Layout
from sevlab.core.oracle import Finding, Oracle, StateCounter, Target
from sevlab.core.payload import Message, Payload
from sevlab.core.svm import ExitCode
from sevlab.core.units import PAGE_MASK
from sevlab.core.vocabulary import Outcome, Record, spec_of
from sevlab.plugins.sev import Policy, launch_guest
from sevlab.plugins.sev_es.ghcb import SHARED_BUFFER_OFFSET, Ghcb, NaeCode
from sevlab.plugins.sev_es.insn import MNEMONICS, decode
from sevlab.plugins.sev_es.matrix import ALL, event_name
from sevlab.plugins.sev_es.msr_layout import INFO_MASK, LAYOUTS, MsrInfo
from sevlab.plugins.sev_es.msr_requests import REQUESTS
from sevlab.plugins.sev_es.profiles import initial_vmsa
from sevlab.plugins.sev_es.records import GhcbRequest, GuestSetup, VcDelivered, Vmgexit
from sevlab.plugins.sev_es.startup import set_up_vcpus
from sevlab.plugins.sev_es.states import Hold, SevEsState, sev_es_state

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

GHCB_GPA = 0x5000
"""Where fuzzed guests have their GHCB."""

CODE = Ghcb.FIELDS["sw_exit_code"]


def _page_message(record: Record) -> int | None:
    if not isinstance(record, Vmgexit) or record.ghcb_msr & INFO_MASK:
        return None
    return int.from_bytes(record.page[CODE.offset : CODE.offset + 8], "little")


def _msr_message(record: Record) -> int | None:
    if not isinstance(record, Vmgexit) or not record.ghcb_msr & INFO_MASK:
        return None
    return record.ghcb_msr & INFO_MASK


def _place(machine: Machine, record: Record) -> int | None:
    """SPA of the GHCB that a VMGEXIT names."""
    vcpu = machine.vcpus.get(getattr(record, "vcpu", -1))
    msr = getattr(record, "ghcb_msr", 0)
    return None if vcpu is None or msr & PAGE_MASK else machine.access.translate_gpa(vcpu, msr)


UNITS: dict[int, dict[str, str | type[Layout]]] = {
    ExitCode.IOIO: {"sw_exit_info_1": IoioInfo, "sw_scratch": "gpa"},
    ExitCode.MSR: {"rcx": "msr"},
    ExitCode.CPUID: {"rax": "leaf"},
    NaeCode.MMIO_READ: {"sw_exit_info_1": "mmio", "sw_scratch": "gpa"},
    NaeCode.MMIO_WRITE: {"sw_exit_info_1": "mmio", "sw_scratch": "gpa"},
}
"""What the numbers of some events are."""

PAYLOADS: tuple[Payload, ...] = (
    Payload(
        "sev_es.vmgexit",
        "page",
        _page_message,
        tuple(
            Message(
                int(code),
                event_name(code),
                Ghcb,
                {"ghcb_msr": GHCB_GPA},
                {
                    "sw_exit_code": int(code),
                    "sw_exit_info_1": 0,
                    "sw_exit_info_2": 0,
                    "protocol_version": 2,
                    **event.example,
                    **({} if event.scratch is None else {"sw_scratch": GHCB_GPA + SHARED_BUFFER_OFFSET}),
                },
                event.inputs,
                UNITS.get(code, {}),
            )
            for code, event in sorted(ALL.items())
        ),
        layout=Ghcb,
        place_of=_place,
    ),
    Payload(
        "sev_es.vmgexit",
        "ghcb_msr",
        _msr_message,
        tuple(
            Message(int(info), MsrInfo(info).name, LAYOUTS[info], fields={"info": int(info)})
            for info in sorted(REQUESTS)
        ),
    ),
)


# Oracles --------------------------------------------------------------------------------------------------------------

X87, SSE, AVX = 1, 2, 4


class VcpuInvariants:
    """What the hypervisor keeps of an encrypted vCPU is architecturally possible."""

    name = "sev_es.vcpu"
    after = ("sev_es.vmgexit",)
    documentation = (
        "XCR0 that a guest reports has x87 set, AVX only with SSE; a vCPU that runs under SEV-ES has a save area at an"
        " aligned address. Source: 24594, XSETBV; 24593, 15.35 (VMRUN); KVM's sync of XCR0 from the GHCB."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        wrong: list[tuple[str, str]] = []
        for vcpu_id, vcpu in machine.vcpus.items():
            xcr0, vmcb = vcpu.system.xcr0, vcpu.vmcb
            if not xcr0 & X87 or (xcr0 & AVX and not xcr0 & SSE):
                wrong.append(("xcr0", f"vCPU {vcpu_id}: XCR0 is {xcr0:#x}"))
            if vcpu.stopped or vcpu.halted or not vmcb.encryption_control & CONTROL_SEV_ES:
                continue
            if vmcb.vmsa_pa & PAGE_MASK or vmcb.vmsa_pa >= machine.memory.size_bytes:
                wrong.append(("vmsa", f"vCPU {vcpu_id} runs with a save area at {vmcb.vmsa_pa:#x}"))
        return tuple([Finding(self.name, rule, message, spec_of(step).kind) for rule, message in wrong])

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        return ()


class PrivateMmio:
    """The reference guest never asks for a device access to its own private memory."""

    name = "sev_es.private-mmio"
    documentation = (
        "A #VC handler does not emulate an access to memory that is the guest's own: the hypervisor would see, or give,"
        " what is private. Source: edk2 85b8eac59b; arXiv 2010.07094; Linux vc_do_mmio."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        findings = []
        for record in outcome.records:
            if isinstance(record, GhcbRequest) and record.exit_code in {NaeCode.MMIO_READ, NaeCode.MMIO_WRITE}:
                vm = machine.vm_of(machine.vcpus[record.vcpu])
                if record.info_1 < vm.memory_bytes:
                    message = f"a device access to private memory at {record.info_1:#x}"
                    findings.append(Finding(self.name, "private", message, f"{record.exit_code:#x}"))
        return tuple(findings)

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        return ()


class VcProvenance:
    """The reference guest asks its hypervisor only for what its own instruction means, and user code gets no kernel's.

    The instruction is the step's, which the hypervisor does not choose; the claimed code is.
    """

    name = "sev_es.provenance"
    after = ("exit",)
    documentation = (
        "A #VC handler sends a request only when the bytes at RIP are an instruction that can raise this exit code."
        " Source: Linux vc_check_opcode_bytes (CVE-2024-25742); edk2 VmgExitLib."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        if not isinstance(step, CpuExit) or outcome.first(VcDelivered) is None:
            return ()
        request = outcome.first(GhcbRequest)
        expected = MNEMONICS.get(step.exit_code)
        vcpu = machine.vcpus.get(step.vcpu)
        if request is None or expected is None or vcpu is None:
            return ()
        sixty_four = vcpu.system.cs[1] & 0x200 and vcpu.system.efer & 0x100
        insn = decode(step.insn[:15], 64 if sixty_four else 32 if vcpu.system.cs[1] & 0x400 else 16)
        if insn is not None and insn.mnemonic in expected:
            return ()
        found = "no instruction" if insn is None else insn.mnemonic
        message = f"#VC {step.exit_code:#x} was served at {found}"
        return (Finding(self.name, "opcode", message, f"{step.exit_code:#x}"),)

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        return ()


ORACLES: tuple[Oracle, ...] = (VcpuInvariants(), VcProvenance(), PrivateMmio())
ORACLE_NAMES = tuple(oracle.name for oracle in ORACLES)

# State feedback -------------------------------------------------------------------------------------------------------


def _vcpus(machine: Machine) -> tuple[Hashable, ...]:
    state: SevEsState = machine.components["sev_es"]  # type: ignore[assignment]  # asked after every step
    return tuple([(vcpu.hold, vcpu.started, vcpu.registered_gpa) for vcpu in state.vcpus.values()])


def _vcpu_words(raw: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(f"{Hold(hold).name}{int(started)}{int(gpa >= 0)}" for hold, started, gpa in raw)


def _stages(machine: Machine) -> tuple[Hashable, ...]:
    state: SevEsState = machine.components["sev_es"]  # type: ignore[assignment]
    return tuple([vcpu.stage for vcpu in state.order.vcpus.values()])


COUNTERS: tuple[StateCounter, ...] = (
    StateCounter("sev_es.hold", _vcpus, _vcpu_words, lambda machine: (sev_es_state(machine).vcpus,)),
    StateCounter("sev_es.conversation", _stages, of=lambda machine: (sev_es_state(machine).order,)),
)

# Targets --------------------------------------------------------------------------------------------------------------

GUESTS = (GuestConfig(name="first", vcpus=2, memory_bytes=1 << 20), GuestConfig(name="second", memory_bytes=1 << 20))
LONG_MODE_CS, LONG_MODE_EFER = (8, 0x29B, 0xFFFF_FFFF, 0), 0x1501


def boot(machine: Machine) -> None:
    """Both guests launched under SEV-ES and entered."""
    for vm_id, vm in list(machine.hypervisor.vms.items()):
        launch_guest(machine, vm_id, policy=Policy.ES, vmsas=[initial_vmsa()] * len(vm.vcpu_ids))
        set_up_vcpus(machine, vm_id)
    for _ in machine.vcpus:
        machine.apply(Schedule())


def boot_guest(machine: Machine) -> None:
    """As `boot`, in 64-bit mode, and each guest's first vCPU has its GHCB."""
    boot(machine)
    for vm in machine.hypervisor.vms.values():
        vcpu = machine.vcpus[vm.vcpu_ids[0]]
        vcpu.system.cs, vcpu.system.efer = LONG_MODE_CS, LONG_MODE_EFER
        machine.apply(GuestSetup(vcpu.vcpu_id, GHCB_GPA))


ICR, INIT_OTHERS, START_OTHERS = 0xFEE0_0300, 0xC4500, 0xC4608
"""The local APIC's interrupt command register, and what wakes all other processors. Source: 24593, 16.5."""


def _wake(command: int) -> Vmgexit:
    """The first vCPU writes `command` to its local APIC."""
    buffer = command.to_bytes(4, "little") + bytes(Ghcb.FIELDS["shared_buffer"].length_bytes - 4)
    scratch = GHCB_GPA + SHARED_BUFFER_OFFSET
    page = Ghcb.build(
        sw_exit_code=NaeCode.MMIO_WRITE, sw_exit_info_1=ICR, sw_exit_info_2=4, sw_scratch=scratch, shared_buffer=buffer
    )
    return Vmgexit(0, GHCB_GPA, page)


SERIAL_PORT = 0x3F8
TEXT = b"hello from a guest"


def _string(*, is_in: bool) -> Vmgexit:
    """A string of bytes to or from the serial port, through the buffer in the GHCB."""
    buffer = TEXT + bytes(Ghcb.FIELDS["shared_buffer"].length_bytes - len(TEXT))
    page = Ghcb.build(
        sw_exit_code=ExitCode.IOIO,
        sw_exit_info_1=ioio_word(SERIAL_PORT, 1, is_in=is_in, string=True, rep=True),
        sw_exit_info_2=len(TEXT),
        sw_scratch=GHCB_GPA + SHARED_BUFFER_OFFSET,
        shared_buffer=buffer,
    )
    return Vmgexit(0, GHCB_GPA, page)


def ghcb_seeds(_machine: Machine) -> tuple[tuple[Record, ...], ...]:
    """A VMGEXIT of each declared event, strings, the usual start of a conversation, and the start of a second vCPU."""
    pages, requests = PAYLOADS
    singles = [Vmgexit(0, GHCB_GPA, Ghcb.build(**message.fields)) for message in pages.messages]
    start = [
        Vmgexit(0, int.from_bytes(message.layout.build(**message.fields), "little"), b"")
        for message in sorted(requests.messages, key=lambda message: message.number == MsrInfo.AP_RESET_HOLD_REQUEST)
        if message.layout is not None
    ]
    hold = Ghcb.build(sw_exit_code=NaeCode.AP_RESET_HOLD, sw_exit_info_1=0, sw_exit_info_2=0)
    holds = (Vmgexit(1, GHCB_GPA, hold), Vmgexit(1, int(MsrInfo.AP_RESET_HOLD_REQUEST), b""))
    wake = (_wake(INIT_OTHERS), _wake(START_OTHERS))
    starts = tuple((*wake, held, *wake) for held in holds)  # out of the launch state first, then out of the hold
    strings = ((_string(is_in=False),), (_string(is_in=True),))
    return (tuple(start), *starts, *strings, *((step,) for step in (*singles, *start)))


def guest_seeds(_machine: Machine) -> tuple[tuple[Record, ...], ...]:
    """What a guest does early: CPUID, a port, a register, device memory."""
    registers = SetRegisters(0, (("rax", 1), ("rcx", 0), ("rdx", 0x3F8), ("rip", 0x1000)))
    exits = (
        CpuExit(0, ExitCode.CPUID, 0, 0, b"\x0f\xa2", 0),
        CpuExit(0, ExitCode.IOIO, 0x03F8_0010, 0, b"\xee", 0),
        CpuExit(0, ExitCode.IOIO, 0x03F8_0011, 0, b"\xec", 0),
        CpuExit(0, ExitCode.MSR, 0, 0, b"\x0f\x32", 0),
        CpuExit(0, ExitCode.RDTSC, 0, 0, b"\x0f\x31", 0),
        CpuExit(0, ExitCode.WBINVD, 0, 0, b"\x0f\x09", 0),
    )
    return tuple((registers, exit_) for exit_ in exits)


_FAULTS = ("sev_es.forge", "sev_es.forge-msr", "sev_es.vc-nmi", "npt", "schedule", "race")

TARGETS: tuple[Target, ...] = (
    Target(
        "ghcb",
        Party.GUEST,
        ("sev_es.vmgexit", "race", "write", "advance", "schedule"),
        ORACLE_NAMES,
        ("io", "sev_es"),
        "A hypervisor's GHCB and MSR-protocol handling, against a hostile guest whose vCPUs race.",
        guests=GUESTS,
        boot=boot,
        seeds=ghcb_seeds,
    ),
    Target(
        "vc",
        Party.HYPERVISOR,
        ("exit", "registers", "sev_es.vc-setup", "sev_es.ap-hold", *_FAULTS),
        ORACLE_NAMES,
        ("io", "sev_es"),
        "A guest's #VC handler against a hostile hypervisor that forges replies, events and mappings.",
        guests=GUESTS,
        options={"sev_es": {"guest": "linux"}},
        boot=boot_guest,
        seeds=guest_seeds,
    ),
)
