"""Assess a capture: every exit judged under a feature, and what takes the place of an NAE exit really executed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from sevlab.core.errors import ConfigError
from sevlab.core.events import CpuExit, GuestExit, SetRegisters
from sevlab.core.machine import Machine
from sevlab.core.plugins import PluginSet, load
from sevlab.core.porting import CallFate, Judgement, Path
from sevlab.core.svm import ExitCode
from sevlab.core.units import PAGE_BYTES
from sevlab.core.vocabulary import Record, spec_of
from sevlab.traces.importers import kvm_exits as ke
from sevlab.traces.importers import kvm_host as kh
from sevlab.traces.importers import kvm_interrupts as ki
from sevlab.traces.importers.log_records import XenEvent
from sevlab.traces.importers.xentrace import IOMEM_READS, IOMEM_WRITES, VMMCALL
from sevlab.traces.schema import Entry

KERNEL_HALF = 0xFFFF_8000_0000_0000
"""Before a processor gets there, firmware and early boot run: they need a #VC handler of their own."""

CACHED = 1 << 14
BUCKETS = 120
RIP = 0x1000
DEVICE_EVENTS = frozenset((*IOMEM_READS, *IOMEM_WRITES))
DEVICE_RECORDS = frozenset((ke.KvmMmio, ke.KvmFastMmio))
SHARED_BY_PARAVIRTUALISATION: dict[type, str] = {
    ki.KvmPvEoi: "the flag of paravirtual interrupt ends (KVM PV EOI), one for each vCPU",
    kh.KvmPvclockUpdate: "the clock page (kvmclock), one for each vCPU",
    kh.KvmPvTlbFlush: "the steal-time page with the flush flag, one for each vCPU",
}


@dataclass
class Exchanged:
    """What was executed for exits of one kind: how many, how many requests they took, and one of them in words."""

    exits: int = 0
    requests: int = 0
    forms: int = 0
    example: list[str] = field(default_factory=list)


@dataclass
class Row:
    """Exits of one kind."""

    path: Path
    kind: str
    exits: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    linux: Counter[str] = field(default_factory=Counter)
    xen: Counter[str] = field(default_factory=Counter)
    executed: Exchanged = field(default_factory=Exchanged)
    instructions: int = 0
    """Instructions behind the exits: one string instruction exits many times."""


@dataclass
class Called:
    """Hypercalls of one number; `operations` are what such a number can ask for: the log does not show which it was."""

    number: int
    operations: tuple[CallFate, ...]
    calls: int = 0

    @property
    def name(self) -> str:
        """What the hypervisor calls it."""
        return self.operations[0].call if self.operations else "unknown"

    def fate(self) -> str:
        """Whether it goes on working as it is."""
        allowed = [one for one in self.operations if one.allowed]
        surviving = sum(one.survives for one in allowed)
        if not allowed:
            return "not for guests" if self.operations else "unknown"
        if surviving in (0, len(allowed)):
            return "works" if surviving else "fails"
        return f"{surviving} of {len(allowed)} operations work"

    def instead(self) -> list[str]:
        """What takes the place of the operations that fail."""
        failing = [one for one in self.operations if one.allowed and not one.survives]
        count = Counter(what for one in failing for what in one.instead[:1])
        return [what if len(count) == 1 else f"{what} ({times})" for what, times in count.most_common()]

    def shared(self) -> list[str]:
        """What must be shared besides the arguments."""
        return list(dict.fromkeys(one.shared for one in self.operations if one.shared))


@dataclass
class Refused:
    """A place that cannot be served."""

    rip: int
    insn: bytes
    kind: str
    reason: str
    exits: int = 0
    number: int = 0


class Timeline:
    """Exits by slices of time and path: `BUCKETS` at most, which grow wider as the log goes on."""

    def __init__(self) -> None:
        self.start_ns = -1
        self.width_ns = 1_000_000
        self.counts: dict[Path, list[int]] = {path: [0] * BUCKETS for path in Path}

    def add(self, time_ns: int, path: Path) -> None:
        """Count an exit; one before the first counts with the first."""
        if self.start_ns < 0:
            self.start_ns = time_ns
        slice_ = max(time_ns - self.start_ns, 0) // self.width_ns
        while slice_ >= BUCKETS:
            self.width_ns *= 2
            slice_ //= 2
            for name, counts in self.counts.items():
                self.counts[name] = [a + b for a, b in zip(counts[::2], counts[1::2], strict=True)] + [0] * (
                    BUCKETS // 2
                )
        self.counts[path][slice_] += 1


@dataclass
class Assessment:
    """The result; totals of `rows` equal the exits of the capture."""

    feature: str
    exits: int = 0
    rows: dict[tuple[Path, str], Row] = field(default_factory=dict)
    refused: dict[tuple[int, bytes, str], Refused] = field(default_factory=dict)
    early: Counter[Path] = field(default_factory=Counter)
    """Exits before the kernel."""
    device_pages: Counter[int] = field(default_factory=Counter)
    paravirtual: Counter[str] = field(default_factory=Counter)
    hypercalls: dict[int, Called] = field(default_factory=dict)
    """Of Xen's guests, by number."""
    vcpus: int = 0
    timeline: Timeline = field(default_factory=Timeline)

    def total(self, path: Path) -> int:
        """Exits that go this way."""
        return sum(row.exits for row in self.rows.values() if row.path is path)

    def shared(self) -> list[str]:
        """What has to be shared memory."""
        what = [f"the GHCB page, one for each of {self.vcpus} vCPUs"] if self.feature != "sev" else []
        what += [f"{len(self.device_pages)} pages of devices (never memory of the guest)"] if self.device_pages else []
        if any(row.kind == "IOIO string" for row in self.rows.values()) and self.feature != "sev":
            what.append("the GHCB's shared buffer, for the data of string I/O")
        what += sorted(self.paravirtual)
        what.append("buffers that devices reach by DMA: no log of exits shows them")
        return what

    def page_state(self) -> list[str]:
        """What the guest and the hypervisor do about the RMP, and what of it no log of a plain guest can show.

        Source: 24593, 15.36 (RMPUPDATE, PVALIDATE); 56421, Page State Change.
        """
        if self.feature != "snp":
            return []
        faults = sum(row.exits for row in self.rows.values() if row.kind == "RAM fault")
        return [
            f"{faults:,} faults populated memory: each page then is assigned (RMPUPDATE) before the guest goes on",
            "every private page is validated once (PVALIDATE); no log of exits shows how many",
            f"{self.vcpus} GHCB pages and what is named above become shared: a Page State Change entry each",
            "buffers for DMA become shared and private again: a plain guest makes no exit for that",
        ]


class Assessor:
    """Judges entries one by one. Raises `ConfigError` for a feature that no installed plugin judges."""

    def __init__(self, feature: str, plugins: PluginSet | None = None, *, execute: bool = True) -> None:
        plugins = plugins or load(["captured", "sev_es", "xen"])
        found = [one for ports in plugins.call("sevlab_porting").values() for one in ports]
        self._judge = next((one.judge for one in found if one.feature == feature and one.judge is not None), None)
        if self._judge is None:
            known = ", ".join(dict.fromkeys(one.feature for one in found if one.judge is not None))
            raise ConfigError(f"feature {feature!r}: expected one of {known}")
        make = next((one.subject for one in found if one.feature == feature and one.subject is not None), None)
        self._subject: Machine | None = make() if make is not None and execute else None
        if self._subject is not None:
            self._subject.mark()
        self._calls = next((one.calls for one in found if one.feature == feature and one.calls is not None), None) or {}
        self.result = Assessment(feature)
        self._cache: dict[tuple[Any, ...], tuple[int, list[str]]] = {}
        self._kernel: set[int] = set()
        self._goes_on: dict[int, int] = {}

    def run(self, entries: Iterable[Entry], progress: Callable[[int], None] | None = None) -> Assessment:
        """Assess every exchange of `entries`."""
        result = self.result
        for entry in entries:
            if isinstance(entry.step, GuestExit):
                self.exchange(entry, entry.step)
                if progress is not None and not result.exits % 1000:
                    progress(result.exits)
        return result

    def exchange(self, entry: Entry, step: GuestExit) -> None:
        """Assess one exchange."""
        result = self.result
        is_device = step.exit_code == ExitCode.NPF and is_device_access(entry.outcome)
        judgement = self.judge(step, is_device)
        result.exits += 1
        result.vcpus = max(result.vcpus, step.vcpu + 1)
        row = result.rows.get((judgement.path, judgement.kind))
        if row is None:
            row = result.rows[judgement.path, judgement.kind] = Row(judgement.path, judgement.kind)
        row.exits += 1
        again = self._goes_on.get(step.vcpu) == step.rip
        row.instructions += not again
        self._goes_on[step.vcpu] = _next_rip(entry.outcome)
        for reason, counter in (
            (judgement.reason, row.reasons),
            (judgement.linux, row.linux),
            (judgement.xen, row.xen),
        ):
            if reason:
                counter[reason] += 1
        if step.rip >= KERNEL_HALF:
            self._kernel.add(step.vcpu)
        elif step.vcpu not in self._kernel:
            result.early[judgement.path] += 1
        if is_device:
            result.device_pages[step.exit_info_2 // PAGE_BYTES] += 1
        for record in entry.outcome:
            what = SHARED_BY_PARAVIRTUALISATION.get(type(record))
            if what is not None:
                result.paravirtual[what] += 1
            elif type(record) is XenEvent and record.event == VMMCALL and record.words:
                self._called(record.words[0])
        if judgement.path is Path.CANNOT:
            key = (step.rip, step.insn, judgement.reason)
            place = result.refused.setdefault(key, Refused(step.rip, step.insn, judgement.kind, judgement.reason))
            place.exits += 1
            place.number = place.number or result.exits - 1
        elif judgement.path is Path.NAE and self._subject is not None:
            self._execute(step, judgement, row.executed)
        result.timeline.add(entry.time_ns, judgement.path)

    def _called(self, number: int) -> None:
        calls = self.result.hypercalls
        if number not in calls:
            calls[number] = Called(number, tuple(self._calls.get(number, ())))
        calls[number].calls += 1

    def judge(self, step: GuestExit, is_device: bool) -> Judgement:  # noqa: FBT001  # as `Porting.judge`
        """What becomes of an exit."""
        assert self._judge is not None
        judgement: Judgement = self._judge(step, is_device)
        return judgement

    def execute(self, step: GuestExit, judgement: Judgement) -> tuple[Record, ...]:
        """Do in the subject what the guest did, and return what happened; nothing where there is no subject."""
        subject = self._subject
        if subject is None:
            return ()
        subject.reset()
        subject.apply(SetRegisters(0, (("rip", RIP), *judgement.registers)))
        device = step.exit_code == ExitCode.NPF
        info_1 = step.exit_info_1 | RESERVED if device else step.exit_info_1
        exit_ = CpuExit(0, step.exit_code, info_1, step.exit_info_2 if device else 0, judgement.insn, 0)
        return subject.apply(exit_).records

    def _execute(self, step: GuestExit, judgement: Judgement, executed: Exchanged) -> None:
        """Do in the subject what the guest did: once for each form of it, counted for every exit."""
        key = (step.exit_code, step.exit_info_1, step.exit_info_2 & ~0xFFF if step.exit_code == ExitCode.NPF else 0,
               judgement.insn, judgement.registers)  # fmt: skip
        known = self._cache.get(key)
        if known is None:
            if len(self._cache) >= CACHED:
                self._cache.clear()
            known = self._cache[key] = self._ask(step, judgement)
            executed.forms += 1
        executed.exits += 1
        executed.requests += known[0]
        if not executed.example or (known[0] and not any("asks" in line for line in executed.example)):
            executed.example = known[1]

    def _ask(self, step: GuestExit, judgement: Judgement) -> tuple[int, list[str]]:
        records = self.execute(step, judgement)
        return sum(spec_of(record).kind in REQUESTS for record in records), [words(record) for record in records]


REQUESTS = ("sev_es.request", "sev_es.msr")
RESERVED = 1 << 3
"""A page of a device is marked by a reserved bit, which makes the fault #VC. Source: 24593, 15.35.4."""

WORDS = {"sev_es.vc": "guest gets #VC", "sev_es.request": "guest asks", "sev_es.reply": "hypervisor answers"}


def words(record: Record) -> str:
    """A record of the exchange as a line."""
    spec = spec_of(record)
    shown = (
        f"{item.name}={value:#x}"
        if isinstance(value, int) and not isinstance(value, bool)
        else f"{item.name}={_plain(value)}"
        for item, value in zip(spec.fields, record, strict=True)
        if value not in (0, b"", ())
    )
    return f"{WORDS.get(spec.kind, spec.kind)}: {', '.join(shown)}"


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:#x}"
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return " ".join(f"{name}={number:#x}" for name, number in value)
    return str(value)


def is_device_access(outcome: tuple[Record, ...]) -> bool:
    """Whether a nested fault met a device."""
    return any(
        type(record) in DEVICE_RECORDS or (isinstance(record, XenEvent) and record.event in DEVICE_EVENTS)
        for record in outcome
    )


def _next_rip(outcome: tuple[Record, ...]) -> int:
    return next((record.rip for record in outcome if type(record) is ke.KvmEntry), -1)
