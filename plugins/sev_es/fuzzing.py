"""What fuzzing of the GHCB needs, as data: what a VMGEXIT carries, and targets with guests that run."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from sevlab.core.config import GuestConfig
from sevlab.core.cpu import VmcbControl
from sevlab.core.events import CpuExit, Party, Schedule, SetRegisters, VmcbWrite
from sevlab.core.exitinfo import IoioInfo, ioio_word
from sevlab.core.layout import Layout, bits, flag, u8, u32, u64
from sevlab.core.oracle import StateCounter, Target
from sevlab.core.payload import Message, Payload
from sevlab.core.svm import ExitCode
from sevlab.core.units import PAGE_MASK
from sevlab.core.vocabulary import Record
from sevlab.plugins.sev import Policy, launch_guest
from sevlab.plugins.sev_es.ghcb import SHARED_BUFFER_OFFSET, Ghcb, NaeCode
from sevlab.plugins.sev_es.io_events import SHARED_BUFFER
from sevlab.plugins.sev_es.matrix import ALL, event_name
from sevlab.plugins.sev_es.msr_layout import INFO_MASK, LAYOUTS, MsrInfo
from sevlab.plugins.sev_es.msr_requests import REQUESTS
from sevlab.plugins.sev_es.oracles import ORACLES
from sevlab.plugins.sev_es.profiles import initial_vmsa
from sevlab.plugins.sev_es.records import ForgeReply, GuestSetup, Vmgexit
from sevlab.plugins.sev_es.startup import set_up_vcpus
from sevlab.plugins.sev_es.states import Hold, SevEsState, sev_es_state

if TYPE_CHECKING:
    from sevlab.core.machine import Machine
    from sevlab.plugins.sev_es.declare import NaeEvent

GHCB_GPA = 0x5000
"""Where fuzzed guests have their GHCB."""

BUFFER_GPA = GHCB_GPA + SHARED_BUFFER_OFFSET
"""Their shared buffer."""

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


def _examples(event: NaeEvent) -> tuple[dict[str, int | None], ...]:
    """The values that the event's declaration names: each input at its limits, past them, and not marked valid."""
    return tuple(
        {
            name: BUFFER_GPA if value == SHARED_BUFFER else value
            for name, value in {**case.given, case.field: case.value}.items()
        }
        for case in event.cases
    )


class EventInjection(Layout, size=8):
    """EVENTINJ of the VMCB."""

    vector = u8(0x0, source="24593, 15.20")
    type = bits(0x1, u8, 2, 0, values=(0, 2, 3, 4), source="24593, 15.20")
    error_valid = flag(0x1, u8, 3, source="24593, 15.20")
    valid = flag(0x3, u8, 7, source="24593, 15.20")
    error_code = u32(0x4, source="24593, 15.20")


class ReplyWord(Layout, size=8):
    """A field of the GHCB as a forger writes it."""

    word = u64(0x0, source="56421, GHCB layout")


FORGED_AT = {
    Ghcb.FIELDS[name].offset: name
    for name in ("rax", "rbx", "rcx", "rdx", "sw_exit_info_1", "sw_exit_info_2", "valid_bitmap")
}
"""What a #VC handler reads of a reply."""

EVENTS = ((2, 2), (6, 3), (13, 3), (14, 3), (28, 3), (29, 3), (0x20, 0), (0x80, 0), (0x80, 4), (0xFF, 0))
"""Vectors and types that mean something: NMI, exceptions, #HV, #VC, the first and the last interrupt, INT 80h."""

EVENTINJ_AT = VmcbControl.FIELDS["event_inj"].offset

UNITS: dict[int, dict[str, str | type[Layout]]] = {
    ExitCode.IOIO: {"sw_exit_info_1": IoioInfo, "sw_scratch": "gpa"},
    ExitCode.MSR: {"rcx": "msr"},
    ExitCode.CPUID: {"rax": "leaf"},
    NaeCode.MMIO_READ: {"sw_exit_info_1": "mmio", "sw_scratch": "gpa"},
    NaeCode.MMIO_WRITE: {"sw_exit_info_1": "mmio", "sw_scratch": "gpa"},
}
"""What the numbers of some events are."""

HOSTILE: tuple[Payload, ...] = (
    Payload(
        "vmcb",
        "data",
        lambda record: record.offset if isinstance(record, VmcbWrite) and record.offset == EVENTINJ_AT else None,
        (
            Message(
                EVENTINJ_AT,
                "EVENTINJ",
                EventInjection,
                {"offset": EVENTINJ_AT},
                {"valid": 1},
                ("vector", "type", "error_valid", "error_code"),
                examples=tuple({"vector": vector, "type": kind} for vector, kind in EVENTS),
            ),
        ),
    ),
    Payload(
        "sev_es.forge",
        "data",
        lambda record: record.offset if isinstance(record, ForgeReply) and record.offset in FORGED_AT else None,
        tuple(
            Message(offset, name, ReplyWord, {"offset": offset}, needs=("word",)) for offset, name in FORGED_AT.items()
        ),
    ),
)
"""What a hostile hypervisor writes: an event to inject, a field of a reply."""

GUEST_PAYLOADS: tuple[Payload, ...] = (
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
                    **({} if event.scratch is None else {"sw_scratch": BUFFER_GPA}),
                },
                event.inputs,
                UNITS.get(code, {}),
                _examples(event),
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

PAYLOADS = (*GUEST_PAYLOADS, *HOSTILE)

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
    """A VMGEXIT of each declared event, and what a boot does: negotiation, strings, a second vCPU, timer, x2APIC."""
    pages, requests = GUEST_PAYLOADS
    singles = [Vmgexit(0, GHCB_GPA, Ghcb.build(**message.fields)) for message in pages.messages]
    start = [
        Vmgexit(0, int.from_bytes(message.layout.build(**message.fields), "little"), b"")
        for message in sorted(requests.messages, key=lambda message: message.number == MsrInfo.AP_RESET_HOLD_REQUEST)
        if message.layout is not None
    ]
    hold = _request(NaeCode.AP_RESET_HOLD)
    holds = (Vmgexit(1, GHCB_GPA, hold), Vmgexit(1, int(MsrInfo.AP_RESET_HOLD_REQUEST), b""))
    wake = (_wake(INIT_OTHERS), _wake(START_OTHERS))
    starts = tuple((*wake, held, *wake) for held in holds)  # out of the launch state first, then out of the hold
    strings = ((_string(is_in=False),), (_string(is_in=True),))
    timer = _ask(ExitCode.IOIO, ioio_word(TIMER_PORT, 1, is_in=True))
    clock = (_ask(ExitCode.IOIO, ioio_word(TIMER_PORT + 3, 1, is_in=False), rax=0x34), timer, timer)
    x2apic = (_ask(ExitCode.MSR, 1, rcx=APIC_BASE, rax=APIC_BASE_X2APIC, rdx=0), _ask(ExitCode.MSR, rcx=X2APIC_ID))
    return (tuple(start), *starts, *strings, clock, x2apic, *((step,) for step in (*singles, *start)))


TIMER_PORT = 0x40
APIC_BASE, APIC_BASE_X2APIC, X2APIC_ID = 0x1B, 0xFEE0_0D00, 0x802
"""Ports of the 8254; the register that switches x2APIC on, its value, and the first that Linux reads then."""


def _request(code: int, info_1: int = 0, info_2: int = 0, **fields: int) -> bytes:
    return Ghcb.build(sw_exit_code=code, sw_exit_info_1=info_1, sw_exit_info_2=info_2, protocol_version=2, **fields)


def _ask(code: int, info_1: int = 0, info_2: int = 0, **fields: int) -> Vmgexit:
    return Vmgexit(0, GHCB_GPA, _request(code, info_1, info_2, **fields))


def guest_seeds(_machine: Machine) -> tuple[tuple[Record, ...], ...]:
    """What a guest does early: CPUID, a port, a register, the clock, its caches; in user space CPUID, an interrupt."""
    registers = SetRegisters(0, (("rax", 1), ("rcx", 0), ("rdx", 0x3F8), ("rip", 0x1000)))
    exits = (
        CpuExit(0, ExitCode.CPUID, 0, 0, b"\x0f\xa2", 0),
        CpuExit(0, ExitCode.IOIO, 0x03F8_0010, 0, b"\xee", 0),
        CpuExit(0, ExitCode.IOIO, 0x03F8_0011, 0, b"\xec", 0),
        CpuExit(0, ExitCode.MSR, 0, 0, b"\x0f\x32", 0),
        CpuExit(0, ExitCode.RDTSC, 0, 0, b"\x0f\x31", 0),
        CpuExit(0, ExitCode.WBINVD, 0, 0, b"\x0f\x09", 0),
    )
    user = SetRegisters(0, (("cpl", 3), ("rax", 1), ("rcx", 0), ("rip", 0x1000)))
    tick = (user, VmcbWrite(0, EVENTINJ_AT, EventInjection.build(vector=0x20, valid=1)), Schedule())
    return (*((registers, exit_) for exit_ in exits), (user, exits[0]), tick)


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
        ("exit", "registers", "sev_es.vc-setup", "sev_es.ap-hold", "vmcb", *_FAULTS),
        tuple(name for name in ORACLE_NAMES if name != "sev_es.vcpu"),  # which judges an honest hypervisor
        ("io", "sev_es"),
        "A guest's #VC handler against a hostile hypervisor that forges replies, events and mappings.",
        guests=GUESTS,
        options={"sev_es": {"guest": "linux"}},
        boot=boot_guest,
        seeds=guest_seeds,
    ),
)
