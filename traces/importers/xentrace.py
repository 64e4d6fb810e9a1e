"""xentrace: binary records of Xen's HVM events.

A file is a sequence of windows: a CPU-change record names the CPU and the bytes that follow from it. A record is a
word with event, number of extra words and whether a time stamp follows. Xen prints no size of a port access, no
EXITINFO and no instruction bytes; what an exit did stands in the records between it and the next VMENTRY. The time of
an entry is the CPU's cycle counter, whose frequency the file does not say.

Source: Xen xen/include/public/trace.h, xen/common/trace.c, xen/arch/x86/hvm/svm/svm.c.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from struct import Struct, unpack
from typing import IO, Any

from sevlab.core.events import GuestExit
from sevlab.core.svm import ExitCode
from sevlab.core.vocabulary import Record
from sevlab.traces.importers.log_records import Entered, HostActivity, XenEvent
from sevlab.traces.schema import NO_VCPU, Entry

CPU_CHANGE, CPU_CHANGE_HEADER, LOST_RECORDS, WRAP = 0x1F003, 0x2001_F003, 0x1F001, 0x1F002
VMENTRY, NESTED_VMENTRY = 0x81001, 0x81401
VMEXITS_LONG = frozenset((0x81102, 0x81103))
VMEXITS = frozenset((0x81002, 0x81003)) | VMEXITS_LONG
MSR_READ, MSR_WRITE, CPUID, VMMCALL, INJ_VIRQ, INJ_EXC = 0x8200C, 0x8200D, 0x8200E, 0x82012, 0x82004, 0x82003
IOPORT_READ, IOPORT_WRITE = 0x82016, 0x82216
CR_WRITE, DR_WRITE, INTR, INTR_WINDOW = 0x82109, 0x8200B, 0x8200F, 0x82020
EMULATED_TIMERS = range(0x84001, 0x84012)
IOMEM_READS, IOMEM_WRITES, NPF = (0x82017, 0x82117), (0x82217, 0x82317), 0x82021
NAMES = {
    CPU_CHANGE: "TRACE_CPU_CHANGE", VMENTRY: "VMENTRY", 0x81002: "VMEXIT", 0x81102: "VMEXIT64", 0x81003: "VMEXIT",
    0x81103: "VMEXIT64", 0x82001: "PF_XEN", 0x82101: "PF_XEN64", 0x82002: "PF_INJECT", 0x82102: "PF_INJECT64",
    INJ_EXC: "INJ_EXC", INJ_VIRQ: "INJ_VIRQ", 0x82005: "REINJ_VIRQ", 0x82108: "CR_READ64", 0x82109: "CR_WRITE64",
    0x8200A: "DR_READ", 0x8200B: "DR_WRITE", MSR_READ: "MSR_READ", MSR_WRITE: "MSR_WRITE", CPUID: "CPUID",
    0x8200F: "INTR", 0x82010: "NMI", 0x82011: "SMI", VMMCALL: "VMMCALL", 0x82013: "HLT", 0x82114: "INVLPG64",
    0x82015: "MCE", IOPORT_READ: "IOPORT_READ", IOPORT_WRITE: "IOPORT_WRITE", 0x82017: "IOMEM_READ",
    0x82217: "IOMEM_WRITE", 0x82117: "IOMEM_READ64", 0x82317: "IOMEM_WRITE64", 0x82018: "CLTS", 0x82119: "LMSW64",
    0x8201A: "RDTSC", 0x82020: "INTR_WINDOW", NPF: "NPF", 0x82022: "REALMODE_EMULATE", 0x82023: "TRAP",
    0x82024: "TRAP_DEBUG", 0x82025: "VLAPIC", 0x82126: "XCR_READ64", 0x82127: "XCR_WRITE64",
    **{0x84001 + n: name for n, name in enumerate((
        "HPET_START", "PIT_START", "RTC_START", "LAPIC_START", "HPET_STOP", "PIT_STOP", "RTC_STOP", "LAPIC_STOP",
        "PIT_CALLBACK", "LAPIC_CALLBACK", "PIC_INT_OUTPUT", "PIC_KICK", "PIC_INTACK", "PIC_POSEDGE", "PIC_NEGEDGE",
        "PIC_PEND_IRQ_CALL", "LAPIC_PIC_INTR"))},
}  # fmt: skip
"""The HVM events that Xen emits; any other id is unknown."""

_WORD, _TSC = Struct("<I"), Struct("<Q")
MAX_RECORDS = 1 << 16
COM_SIZE = 1 << 4
IN, STRING = 1 << 0, 1 << 2
LONG = 64


def recognise(head: bytes) -> bool:
    """Whether a file that starts with `head` starts with a window."""
    return len(head) >= 12 and _WORD.unpack_from(head)[0] == CPU_CHANGE_HEADER


class XenTrace:
    """A xentrace file."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.format = "xentrace"
        self._stream = stream
        self._events: Counter[int] = Counter()
        self._exchanges = self._unfinished = self._gaps = 0
        self._damage = ""

    def _records(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """(event, time, words); a record without time stamp has that of the one before it."""
        time = 0
        read = self._stream.read
        while True:
            head = read(4)
            if len(head) < 4:
                if head:
                    self._damage = "the file ends inside a record"
                return
            (header,) = _WORD.unpack(head)
            count, timed = header >> 28 & 7, header >> 31
            size = 4 * count + 8 * timed
            body = read(size)
            if len(body) < size:
                self._damage = "the file ends inside a record"
                return
            if timed:
                (time,) = _TSC.unpack_from(body)
            event = header & 0x0FFF_FFFF
            self._events[event] += 1
            yield event, time, unpack(f"<{count}I", body[8:] if timed else body)

    def entries(self) -> Iterator[Entry]:
        """The entries; records between two exchanges belong to the one before."""
        exit_: tuple[int, int, tuple[int, ...]] | None = None
        body: list[XenEvent] = []
        for event, time, words in self._records():
            if event in VMEXITS:
                if exit_ is not None:
                    self._unfinished += 1
                    yield self._exchange(exit_, body, None)
                elif body:
                    yield Entry(time, NO_VCPU, HostActivity(0), tuple(body))
                exit_, body = (event, time, words), []
            elif event in (VMENTRY, NESTED_VMENTRY):
                body.append(XenEvent(event, words))
                if exit_ is not None:
                    yield self._exchange(exit_, body, time)
                    exit_, body = None, []
            elif event == LOST_RECORDS:
                self._gaps += 1
                body.append(XenEvent(event, words))
            elif event not in (CPU_CHANGE, WRAP):
                body.append(XenEvent(event, words))
            if len(body) > MAX_RECORDS:  # no exchange is so long: it does not end
                self._unfinished += exit_ is not None
                yield Entry(time, NO_VCPU, HostActivity(0), (*_begin(exit_), *body))
                exit_, body = None, []
        if exit_ is not None:
            self._unfinished += 1
            yield self._exchange(exit_, body, None)
        elif body:
            yield Entry(0, NO_VCPU, HostActivity(0), tuple(body))

    def _exchange(self, exit_: tuple[int, int, tuple[int, ...]], body: list[XenEvent], entered: int | None) -> Entry:
        self._exchanges += 1
        event, started, words = exit_
        code = words[0] if words else 0
        rip = words[1] | (words[2] << 32 if len(words) > 2 else 0) if len(words) > 1 else 0
        outcome: tuple[Record, ...] = tuple(body)
        if entered is not None:
            outcome = (*outcome, Entered(max(entered - started, 0)))
        return Entry(started, 0, guest_exit(code, rip, LONG if event in VMEXITS_LONG else 0, body), outcome)

    def summary(self) -> dict[str, Any]:
        """What was in the file."""
        return {
            "format": self.format,
            "layout": "seen in captures",
            "records": sum(self._events.values()),
            "events": {NAMES.get(event, f"{event:#x}"): count for event, count in self._events.most_common()},
            "exchanges": self._exchanges,
            "unfinished": self._unfinished,
            "vcpus": 1,
            "unknown": {f"{event:#x}": count for event, count in self._events.items() if event not in KNOWN},
            "gaps": self._gaps,
            "rejected": int(bool(self._damage)),
            "examples": [self._damage] if self._damage else [],
        }


def _begin(exit_: tuple[int, int, tuple[int, ...]] | None) -> tuple[XenEvent, ...]:
    """The record of an exit that became no exchange."""
    return () if exit_ is None else (XenEvent(exit_[0], exit_[2]),)


KNOWN = frozenset((*NAMES, LOST_RECORDS, WRAP))


def guest_exit(code: int, rip: int, mode: int, body: list[XenEvent]) -> GuestExit:
    """The step of an exchange: what its records say of the guest."""
    info_1 = info_2 = 0
    registers: tuple[tuple[str, int], ...] = ()
    stored: tuple[int, ...] = ()
    answers: tuple[int, ...] = ()
    refused = interruptible = False
    for event, words in body:
        count = len(words)
        if event in (IOPORT_READ, IOPORT_WRITE) and count and code == ExitCode.IOIO:
            is_in = event == IOPORT_READ
            info_1 = words[0] << 16 & 0xFFFF_0000 | COM_SIZE | (IN if is_in else 0) | (0 if count > 1 else STRING)
            if count > 1:
                answers, stored = (words[1:2], ()) if is_in else ((), words[1:2])
        elif event in IOMEM_WRITES and count:
            stored = (words[-1],) if count > 1 else (0,)
        elif event in IOMEM_READS and count > 1:
            answers = words[-1:]
        elif event == NPF and count >= 2:
            info_2 = words[0] | words[1] << 32
        elif event in (MSR_READ, MSR_WRITE) and count >= 3:
            registers, value = (("rcx", words[0]),), words[1] | words[2] << 32
            info_1 = int(event == MSR_WRITE)
            answers, stored = ((), (value,)) if info_1 else ((value,), ())
        elif event == CPUID and count >= 6:
            registers, answers = (("rax", words[0]), ("rcx", words[1])), words[2:6]
        elif event == VMMCALL and count:
            registers = (("rax", words[0]),)
        elif event == INJ_VIRQ:
            interruptible = True
        elif event == INJ_EXC:
            refused = code == ExitCode.MSR
    return GuestExit(
        0, rip, code, info_1, info_2, b"", mode, 0, 0, registers, stored, answers, refused, (), False, interruptible
    )  # fmt: skip
