"""The same guest behaviour through a feature's path: what the guest asks the hypervisor for instead of exiting.

Each exit that becomes an NAE event is executed in a guest under the feature, and its request is compared with what the
log of the plain guest shows of the same access: port, size, direction, address, registers, data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sevlab.core.events import GuestExit
from sevlab.core.porting import Path
from sevlab.core.svm import ExitCode, exit_name
from sevlab.core.vocabulary import Record, spec_of
from sevlab.traces.assess.judge import Assessor, is_device_access
from sevlab.traces.importers import kvm_exits as ke
from sevlab.traces.replay.kvm_checks import Comparison
from sevlab.traces.replay.tally import Divergence, Tally
from sevlab.traces.schema import Entry

MMIO_READ, MMIO_WRITE = 0x8000_0001, 0x8000_0002
STRING, IN = 1 << 2, 1 << 0
STRING_MOVES = (b"\xa4", b"\xa5")


class FeatureReplay:
    """Replays exchanges under `feature`; ways that are no request count as explained, by name.

    Raises `ConfigError` for a feature that nobody judges.
    """

    def __init__(self, feature: str) -> None:
        self.tally = Tally()
        self._assessor = Assessor(feature)
        self._number = -1

    def run(
        self,
        entries: Iterable[Entry],
        *,
        until: int | None = None,
        only: frozenset[str] = frozenset(),
        stop_at_first: bool = False,
    ) -> Tally:
        """Replay `entries`, as `engine.Replay.run`."""
        for entry in entries:
            if not isinstance(entry.step, GuestExit):
                continue
            if until is not None and self._number + 1 >= until:
                break
            self.exchange(entry, entry.step, only)
            if stop_at_first and self.tally.divergences:
                break
        return self.tally

    def exchange(self, entry: Entry, step: GuestExit, only: frozenset[str]) -> None:
        """Replay one exchange."""
        self._number += 1
        tally, name = self.tally, exit_name(step.exit_code).lower()
        tally.exchanges[name] += 1
        device = step.exit_code == ExitCode.NPF and is_device_access(entry.outcome)
        judgement = self._assessor.judge(step, device)
        if judgement.path is not Path.NAE:
            tally.explained[f"{judgement.path.value}: {judgement.kind}"] += 1
            return
        if only and name not in only:
            return
        outcome = self._assessor.execute(step, judgement)
        requests = [record for record in outcome if spec_of(record).kind == "sev_es.request"]
        compared = 0
        for record in entry.outcome:
            for check, was, now in compare(step, record, requests):
                compared += 1
                tally.checked[name, check] += 1
                if was != now:
                    both = (entry.outcome, outcome)
                    tally.diverges(Divergence(self._number, name, check, was, now, step, both))
        if not compared:
            tally.bare[name] += 1


def compare(step: GuestExit, record: Record, requests: list[Any]) -> Iterator[Comparison]:
    """What the request says of an access that the log shows."""
    if type(record) not in COMPARED or not requests:
        return
    request = requests[0]
    fields = dict(request.fields)
    if isinstance(record, ke.KvmPio):
        yield "port", record.port, request.info_1 >> 16 & 0xFFFF
        yield "size", record.size, request.info_1 >> 4 & 7
        yield "direction", record.is_in, bool(request.info_1 & IN)
        if not record.is_in and not step.exit_info_1 & STRING:
            yield "RAX", record.value, fields.get("rax", 0) & (1 << record.size * 8) - 1
    elif isinstance(record, ke.KvmMmio):
        if record.access == "unsatisfied-read" or len(step.stored) + len(step.answers) != 1:
            return
        yield "event", MMIO_WRITE if record.access == "write" else MMIO_READ, int(request.exit_code)
        yield "address", record.gpa, request.info_1
        yield "width", record.length, request.info_2
        if record.access == "write" and step.insn[-1:] not in STRING_MOVES:
            yield "data", record.value, int.from_bytes(request.data[: record.length], "little")
    elif isinstance(record, ke.KvmMsr):
        yield "MSR", record.number, fields.get("rcx")
        yield "direction", record.write, bool(request.info_1 & 1)
        if record.write:
            yield "value", record.value, fields.get("rdx", 0) << 32 | fields.get("rax", 0)
    elif isinstance(record, ke.KvmCpuid) and step.exit_code == ExitCode.CPUID:
        yield "leaf", record.leaf, fields.get("rax", 0) & 0xFFFF_FFFF
        for subleaf in record.subleaf:
            yield "sub-leaf", subleaf, fields.get("rcx", 0) & 0xFFFF_FFFF


COMPARED = frozenset((ke.KvmPio, ke.KvmMmio, ke.KvmMsr, ke.KvmCpuid))
