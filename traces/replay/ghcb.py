"""Replay of a guest's GHCB traffic: what a real guest asked is compared with what the reference guest asks.

The guest's registers at each #VC are inputs; its requests are checked field by field. The replies of the log belong to
the hypervisor that was there: the model's own hypervisor answers instead, no answer is compared, and the log's are
counted as unchecked. What the guest made of a reply stands in the registers of its next #VC, and every #VC starts from
the guest as it was set up, so that an answer never changes what is asked later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

from sevlab.core.errors import ConfigError
from sevlab.core.events import CpuExit, GuestExit, SetRegisters
from sevlab.core.machine import Machine
from sevlab.core.plugins import load
from sevlab.core.svm import exit_name
from sevlab.core.vocabulary import Record, spec_of
from sevlab.traces.importers.log_records import GhcbMsrTraffic, GhcbPageTraffic
from sevlab.traces.replay.tally import Divergence, Tally
from sevlab.traces.schema import Entry

SW_EXIT_CODE, SW_INFO_1, SW_INFO_2, VALID_LOW, VALID_HIGH = 0x390, 0x398, 0x3A0, 0x3F0, 0x3F8
SAVE_AREA = {"rax": 0x1F8, "rbx": 0x318, "rcx": 0x308, "rdx": 0x310, "xcr0": 0x3E8, "xss": 0x140, "cpl": 0xCB,
             "dr7": 0x160, "sw_scratch": 0x3A8}  # fmt: skip
"""Offsets of the fields that requests mark valid. Source: 56421, GHCB layout."""

SEV_INFO_REQUEST = 2
GHCB_GPA = 0x5000
FEATURE, EARLY = "sev-es", "sev-es-early"


def subject(feature: str = EARLY) -> Machine:
    """A machine with an SEV-ES guest, from whoever brings one. Raises `ConfigError` when nobody does."""
    found = [one for ports in load(["sev_es"]).call("sevlab_porting").values() for one in ports]
    make = next((one.subject for one in found if one.feature == feature and one.subject is not None), None)
    if make is None:
        raise ConfigError(f"no plugin brings a guest for {feature}")
    return cast("Machine", make())


class GhcbReplay:
    """Replays exchanges; `tally` counts."""

    def __init__(self) -> None:
        self.machine = subject()
        self.machine.mark()
        self.tally = Tally()
        self._has_page = False
        self._number = -1

    def run(self, entries: Iterable[Entry], *, until: int | None = None, stop_at_first: bool = False) -> Tally:
        """Replay `entries`, up to exchange number `until`."""
        for entry in entries:
            if not isinstance(entry.step, GuestExit):
                continue
            if until is not None and self._number + 1 >= until:
                break
            self.exchange(entry)
            if stop_at_first and self.tally.divergences:
                break
        return self.tally

    def exchange(self, entry: Entry) -> None:
        """One #VC with the requests that it led to."""
        step = cast("GuestExit", entry.step)
        self._number += 1
        name = exit_name(step.exit_code).lower()
        tally = self.tally
        tally.exchanges[name] += 1
        if not self._has_page and any(isinstance(record, GhcbPageTraffic) for record in entry.outcome):
            self._has_page = True
            # The step's kind names it: traces know no plugin.
            set_up = self.machine.vocabulary.decode(("sev_es.vc-setup", 0, GHCB_GPA))
            self.machine.reset()
            self.machine.apply(set_up)
            self.machine.mark()
        self.machine.reset()
        self.machine.apply(SetRegisters(0, (*step.registers, ("rip", step.rip))))
        exit_ = CpuExit(0, step.exit_code, step.exit_info_1, 0, step.insn, 0)
        outcome = self.machine.apply(exit_).records
        asked = iter([record for record in outcome if spec_of(record).kind in ("sev_es.request", "sev_es.msr")])
        tally.inputs[name, "registers"] += len(step.registers)
        compared = 0
        for record in entry.outcome:
            for check, was, now in self._compare(record, asked):
                compared += 1
                tally.checked[name, check] += 1
                if was != now:
                    tally.diverges(Divergence(self._number, name, check, was, now, step, (entry.outcome, outcome)))
        more = next(asked, None)
        if more is not None:
            tally.diverges(
                Divergence(self._number, name, "one request more", None, more, step, (entry.outcome, outcome))
            )
        if not compared:
            tally.bare[name] += 1

    def _compare(self, record: Record, asked: Iterator[Any]) -> Iterator[tuple[str, Any, Any]]:
        if isinstance(record, GhcbMsrTraffic):
            if record.request == SEV_INFO_REQUEST:
                self.tally.explained["the kernel asks before its GHCB is set up"] += 1
                return
            now = next(asked, None)
            yield "MSR request", record.request, None if now is None else now.request
            self.tally.unchecked["reply", "MSR reply"] += 1
            return
        if not isinstance(record, GhcbPageTraffic):
            return
        qwords = dict(record.qwords)
        if qwords.get(SW_EXIT_CODE) in OWN_REQUESTS:
            self.tally.explained[OWN_REQUESTS[qwords[SW_EXIT_CODE]]] += 1
            return
        now = next(asked, None)
        if now is None or spec_of(now).kind != "sev_es.request":
            yield "request by the page", record, now
            return
        self.tally.unchecked["reply", "GHCB reply"] += 1
        valid = qwords.get(VALID_LOW, 0) | qwords.get(VALID_HIGH, 0) << 64
        yield "SW_EXITCODE", qwords.get(SW_EXIT_CODE, 0), int(now.exit_code)
        yield "SW_EXITINFO1", qwords.get(SW_INFO_1, 0), now.info_1
        yield "SW_EXITINFO2", qwords.get(SW_INFO_2, 0), now.info_2
        yield "valid bitmap", valid, int.from_bytes(now.valid, "little")
        for name, value in now.fields:
            offset = SAVE_AREA.get(name)
            if offset is not None:
                yield name, qwords.get(offset & ~7, 0) >> (offset & 7) * 8 & (0xFF if offset & 7 else MASK), value
        yield "shared buffer", record.data, now.data


MASK = (1 << 64) - 1
OWN_REQUESTS = {0x8000_0005: "a request of the kernel's own, outside any #VC"}
"""Requests that no #VC leads to: the AP jump table."""
