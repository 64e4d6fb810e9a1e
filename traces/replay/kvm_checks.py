"""What of a KVM exchange the model computes, and with what it is compared.

Each comparator gets the recorded event and the model's outcome, and yields (check, recorded, computed). Nothing is
compared with the record that it was made from: what the model took from the log it says by `supplied`, and such
values are counted as inputs. Two prints of one value by the logging hypervisor are never compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from sevlab.core.events import GuestExit, Supplied
from sevlab.core.svm import EVENT_VALID, ExitCode, NpfError
from sevlab.core.vocabulary import Record
from sevlab.traces.importers import kvm_exits as ke
from sevlab.traces.importers import kvm_host as kh
from sevlab.traces.importers import kvm_interrupts as ki
from sevlab.traces.importers.log_records import ExitEvent

Comparison = tuple[str, Any, Any]
"""Name of the check, recorded value, computed value."""

FINAL_OR_TABLE = int(NpfError.FINAL | NpfError.TABLE_WALK)
W, U, RSVD, ID = (int(bit) for bit in (NpfError.W, NpfError.U, NpfError.RSVD, NpfError.ID))
PAGE, INSN_BYTES_MAX = 0xFFF, 15
PCI_DATA = range(0xCFC, 0xD00)
KVM_EXIT = {int(ExitCode.IOIO): 2, int(ExitCode.NPF): 6, int(ExitCode.SHUTDOWN): 8, int(ExitCode.HLT): 5}
"""Why user space is asked, by exit. Source: Linux include/uapi/linux/kvm.h."""


class Exchange:
    """One exchange: the step, what was recorded, and what the model answered, by kind."""

    __slots__ = ("actual", "context", "number", "reads", "recorded", "step", "supplied", "taken")

    def __init__(self, context: Context, reads: Counter[tuple[str, bool]] | None = None) -> None:
        self.context = context
        self.reads: Counter[tuple[str, bool]] = Counter() if reads is None else reads
        self.number = -1

    def begin(self, step: GuestExit, recorded: tuple[Record, ...], outcome: tuple[Record, ...]) -> None:
        """Take the next exchange."""
        self.number += 1
        self.step = step
        self.recorded = recorded
        self.actual: dict[str, list[Any]] = {}
        self.supplied: set[str] = set()
        self.taken: dict[str, int] = {}
        actual = self.actual
        for record in outcome:
            if type(record) is Supplied:
                self.supplied.add(record.what)
            else:
                actual.setdefault(record.SPEC.kind, []).append(record)  # type: ignore[attr-defined]  # set by its decorator

    def next(self, kind: str) -> Any | None:
        """The next record of `kind` that the model answered."""
        records = self.actual.get(kind)
        at = self.taken.get(kind, 0)
        if records is None or at >= len(records):
            return None
        self.taken[kind] = at + 1
        return records[at]

    def first(self, kind: str) -> Any | None:
        """The first record of `kind`."""
        records = self.actual.get(kind)
        return records[0] if records else None


class Context:
    """What one exchange leaves for the next, by vCPU, and what the whole log has shown."""

    def __init__(self) -> None:
        self.injected: dict[int, int] = {}
        self.immediate: dict[int, bool] = {}
        self.pages: dict[int, int] = {}
        """Pages of devices that have faulted, each with `slots` at its last fault."""
        self.slots = 0
        """How often the guest may have changed what memory there is: KVM then drops all mappings of devices."""
        self.gsi = -1


DEVICES: tuple[tuple[str, bool, range], ...] = (
    ("UART", True, range(0x3F8, 0x400)),
    ("PIC", True, range(0x20, 0x22)),
    ("PIC", True, range(0xA0, 0xA2)),
    ("RTC", True, range(0x70, 0x72)),
    ("PCI configuration", True, range(0xCF8, 0xD00)),
    ("PM timer", True, range(0x608, 0x60C)),
    ("IOAPIC", False, range(0xFEC0_0000, 0xFEC0_1000)),
    ("second IOAPIC", False, range(0xFEC1_0000, 0xFEC1_1000)),
    ("LAPIC", False, range(0xFEE0_0000, 0xFEE0_1000)),
)
"""Name, whether the range is of ports, and the range, of devices whose reads the report counts."""


def device_of(is_port: bool, address: int) -> str:  # noqa: FBT001  # one table for both
    """The name of the device at a port or an address."""
    return next((name for name, ports, there in DEVICES if ports is is_port and address in there), "other")


NOTHING = "nothing"
"""What is found where the model answered nothing."""


def pio(x: Exchange, record: ke.KvmPio) -> Iterator[Comparison]:
    """A port access: EXITINFO1, decoded."""
    port = x.next("io.port")
    if port is None:
        yield "port access", record, NOTHING
        return
    yield "port", record.port, port.port
    yield "size", record.size, port.width
    yield "direction", record.is_in, port.is_in
    if not x.step.exit_info_1 & 4:
        yield "count", record.elements, port.elements
    if record.is_in:
        x.reads[device_of(True, record.port), "value" not in x.supplied] += 1
    if record.is_in and "value" not in x.supplied:
        yield "device value", record.value, port.value
    if not record.is_in and record.port in PCI_DATA:
        x.context.slots += 1
    if not record.is_in:
        yield "value fits the size", record.value, port.value


def mmio(x: Exchange, record: ke.KvmMmio) -> Iterator[Comparison]:
    """An access to a device's memory: the instruction's bytes, decoded and executed."""
    waits = record.access == "unsatisfied-read"
    at = x.taken.get("io.mmio", 0)
    access = x.next("io.mmio")
    if access is None:
        yield "memory access", record, NOTHING
        return
    yield "address", record.gpa, access.gpa
    yield "width", record.length, access.width
    yield "direction", record.access == "write", access.write
    if waits:
        x.taken["io.mmio"] = at  # the read that follows is the same access, answered
        return
    if not access.write:
        x.reads[device_of(False, record.gpa), "value" not in x.supplied] += 1
    if "stored" not in x.supplied if access.write else "value" not in x.supplied:
        yield "stored value" if access.write else "device value", record.value, access.value


def msr(x: Exchange, record: ke.KvmMsr) -> Iterator[Comparison]:
    """RDMSR, WRMSR: refused or not, and the value of what was written before."""
    injected = x.first("injected")
    refused = injected is not None and injected.event & 0x7FF == 0x30D
    if "msr-exists" not in x.supplied:
        yield "refused", record.refused, refused
    if not record.write and not record.refused and "value" not in x.supplied:
        value = x.first("value")
        yield "MSR value", record.value, NOTHING if value is None else value.value


def cpuid(x: Exchange, record: ke.KvmCpuid) -> Iterator[Comparison]:
    """CPUID under the captured processor's profile."""
    if x.step.exit_code != ExitCode.CPUID:
        yield "CPUID without its exit", True, False
        return
    if "cpuid" in x.supplied:
        return
    result = x.first("cpuid-result")
    for name in ("eax", "ebx", "ecx", "edx"):
        yield name, getattr(record, name), NOTHING if result is None else getattr(result, name)


def inj_virq(x: Exchange, record: ki.KvmInjVirq) -> Iterator[Comparison]:
    """The injected interrupt: the highest that waits at the APIC model, or at the PICs."""
    if record.reinjected and not x.step.event:  # the entry was cancelled and made again: one injection
        injected = x.first("injected")
        yield "vector injected again", record.vector, NOTHING if injected is None else injected.event & 0xFF
        return
    injected = x.next("injected")
    yield "injected vector", record.vector, NOTHING if injected is None else injected.event & 0xFF


def inj_exception(x: Exchange, record: ki.KvmInjException) -> Iterator[Comparison]:
    """The injected exception and its error code."""
    if record.reinjected and not any(type(one) is ExitEvent for one in x.recorded):
        return  # this layout does not print EXITINTINFO, so that nothing tells the model what to inject again
    injected = x.next("injected")
    if injected is None:
        yield "injected exception", record.vector, NOTHING
        return
    yield "injected exception", record.vector | 0x300, injected.event & 0x7FF
    code = (injected.event >> 32,) if injected.event & 1 << 11 else ()
    yield "error code", record.error_code, code


def entry(x: Exchange, record: ke.KvmEntry) -> Iterator[Comparison]:
    """Where the guest goes on."""
    resumed = x.first("resumed")
    yield "next rip", record.rip, NOTHING if resumed is None else resumed.rip


def apic(x: Exchange, record: ki.KvmApic) -> Iterator[Comparison]:
    """Which register of the local APIC an address or an MSR number means."""
    access = x.next("captured.apic")
    if access is None:
        return
    yield "APIC register", record.register, access.offset
    yield "direction", record.write, access.write


def apic_ipi(x: Exchange, record: ki.KvmApicIpi) -> Iterator[Comparison]:
    """The interrupt command, decoded."""
    command = x.next("captured.ipi")
    if command is None:
        yield "interrupt command", record, NOTHING
        return
    for name in record._fields:
        yield f"IPI {name}", getattr(record, name), getattr(command, name)


def eoi(x: Exchange, record: ki.KvmEoi) -> Iterator[Comparison]:
    """The interrupt that ends is the highest in service."""
    ended = x.next("captured.eoi")
    yield "ended vector", record.vector, NOTHING if ended is None else ended.vector


def ack_irq(x: Exchange, record: ki.KvmAckIrq) -> Iterator[Comparison]:
    """The line of a PIC whose service ends with the guest's command."""
    if not record.chip.startswith("PIC"):
        return
    acknowledged = x.next("captured.pic-ack")
    if acknowledged is None:
        yield "PIC line served", record.pin, NOTHING
        return
    yield "PIC line served", record.pin, acknowledged.pin
    yield "PIC", record.chip, "PIC slave" if acknowledged.slave else "PIC master"


def emulate_insn(x: Exchange, record: ke.KvmEmulateInsn) -> Iterator[Comparison]:
    """The bytes are exactly one instruction."""
    decoded = x.first("captured.decoded")
    yield "instruction length", len(record.insn), NOTHING if decoded is None else decoded.length


def page_fault(x: Exchange, record: ke.KvmPageFault) -> Iterator[Comparison]:
    """The error code of a nested fault: what the access was, and whether the page is known as a device's."""
    error = record.error_code
    walk = error & FINAL_OR_TABLE
    yield "one stage of the walk", True, walk in (int(NpfError.FINAL), int(NpfError.TABLE_WALK))
    yield "user access", U, error & U
    page = record.address >> 12
    if x.step.insn:
        decoded = x.first("captured.decoded")
        if decoded is not None and decoded.length and (decoded.reads or decoded.writes):
            yield "write bit", bool(error & W), decoded.writes
            yield "reserved bit", bool(error & RSVD), page in x.context.pages
            x.context.pages[page] = x.context.slots
        return
    if error & ID and walk == NpfError.FINAL and not x.step.event:
        offset, found = x.step.rip + x.step.cs_base & PAGE, record.address & PAGE
        crosses = not found and offset > PAGE - INSN_BYTES_MAX + 1
        yield "page offset of the fetch", found, 0 if crosses else offset


def userspace_exit(x: Exchange, record: kh.KvmUserspaceExit) -> Iterator[Comparison]:
    """Why user space is asked."""
    expected = KVM_EXIT.get(x.step.exit_code)
    yield "user-space reason", record.number, NOTHING if expected is None else expected


def exit_event(x: Exchange, record: ExitEvent) -> Iterator[Comparison]:
    """EXITINTINFO after an injection: the same vector, delivered."""
    vector = x.context.injected.pop(x.step.vcpu, None)
    if vector is not None and not record.intr_info & EVENT_VALID:
        yield "EXITINTINFO vector", record.intr_info & 0xFF, vector
    if x.context.immediate.pop(x.step.vcpu, False):
        yield "exit after an immediate exit", x.step.exit_code, int(ExitCode.INTR)


COMPARATORS: dict[type, Callable[[Exchange, Any], Iterator[Comparison]]] = {
    ke.KvmPio: pio,
    ke.KvmMmio: mmio,
    ke.KvmMsr: msr,
    ke.KvmCpuid: cpuid,
    ki.KvmInjVirq: inj_virq,
    ki.KvmInjException: inj_exception,
    ke.KvmEntry: entry,
    ki.KvmApic: apic,
    ki.KvmApicIpi: apic_ipi,
    ki.KvmEoi: eoi,
    ki.KvmAckIrq: ack_irq,
    ke.KvmEmulateInsn: emulate_insn,
    ke.KvmPageFault: page_fault,
    kh.KvmUserspaceExit: userspace_exit,
    ExitEvent: exit_event,
}

HOST_BUSINESS = frozenset(
    event_type
    for module in (kh,)
    for event_type in vars(module).values()
    if isinstance(event_type, type) and hasattr(event_type, "SPEC")
)
"""Records of the host's own doing: no model of the guest's boundary says anything about them."""


def lines_set(context: Context, record: Any) -> Iterator[Comparison]:
    """The wiring of interrupt lines: a line of the board arrives at a PIC's and at the I/O APIC's pin."""
    if type(record) is ki.KvmSetIrq:
        context.gsi = record.gsi
    elif type(record) is ki.KvmPicSetIrq:
        yield "PIC pin of the line", record.chip * 8 + record.pin, context.gsi
    elif type(record) is ki.KvmIoapicSetIrq:
        yield "I/O APIC pin of the line", record.pin, 2 if context.gsi == 0 else context.gsi


def remember(x: Exchange) -> None:
    """Leave what the next exchange of this vCPU is compared with."""
    injected = x.first("injected")
    vcpu = x.step.vcpu
    x.context.injected.pop(vcpu, None)
    if injected is not None and injected.event >> 8 & 7 == 0:
        x.context.injected[vcpu] = injected.event & 0xFF
    last = x.recorded[-2] if len(x.recorded) > 1 else None
    x.context.immediate[vcpu] = type(last) is ke.KvmEntry and last.immediate
