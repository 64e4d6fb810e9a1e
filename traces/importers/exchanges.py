"""From event lines to entries: one exchange of a vCPU is one step with what was recorded for it.

Lines are grouped by thread, never by their order in the file: a thread that prints kvm_entry and kvm_exit is a vCPU,
and `[pre] kvm_exit [body] kvm_entry` is an exchange. Of what lies between entry and exit, the end of an interrupt
belongs to the exit that follows, anything else to the entry. Lines of other threads, and of a vCPU's thread before its
first entry, become entries of their own (`HostActivity`). Exchanges come out in the order in which devices served
them; those without a device, in the order of their entry.

Interrupts reach an APIC in any thread; each is an input of the first exchange of that vCPU that could take it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any

from sevlab.core.events import GuestExit
from sevlab.core.svm import EVENT_VALID, ExitCode
from sevlab.core.vocabulary import Record
from sevlab.traces.importers import kvm_exits as ke
from sevlab.traces.importers import kvm_interrupts as ki
from sevlab.traces.importers.lines import Line
from sevlab.traces.importers.log_records import Entered, ExitEvent, Gap, HostActivity
from sevlab.traces.schema import NO_VCPU, Entry

MODES = {"real": 16, "vm16": 16, "prot16": 16, "prot32": 32, "prot64": 64}
IOIO_IN, IOIO_STRING = 1 << 0, 1 << 2
MASK32 = 0xFFFF_FFFF
CACHE_EXCHANGES = 1 << 13
MAX_LINES = 4096
"""Most lines in an exchange, interrupts that wait for one vCPU, threads without anything under way: more is nonsense,
and memory stays flat."""

NO_THREAD = -2
FIXED_MODES = (0, 1)
"""Delivery modes whose message sets a bit of the IRR: fixed and lowest priority."""


class _Thread:
    """One host thread. `exit` is the kvm_exit under way, `body` the records since the last exit or entry.

    `served`: the position in the log where a device served the exit, 0 before.
    """

    __slots__ = ("activity", "arrivals", "body", "exit", "inside", "served", "started", "tid", "vcpu")

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self.activity = HostActivity(tid)
        self.vcpu = NO_VCPU
        self.inside = False
        self.exit: Any = None
        self.started = 0
        self.served = 0
        self.body: list[Any] = []
        self.arrivals: tuple[tuple[int, int, int], ...] | None = None


class Exchanges:
    """Groups lines; counts `exchanges`, `unfinished` ones, and numbers that the log's layout does not print."""

    def __init__(self) -> None:
        self.exchanges = 0
        self.unfinished = 0
        self.absent = 0
        self.vcpus = 0
        self._arrived: dict[int, list[tuple[int, int, int]]] = {}
        self._boot: _Thread | None = None
        self._threads: dict[int, _Thread] = {}
        self._serving: dict[int, int] = {}
        """Where in the log a device served the exchange that is under way in a thread."""
        self._done: list[tuple[int, Entry]] = []
        self._same: dict[Record, Record] = {}
        self._made: dict[tuple[int, ...], tuple[GuestExit, tuple[Record, ...], Any, list[Any]]] = {}
        """What was made of lines before, by the identity of their records, which lasts as long as they are here."""

    def entries(self, lines: Iterable[Line]) -> Iterator[Entry]:
        """The entries of `lines`."""
        threads = self._threads
        thread = nobody = _Thread(NO_THREAD)
        for position, (tid, time_ns, record, action) in enumerate(lines, 1):
            if tid != thread.tid:
                thread = threads.get(tid) or threads.setdefault(tid, _Thread(tid))
            if not position % MAX_LINES:
                yield from self._give_up_long(time_ns)
            if action is None:
                if thread.exit is not None or thread.inside:
                    thread.body.append(record)
                else:
                    yield Entry(time_ns, thread.vcpu, thread.activity, (record,))
            elif action is ENTER:
                thread.vcpu, thread.inside = record.vcpu, True
                if not record.vcpu:
                    self._boot = thread
                self.vcpus = max(self.vcpus, record.vcpu + 1)
                if thread.exit is None:
                    yield Entry(time_ns, record.vcpu, thread.activity, (*thread.body, record))
                else:
                    thread.body.append(record)
                    self._done.append((thread.served or position, self._exchange(thread, time_ns)))
                self._serving.pop(tid, None)
                thread.exit, thread.body, thread.served = None, [], 0
                yield from self._in_order()
            elif action is LEAVE and thread.vcpu < 0:
                yield Entry(time_ns, NO_VCPU, thread.activity, (record,))  # the log begins here: no exchange is whole
            elif action is LEAVE:
                if thread.exit is not None:
                    yield from self._cut_off(thread, position)
                thread.exit, thread.started, thread.inside, thread.arrivals = record, time_ns, False, None
            elif action is LOSE:
                yield from self._flush(time_ns)
                thread = nobody
                yield Entry(0, NO_VCPU, HostActivity(0), (record,))
            else:
                if action is ARRIVE:
                    self._arrive(record)
                elif action is SERVE:
                    if thread.exit is not None and not thread.served:
                        thread.served = self._serving[tid] = position
                elif thread.vcpu >= 0 and thread.arrivals is None:
                    thread.arrivals = self._take(thread.vcpu)
                if thread.exit is not None or thread.inside:
                    thread.body.append(record)
                else:
                    yield Entry(time_ns, thread.vcpu, thread.activity, (record,))
        yield from self._flush(0)

    def _cut_off(self, thread: _Thread, position: int) -> Iterator[Entry]:
        """The exchange under way ends without an entry."""
        self.unfinished += 1
        self._done.append((thread.served or position, self._exchange(thread, None)))
        self._serving.pop(thread.tid, None)
        thread.body, thread.served = [], 0
        yield from self._in_order()

    def _in_order(self) -> Iterator[Entry]:
        """What is done and no exchange under way was served before: devices saw the accesses in this order."""
        done, serving = self._done, self._serving
        if len(done) == 1 and not serving:
            yield done.pop()[1]
            return
        limit = min(serving.values()) if serving and len(done) <= MAX_LINES else END
        done.sort(key=POSITION)
        while done and done[0][0] < limit:
            yield done.pop(0)[1]

    def _arrive(self, record: Any) -> None:
        if type(record) is ki.KvmSetIrq:
            boot = self._boot
            served = boot is not None and boot.exit is not None and any(type(one) is ke.KvmPio for one in boot.body)
            target, arrival = 0, (2 if served else 1, record.gsi, record.level)
        elif record.mode in FIXED_MODES:
            target, arrival = record.apic_id, (0, record.vector, int(record.level))
        else:
            return
        waiting = self._arrived.setdefault(target, [])
        if len(waiting) < MAX_LINES:
            waiting.append(arrival)

    def _take(self, vcpu: int) -> tuple[tuple[int, int, int], ...]:
        arrived = self._arrived.pop(vcpu, None)
        return tuple(arrived) if arrived else ()

    def _give_up_long(self, time_ns: int) -> Iterator[Entry]:
        """Give up exchanges that do not end, and forget who does not matter."""
        for tid, thread in list(self._threads.items()):
            if len(thread.body) > MAX_LINES:
                begin = () if thread.exit is None else (thread.exit,)
                self.unfinished += len(begin)
                yield Entry(time_ns, thread.vcpu, thread.activity, (*begin, *thread.body))
                thread.exit, thread.inside, thread.body, thread.served = None, False, [], 0
                self._serving.pop(tid, None)
            elif len(self._threads) > MAX_LINES and thread.exit is None and not thread.inside:
                del self._threads[tid]
        if len(self._arrived) > MAX_LINES:
            self._arrived.clear()

    def _flush(self, time_ns: int) -> Iterator[Entry]:
        """Give up what is under way: the log ends here, or lost events."""
        for thread in self._threads.values():
            if thread.exit is not None:
                self.unfinished += 1
                self._done.append((thread.served or LAST, self._exchange(thread, None)))
            elif thread.body:
                yield Entry(time_ns, thread.vcpu, thread.activity, tuple(thread.body))
        self._threads.clear()
        self._serving.clear()
        self._boot = None
        yield from self._in_order()

    def _exchange(self, thread: _Thread, entered_ns: int | None) -> Entry:
        self.exchanges += 1
        exit_, body, vcpu = thread.exit, thread.body, thread.vcpu
        arrivals = thread.arrivals
        if arrivals is None:
            arrivals = self._take(vcpu)
        if not exit_.intr_info:
            self.absent += 3  # vcpu, intr_info, error_code
        said = [record for record in body if type(record) in SAYING][:MAX_LINES]
        same = (vcpu, id(exit_), *map(id, said))
        made = self._made.get(same) if not arrivals else None
        if made is None:
            made = guest_exit(vcpu, exit_, said, arrivals), self._exit_event(exit_), exit_, said
            if not arrivals:
                if len(self._made) >= CACHE_EXCHANGES:
                    self._made.clear()
                self._made[same] = made
        end = () if entered_ns is None else (self._known(Entered(max(entered_ns - thread.started, 0))),)
        return Entry(thread.started, vcpu, made[0], (*made[1], *body, *end))

    def _exit_event(self, exit_: Any) -> tuple[Record, ...]:
        """What kvm_exit printed beside the step, where its layout prints it."""
        if not exit_.intr_info:
            return ()
        return (self._known(ExitEvent(exit_.intr_info[0], exit_.error_code[0], exit_.requests)),)

    def _known(self, record: Record) -> Record:
        """An equal record of the kind, the same object as before where possible: few durations are most of them."""
        if len(self._same) >= CACHE_EXCHANGES:
            self._same.clear()
        return self._same.setdefault(record, record)


ENTER, LEAVE, LOSE, ARRIVE, SERVE, INJECT = range(6)
ACTIONS: dict[type, int] = {
    ke.KvmEntry: ENTER,
    ke.KvmExit: LEAVE,
    Gap: LOSE,
    ki.KvmApicAcceptIrq: ARRIVE,
    ki.KvmApicvAcceptIrq: ARRIVE,
    ki.KvmSetIrq: ARRIVE,
    ke.KvmPio: SERVE,
    ke.KvmMmio: SERVE,
    ki.KvmInjVirq: INJECT,
}
"""What a record means for the grouping; any other belongs to what is under way in its thread."""

POSITION = itemgetter(0)
LAST, END = 1 << 62, 1 << 63


SAYING = frozenset((
    ke.KvmEmulateInsn, ke.KvmPio, ke.KvmMmio, ke.KvmMsr, ke.KvmCpuid, ke.KvmHypercall, ki.KvmInjVirq,
    ki.KvmInjException, ki.KvmPvEoi,
))  # fmt: skip
"""The records of an exchange that say something about its step."""


def guest_exit(vcpu: int, exit_: Any, body: list[Any], arrivals: tuple[tuple[int, int, int], ...]) -> GuestExit:
    """The step of an exchange: what of its lines comes from outside a model of the hypervisor."""
    insn, mode, cs_base = b"", 0, 0
    registers: tuple[tuple[str, int], ...] = ()
    stored: tuple[int, ...] = ()
    answers: tuple[int, ...] = ()
    refused = ended = interruptible = False
    for record in body:
        kind = type(record)
        if kind is ke.KvmEmulateInsn:
            insn, mode, cs_base = record.insn, MODES.get(record.mode, 0), record.cs_base
        elif kind is ke.KvmPio:
            if record.is_in:
                answers = (*answers, record.value)
            else:
                stored = (*stored, record.value)
            if exit_.info1 & IOIO_STRING:
                registers = (("rcx", record.elements),)
        elif kind is ke.KvmMmio:
            if record.access == "read":
                answers = (*answers, record.value)
            elif record.access == "write":
                stored = (*stored, record.value)
        elif kind is ke.KvmMsr:
            registers = (("rcx", record.number),)
            refused = record.refused
            if record.write:
                stored = (record.value,)
            else:
                answers = (record.value,)
        elif kind is ke.KvmCpuid and not answers:
            registers = (("rax", record.leaf), *(("rcx", number) for number in record.subleaf))
            answers = (record.eax, record.ebx, record.ecx, record.edx)
        elif kind is ke.KvmHypercall:
            registers = (
                ("rax", record.number),
                ("rbx", record.a0),
                ("rcx", record.a1),
                ("rdx", record.a2),
                ("rsi", record.a3),
            )
        elif kind is ki.KvmInjVirq:
            interruptible = interruptible or not record.reinjected
        elif kind is ki.KvmInjException:
            refused = refused or (exit_.reason == ExitCode.RDPMC and record.vector == GP)
        elif kind is ki.KvmPvEoi:
            ended = True
    event = 0
    if exit_.intr_info and exit_.intr_info[0] & EVENT_VALID:
        event = exit_.error_code[0] << 32 | exit_.intr_info[0]
    return GuestExit(
        vcpu, exit_.rip, exit_.reason, exit_.info1, exit_.info2, insn, mode, cs_base, event,
        registers, stored, answers, refused, arrivals, ended, interruptible,
    )  # fmt: skip


GP = 13
