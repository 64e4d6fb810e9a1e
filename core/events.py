"""The record vocabulary: everything that crosses a trust boundary.

A *step* is one stimulus at a boundary; applying it to a machine yields an *outcome*: the records that the other side
produced. A test case is a list of steps, a trace is steps with recorded outcomes. There is no second vocabulary.

A record is a `NamedTuple` declared once with `@step` or `@outcome`; its fields say in their type what part they play:

- `Input`: comes from outside the model (device data, time, a choice of the untrusted side); replay feeds it;
- `Checked`: the model determines it; replay compares it;
- `Derived`: follows from the others, kept for readers.

On the wire a record is the msgpack array `[kind, field, ...]`. Kinds are names with the plugin in front
(`sev_es.vmgexit`); the kernel's own have none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, IntEnum, IntFlag
from typing import Annotated, Any, NamedTuple, TypeAlias, TypeVar, cast, get_args, get_origin, get_type_hints

from sevlab.core.errors import PluginError, TraceFormatError
from sevlab.core.units import MASK64

T = TypeVar("T")


class Role(Enum):
    """What part a field plays in replay."""

    INPUT = "input"
    CHECKED = "checked"
    DERIVED = "derived"


Input = Annotated[T, Role.INPUT]
Checked = Annotated[T, Role.CHECKED]
Derived = Annotated[T, Role.DERIVED]


class Boundary(Enum):
    """Where a record crosses. Source: the table of boundaries in docs/architecture.md."""

    CPU = "CPU intercept"
    GHCB = "GHCB"
    HYPERCALL = "hypercall"
    MEMORY = "memory"
    ASP = "ASP mailbox"
    DEVICE = "device"
    SCHEDULER = "scheduler"
    FAULT = "fault"


class FieldSpec(NamedTuple):
    """One field of a record."""

    name: str
    type: type
    role: Role


class RecordSpec(NamedTuple):
    """The declaration of one record kind."""

    kind: str
    boundary: Boundary
    is_step: bool
    fields: tuple[FieldSpec, ...]


Record: TypeAlias = tuple[Any, ...]
"""A value of a class made with `@step` or `@outcome`; `spec_of` gives its declaration."""


def spec_of(record: Record | type) -> RecordSpec:
    """The declaration of a record or of a record class."""
    return cast("RecordSpec", record.SPEC)  # type: ignore[union-attr]  # set by the decorators


R = TypeVar("R", bound=type)

WIRE_TYPES = (int, bytes, str, bool, tuple)
"""Field types that msgpack carries as they are; an IntEnum travels as its number."""


def _spec(cls: type, kind: str, boundary: Boundary, *, is_step: bool) -> RecordSpec:
    fields = []
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            raise PluginError(f"record {kind!r}: field {name!r} has no role; declare it Input, Checked or Derived")
        inner, role = get_args(hint)
        bare = get_origin(inner) or inner
        bare = getattr(bare, "__supertype__", bare)
        if not issubclass(bare, WIRE_TYPES):
            raise PluginError(f"record {kind!r}: field {name!r} is {bare.__name__}, expected int, bytes, str or tuple")
        fields.append(FieldSpec(name, bare, role))
    return RecordSpec(kind, boundary, is_step, tuple(fields))


def step(kind: str, boundary: Boundary) -> Callable[[R], R]:
    """Declare a NamedTuple as a step kind: something that may be applied to a machine."""

    def declare(cls: R) -> R:
        cls.SPEC = _spec(cls, kind, boundary, is_step=True)  # type: ignore[attr-defined]
        return cls

    return declare


def outcome(kind: str, boundary: Boundary) -> Callable[[R], R]:
    """Declare a NamedTuple as an outcome kind: something that a machine answers."""

    def declare(cls: R) -> R:
        cls.SPEC = _spec(cls, kind, boundary, is_step=False)  # type: ignore[attr-defined]
        return cls

    return declare


class Outcome(NamedTuple):
    """What one step led to: the records that the other side produced, in order."""

    records: tuple[Record, ...]

    def first(self, kind: type[T]) -> T | None:
        """The first record of class `kind`, or None."""
        for record in self.records:
            if isinstance(record, kind):
                return record
        return None


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
    AspStatus,
    Refused,
    Done,
)


# Codec ------------------------------------------------------------------------------------------------------------


class Vocabulary:
    """All record kinds of a set of plugins: encodes a record to its array and back."""

    __slots__ = ("kinds",)

    def __init__(self, classes: Mapping[str, type]) -> None:
        self.kinds = dict(classes)

    def encode(self, record: Record) -> list[Any]:
        """The msgpack array of `record`: its kind and its fields."""
        return [spec_of(record).kind, *record]

    def decode(self, array: Any, *, where: str = "record") -> Record:
        """The record of a msgpack array.

        Raises `TraceFormatError` that names `where`, the kind, the field, and what was expected.
        """
        if not isinstance(array, (list, tuple)) or not array or not isinstance(array[0], str):
            raise TraceFormatError(f"{where}: expected an array that starts with a record kind, found {array!r:.80}")
        kind, *values = array
        cls = self.kinds.get(kind)
        if cls is None:
            raise TraceFormatError(f"{where}: unknown record kind {kind!r:.80}; is a plugin missing?")
        spec = spec_of(cls)
        if len(values) != len(spec.fields):
            raise TraceFormatError(f"{where}: {kind} has {len(values)} fields, expected {len(spec.fields)}")
        for index, (field, value) in enumerate(zip(spec.fields, values, strict=True)):
            if field.type is tuple and isinstance(value, (list, tuple)):
                values[index] = _tuples(value)
            elif issubclass(field.type, bool):
                if not isinstance(value, bool):
                    raise TraceFormatError(f"{where}: {kind}.{field.name} is {value!r:.40}, expected a boolean")
            elif issubclass(field.type, int):
                if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MASK64:
                    raise TraceFormatError(f"{where}: {kind}.{field.name} is {value!r:.40}, expected 0 to 2^64-1")
            elif not isinstance(value, field.type):
                raise TraceFormatError(
                    f"{where}: {kind}.{field.name} is {type(value).__name__}, expected {field.type.__name__}"
                )
        return cast("Record", cls(*values))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
