"""The kernel's records: what the boundaries of a machine carry before any feature adds its own.

How records are declared, and what the roles of their fields mean, is in `core.vocabulary`.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import NamedTuple

from sevlab.core.vocabulary import Boundary, Checked, Derived, Input, outcome, step

# Values that records carry ----------------------------------------------------------------------------------------


class Space(IntEnum):
    """How an address is meant."""

    SPA = 0
    GPA = 1
    GVA = 2


class Party(IntEnum):
    """Who acts. Source: the table of actors in docs/architecture.md."""

    GUEST = 0
    HYPERVISOR = 1
    ASP = 2
    DMA = 3


class MapFlag(IntFlag):
    """Attributes of a nested mapping."""

    WRITABLE = 1
    USER = 2
    NO_EXECUTE = 4
    C_BIT = 8
    UNMAP = 16


class Fault(NamedTuple):
    """An exception as a value: `vector`, its error code, and the address for #PF (CR2) or #NPF (guest-physical).

    `vector` is an exception vector, or 0x400 for a nested page fault, which is not the guest's but the hypervisor's.
    """

    vector: int
    error_code: int
    address: int


# Steps of the kernel ----------------------------------------------------------------------------------------------


@step("exit", Boundary.CPU)
class CpuExit(NamedTuple):
    """A guest does something that may be intercepted.

    `exit_code`: SVM exit code (64 bit); `exit_info_1`, `exit_info_2`: as EXITINFO1/2; `insn`: the instruction's bytes
    (0 to 15); `next_rip`: address after it, 0 when the CPU has no NRIP save.
    """

    vcpu: Input[int]
    exit_code: Input[int]
    exit_info_1: Input[int]
    exit_info_2: Input[int]
    insn: Input[bytes]
    next_rip: Input[int]


@step("guest-exit", Boundary.CPU)
class GuestExit(NamedTuple):
    """A guest exits, as another hypervisor's log shows it: what the log does not show is not known.

    `rip`, `cs_base`: where the guest is; `exit_code`, `exit_info_1`, `exit_info_2`, `insn`: as in `CpuExit`; `mode`:
    16, 32 or 64 bit code, 0 unknown; `event`: EXITINTINFO, 0 when not valid; `registers`: values that the log shows;
    `stored`: what the instruction stored from registers, in order; `answers`: what the world outside gave it, in
    order; `refused`: the other hypervisor's processor does not have the register; `arrivals`: interrupts that came
    before the next entry, as (0, vector, level) for a message to the local APIC, (1, line, level) for a line of the
    board, and (2, line, level) for one that changed after the port access; `ended`: the guest ended an interrupt
    through shared memory before; `interruptible`: the guest can take an interrupt at the next entry.
    """

    vcpu: Input[int]
    rip: Input[int]
    exit_code: Input[int]
    exit_info_1: Input[int]
    exit_info_2: Input[int]
    insn: Input[bytes]
    mode: Input[int]
    cs_base: Input[int]
    event: Input[int]
    registers: Input[tuple[tuple[str, int], ...]]
    stored: Input[tuple[int, ...]]
    answers: Input[tuple[int, ...]]
    refused: Input[bool]
    arrivals: Input[tuple[tuple[int, int, int], ...]]
    ended: Input[bool]
    interruptible: Input[bool]


@step("registers", Boundary.CPU)
class SetRegisters(NamedTuple):
    """The guest has these values in its registers: `values` pairs a register name with a 64-bit number."""

    vcpu: Input[int]
    values: Input[tuple[tuple[str, int], ...]]


@step("read", Boundary.MEMORY)
class MemoryRead(NamedTuple):
    """`party` reads; `space` says what `address` is; `c_bit` is the C-bit of the access where the party chooses it."""

    party: Input[int]
    vcpu: Input[int]
    space: Input[int]
    address: Input[int]
    c_bit: Input[bool]
    length_bytes: Input[int]


@step("write", Boundary.MEMORY)
class MemoryWrite(NamedTuple):
    """`party` writes `data`; the other fields as in `MemoryRead`."""

    party: Input[int]
    vcpu: Input[int]
    space: Input[int]
    address: Input[int]
    c_bit: Input[bool]
    data: Input[bytes]


@step("npt", Boundary.MEMORY)
class NptEdit(NamedTuple):
    """The hypervisor maps (or unmaps, by `flags`) guest page `gpa` of VM `vm` to `spa`."""

    vm: Input[int]
    gpa: Input[int]
    spa: Input[int]
    page_bytes: Input[int]
    flags: Input[int]


@step("vmcb", Boundary.CPU)
class VmcbWrite(NamedTuple):
    """The hypervisor writes `data` at byte `offset` of the vCPU's VMCB control area before the next VMRUN."""

    vcpu: Input[int]
    offset: Input[int]
    data: Input[bytes]


@step("msr", Boundary.CPU)
class HostMsr(NamedTuple):
    """The host reads (`write` False) or writes a model-specific register of the machine, at CPL 0."""

    msr: Input[int]
    write: Input[bool]
    value: Input[int]


@step("cpuid", Boundary.CPU)
class HostCpuid(NamedTuple):
    """The host executes CPUID."""

    leaf: Input[int]
    subleaf: Input[int]


@step("cache", Boundary.MEMORY)
class CacheOp(NamedTuple):
    """The host executes WBINVD, INVD or CLFLUSH of the page at `spa` (mnemonic in `operation`, lower case)."""

    operation: Input[str]
    spa: Input[int]


@step("asp.read", Boundary.ASP)
class AspRegisterRead(NamedTuple):
    """The driver reads 4 bytes at `offset` of the ASP's register BAR."""

    offset: Input[int]


@step("asp.write", Boundary.ASP)
class AspRegisterWrite(NamedTuple):
    """The driver writes 4 bytes at `offset` of the ASP's register BAR."""

    offset: Input[int]
    value: Input[int]


@step("asp.command", Boundary.ASP)
class AspCommand(NamedTuple):
    """The driver runs one mailbox command on `interface`: buffer to memory at `spa`, handshake, buffer back."""

    interface: Input[str]
    command: Input[int]
    spa: Input[int]
    buffer: Input[bytes]


@step("race", Boundary.SCHEDULER)
class Race(NamedTuple):
    """At fetch number `before_fetch` (from 1) of shared memory in the next step, another party writes `data`."""

    before_fetch: Input[int]
    spa: Input[int]
    data: Input[bytes]


@step("advance", Boundary.SCHEDULER)
class AdvanceClock(NamedTuple):
    """`ticks` of the virtual time-stamp counter pass."""

    ticks: Input[int]


@step("schedule", Boundary.SCHEDULER)
class Schedule(NamedTuple):
    """The hypervisor picks the next vCPU and enters it."""


# Outcomes of the kernel -------------------------------------------------------------------------------------------


@outcome("data", Boundary.MEMORY)
class Data(NamedTuple):
    """The bytes that a read gave."""

    data: Checked[bytes]


@outcome("value", Boundary.CPU)
class Value(NamedTuple):
    """The number that a register read gave (64 bit)."""

    value: Checked[int]


@outcome("cpuid-result", Boundary.CPU)
class CpuidResult(NamedTuple):
    """EAX, EBX, ECX, EDX of a CPUID."""

    eax: Checked[int]
    ebx: Checked[int]
    ecx: Checked[int]
    edx: Checked[int]


@outcome("faulted", Boundary.CPU)
class Faulted(NamedTuple):
    """The access or instruction ended in an exception (`Fault`); nothing else happened."""

    vector: Checked[int]
    error_code: Checked[int]
    address: Checked[int]


@outcome("vmexit", Boundary.CPU)
class VmExit(NamedTuple):
    """The hardware left the guest: what the hypervisor finds in the VMCB."""

    vcpu: Derived[int]
    exit_code: Checked[int]
    exit_info_1: Checked[int]
    exit_info_2: Checked[int]


@outcome("resumed", Boundary.CPU)
class Resumed(NamedTuple):
    """The hypervisor entered the guest again at `rip`."""

    vcpu: Derived[int]
    rip: Checked[int]


@outcome("injected", Boundary.CPU)
class Injected(NamedTuple):
    """The guest was entered with this event (EVENTINJ format, 64 bit)."""

    vcpu: Derived[int]
    event: Checked[int]


@outcome("not-intercepted", Boundary.CPU)
class NotIntercepted(NamedTuple):
    """The VMCB does not intercept this: the guest's own business, the hypervisor sees nothing."""

    vcpu: Derived[int]
    exit_code: Checked[int]


@outcome("unhandled", Boundary.CPU)
class Unhandled(NamedTuple):
    """The hypervisor has no handler for this exit: a plugin is missing, or the exit should not be intercepted."""

    vcpu: Derived[int]
    exit_code: Checked[int]


@outcome("stopped", Boundary.CPU)
class Stopped(NamedTuple):
    """The VM will not run again; `reason` in the words of the model."""

    vm: Derived[int]
    reason: Checked[str]


@outcome("scheduled", Boundary.SCHEDULER)
class Scheduled(NamedTuple):
    """The vCPU that runs now."""

    vcpu: Checked[int]


@outcome("supplied", Boundary.DEVICE)
class Supplied(NamedTuple):
    """A value that the model did not determine was taken from the step; `what` says which."""

    what: Derived[str]


@outcome("asp-status", Boundary.ASP)
class AspStatus(NamedTuple):
    """A mailbox command is done: `status` as the interface numbers it, `buffer` the command buffer afterwards."""

    command: Derived[int]
    status: Checked[int]
    buffer: Checked[bytes]


@outcome("refused", Boundary.FAULT)
class Refused(NamedTuple):
    """The step means nothing to this machine (no such vCPU, no handler, impossible value); nothing changed."""

    reason: Checked[str]


@outcome("done", Boundary.FAULT)
class Done(NamedTuple):
    """The step took effect and the other side answered nothing."""


KERNEL_RECORDS: tuple[type, ...] = (
    CpuExit,
    GuestExit,
    SetRegisters,
    MemoryRead,
    MemoryWrite,
    NptEdit,
    VmcbWrite,
    HostMsr,
    HostCpuid,
    CacheOp,
    AspRegisterRead,
    AspRegisterWrite,
    AspCommand,
    Race,
    AdvanceClock,
    Schedule,
    Data,
    Value,
    CpuidResult,
    Faulted,
    VmExit,
    Resumed,
    Injected,
    NotIntercepted,
    Unhandled,
    Scheduled,
    Stopped,
    Supplied,
    AspStatus,
    Refused,
    Done,
)
