"""The target guest-vc: the #VC handler of a real guest, executed, under a hypervisor that lies.

Inputs are lists of records like those of every target, and mutated like them; what runs them is not a machine's table
of handlers but a guest that is put back to the same instruction each time. Feedback: the blocks of the guest's code
that ran, what it asked for in which order, and how it ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import TYPE_CHECKING

from sevlab.core.events import MapFlag, Party, Schedule, VmcbWrite
from sevlab.core.layout import Layout, u64
from sevlab.core.memory import TAG_HYPERVISOR
from sevlab.core.oracle import Finding, Target
from sevlab.core.payload import Message, Payload
from sevlab.core.units import MASK64, PAGE_BYTES, PAGE_SHIFT
from sevlab.core.vocabulary import Record
from sevlab.fuzz.codec import Codec
from sevlab.fuzz.feedback import Coordinate, Edge, Feedback
from sevlab.fuzz.messages import Messages
from sevlab.fuzz.mutators import Mutator
from sevlab.fuzz.pools import Pools
from sevlab.fuzz.runner import Run, Runner, crash
from sevlab.plugins.engines.hostile_run import DOCUMENTATION, EVENT_INJ, ORACLE, STEPS
from sevlab.plugins.sev_es import ForgeMsr, ForgeReply, Ghcb

if TYPE_CHECKING:
    from sevlab.core.vocabulary import Outcome
    from sevlab.fuzz.atheris_counters import AtherisCounters
    from sevlab.plugins.engines.start import Begun

NAME = "guest-vc"
TARGET = Target(
    NAME,
    Party.HYPERVISOR,
    STEPS,
    (ORACLE,),
    ("sme", "sev", "sev_es", "io", "engines"),
    "A real guest's #VC handler, executed under a hypervisor that lies (sevlab fuzz run guest-vc --kernel FILE).",
)


class Event(Layout, size=8):
    """EVENTINJ."""

    event = u64(0, source="24593, 15.20")


class Word(Layout, size=8):
    """A lie of eight bytes."""

    value = u64(0, source="56421, 2.6")


VALID, ERROR_VALID, VC, INTERRUPT_80 = 1 << 31, 1 << 11, 29, 0x80
EXIT_CODES = (0x27, 0x37, 0x41, 0x6E, 0x6F, 0x72, 0x76, 0x7B, 0x7C, 0x81, 0x87, 0x89, 0x8A, 0x8B, 0x400, 0x404)
"""What a #VC may claim. Source: 56421, 4.1."""
EVENTS = (
    *(VALID | ERROR_VALID | VC | code << 32 for code in EXIT_CODES),
    VALID | VC,
    VALID | INTERRUPT_80,
    VALID | 2 << 8 | 2,
    *(VALID | ERROR_VALID | 3 << 8 | vector for vector in (8, 12, 13, 14, 17)),
    *(VALID | 3 << 8 | vector for vector in (1, 6, 7)),
    *(VALID | vector for vector in (0x20, 0x30, 0xEC, 0xFF)),
)
"""#VC with each code, and without one; vector 80h; NMI; exceptions; interrupts."""
LIES = {
    "rax": (0, MASK64, 1 << 32, 0x8000_001F),
    "rcx": (0, MASK64),
    "rdx": (0, MASK64),
    "rbx": (0, MASK64, 1 << 63),
    "sw_exit_code": (0, 0x7B, 0x8000_0001),
    "sw_exit_info_1": (1, 2, 1 << 32, MASK64),
    "sw_exit_info_2": (0, 1, VALID | ERROR_VALID | 3 << 8 | 13, VALID | 3 << 8 | 6, VALID | ERROR_VALID | 3 << 8 | 14,
                       VALID | 2 << 8 | 2, 0xFFFF, MASK64),
    "sw_scratch": (0, MASK64),
    "protocol_version": (0, 3),
}  # fmt: skip
"""What a reply may say wrong, by field."""
BITMAPS = (0, MASK64)
MAP_FLAGS = (int(MapFlag.UNMAP), int(MapFlag.WRITABLE | MapFlag.USER))
MOST_REQUESTS = 8
VALID_AT, BUFFER_AT = 0x3F0, 0x800
MSR_VALUES = (0, 1, 5, 0x5 | 3 << 30, MASK64 & ~0xFFF | 5, 0x1, 0x13, 0x100, MASK64)
"""Responses by the MSR. Source: 56421, 2.3."""


def _forged(record: Record) -> int | None:
    return record.offset if isinstance(record, ForgeReply) else None


def _injected(record: Record) -> int | None:
    inside = isinstance(record, VmcbWrite) and record.offset == EVENT_INJ and record.data
    return int(record.data[0]) if inside and isinstance(record, VmcbWrite) else None


def _lie(offset: int, name: str, value: int) -> Message:
    return Message(offset, name, Word, {"vcpu": 0, "offset": offset}, {"value": value})


PAYLOADS = (
    Payload(
        "vmcb",
        "data",
        _injected,
        tuple(
            Message(word & 0xFF, f"event {word & 0xFF:#x}", Event, {"vcpu": 0, "offset": EVENT_INJ}, {"event": word})
            for word in EVENTS
        ),
        layout=Event,
    ),
    Payload(
        "sev_es.forge",
        "data",
        _forged,
        (
            *(_lie(Ghcb.FIELDS[name].offset, name, value) for name, values in LIES.items() for value in values),
            *(_lie(VALID_AT + half, "valid_bitmap", value) for half in (0, 8) for value in BITMAPS),
            *(_lie(BUFFER_AT, "shared_buffer", value) for value in (0, MASK64)),
        ),
        layout=Word,
    ),
    Payload(
        "sev_es.forge-msr",
        "value",
        lambda record: record.value & 0xFFF if isinstance(record, ForgeMsr) else None,
        tuple(
            Message(value & 0xFFF, f"response {value & 0xFFF:#x}", Word, {"vcpu": 0}, {"value": value})
            for value in MSR_VALUES
        ),
        layout=Word,
    ),
)


def seeds() -> Iterator[tuple[Record, ...]]:
    """An honest hypervisor, and each single lie: in the first reply, in the second, and each event before anything."""
    enter = Schedule()
    yield (enter,)
    for payload, record in zip(PAYLOADS, (VmcbWrite, ForgeReply, ForgeMsr), strict=True):
        for message in payload.messages:
            assert message.layout is not None
            data = message.layout.build(**message.fields)
            value = int.from_bytes(data, "little") if record is ForgeMsr else data
            step = record(**{**message.record, payload.field: value})
            if record is VmcbWrite:
                yield (step,)
            yield (enter, step)
            if record is ForgeReply:
                yield (enter, enter, step)


class GuestFeedback(Feedback):
    """What runs of a guest reached; nothing of it is read from the machine."""

    machines = ("blocks", "requests", "end")
    state_words = ""

    def __init__(self, begun: Begun) -> None:
        self._run, self._trace, self._name_of = begun.run, begun.trace, begun.run.name_of
        self.reached: dict[Coordinate | Edge, int] = {}
        self.counters: AtherisCounters | None = None
        self._blocks: dict[int, int] = {}
        """Of each edge that was run its number for atheris."""

    def begin(self) -> None:
        """Nothing to do: the trace is emptied with each run."""

    def _reach(self, machine: str, state: tuple[str, ...], message: str, result: tuple[int, ...]) -> int:
        item = Coordinate(machine, state, message, result)
        number = self.reached.get(item)
        if number is None:
            number = self.reached[item] = 0 if self.counters is None else self.counters.of(item)
        return number

    def take(self, reason: str) -> int:
        """Count what the last run reached; returns how much of it is new."""
        before = len(self.reached)
        edges, blocks = self._trace.edges(), self._blocks
        for edge in edges:
            if edge not in blocks:
                name = self._name_of(self._trace.address_of(edge))
                blocks[edge] = self._reach("blocks", (), name, (edge & 0xFFFF,))
        numbers = []
        last = ""
        for number, request in enumerate(self._run.requests[:MOST_REQUESTS]):
            code = f"{request.code if request.by_page else request.code & 0xFFF:#x}"
            numbers.append(self._reach("requests", (last,), code, (number,)))
            last = code
        numbers.append(self._reach("end", (last,), reason.partition(":")[0], ()))
        if self.counters is not None:
            self.counters.count(blocks[edge] for edge in edges)
            self.counters.count(numbers)
        return len(self.reached) - before


class _Documented:
    """The oracle that judges during a run, as far as others ask an oracle anything."""

    name = ORACLE
    documentation = DOCUMENTATION

    def step_end(self, machine: object, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        return ()

    def sequence_end(self, machine: object) -> tuple[Finding, ...]:
        return ()


class GuestRunner(Runner):
    """Runs inputs on a guest that stands at the start of the campaign."""

    pairs = False

    def __init__(self, begun: Begun, *, seed: int = 0) -> None:
        self.begun, self.target = begun, TARGET
        self.machine = begun.run.machine
        self.plugins, self.config = self.machine.plugins, self.machine.config
        self.messages = Messages(PAYLOADS)
        self.codec = Codec(self.machine.vocabulary, TARGET.steps)
        self.pools = Pools()
        self.oracles = (_Documented(),)
        self.feedback: GuestFeedback = GuestFeedback(begun)
        self.mutator = Mutator(self.machine, self.codec, self.messages, self.pools, Random(seed))
        self.executed = 0
        self._learn_pages()

    def _learn_pages(self) -> None:
        """An honest run shows which pages a hypervisor may want to map elsewhere."""
        run = self.begun.run
        run.play(())
        base = self.machine.vm_of(run.vcpu).memory_spa
        pools = self.pools
        for pfn in (*self.machine.memory.written(), *run.mmu.tables(), *run.mmu.code()):
            spa = pfn << PAGE_SHIFT
            if spa >= base and self.machine.memory.pages[pfn].tag != TAG_HYPERVISOR:
                pools.add("spa", spa)
                pools.add("gpa", spa - base)
        pools.add("page_bytes", PAGE_BYTES)
        for flags in MAP_FLAGS:
            pools.add("flags", flags)

    def seeds(self) -> list[tuple[Record, ...]]:
        """The honest hypervisor and each single lie."""
        return [steps for steps in seeds() if all(self.codec.accepts(step) for step in steps)]

    def run(self, steps: Sequence[Record], *, learn: bool = False, told: object = None) -> Run:
        """Play one input."""
        run = self.begun.run
        self.executed += len(steps)
        try:
            ended = run.play(steps)
        except Exception as error:  # noqa: BLE001  # whatever leaves the model is the finding; the next input goes back
            return Run(len(steps), (crash(error, steps[-1] if steps else Schedule()),), 0)
        return Run(len(steps), tuple(run.findings), self.feedback.take(ended.reason))


def words_of(runner: GuestRunner, steps: Sequence[Record]) -> list[str]:
    """A run of an input in words: what the guest asked for from where, what it said, how it ended."""
    run, name_of = runner.begun.run, runner.begun.run.name_of
    before = run.before
    lines = [f"at {name_of(before.rip)}: {before.mnemonic} ({before.insn.hex(' ')}), CPL {before.cpl}"]
    ended = run.play(steps)
    for request in run.requests:
        what = f"{request.code:#x} {request.info_1:#x} {request.info_2:#x}" if request.by_page else f"{request.code:#x}"
        lines.append(f"asks {'by the page' if request.by_page else 'by the MSR'}: {what} from {name_of(request.rip)}")
    lines += [f"prints: {text}" for text in run.texts]
    lines.append(f"ended: {ended.reason} at {name_of(run.vcpu.regs.rip)}")
    return lines
