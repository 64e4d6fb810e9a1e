"""Every record of a xentrace is compared, an input, unchecked, or Xen's own business: one of them."""

from __future__ import annotations

from collections import Counter

import pytest
from sevlab.core.config import GuestConfig, MachineConfig
from sevlab.core.machine import Machine
from sevlab.traces.importers import xentrace as xt
from sevlab.traces.importers.catalogue import GUEST_BYTES, open_capture
from sevlab.traces.importers.log_records import XenEvent
from sevlab.traces.replay import xen_checks
from sevlab.traces.replay.engine import Replay

from tests.vectors import capture_set

CAPTURE = "xen-4.17-svm-hvm-boot.xentrace.xz"
README = {"VMMCALL": 2652, "INJ_VIRQ": 5822, "HLT": 44, "IOPORT_WRITE": 11163, "NPF": 1768}
EXCHANGES = 6000
"""The firmware and the first of the kernel: every kind of record is in it but hypercalls of devices."""


def replayed(entries):
    config = MachineConfig(plugins=("captured", "xen"), guests=(GuestConfig(vcpus=1, memory_bytes=GUEST_BYTES),))
    return Replay(Machine(config)).run(entries)


@pytest.fixture(scope="module")
def capture():
    entries = []
    for entry in open_capture(capture_set(CAPTURE)).entries():
        entries.append(entry)
        if len(entries) == EXCHANGES:
            return entries
    return entries


def total(counter, name):
    return sum(count for (_, what), count in counter.items() if what == name)


@pytest.mark.slow
def test_what_is_not_compared_is_counted_as_what_it_is(capture):
    tally = replayed(capture)
    events = Counter(
        xt.NAMES.get(record.event) for entry in capture for record in entry.outcome if isinstance(record, XenEvent)
    )
    assert not tally.divergences
    assert total(tally.inputs, "IOPORT_WRITE") == events["IOPORT_WRITE"]
    assert total(tally.unchecked, "HLT") == events["HLT"]
    assert 0 < total(tally.unchecked, "INJ_VIRQ") <= events["INJ_VIRQ"]
    assert total(tally.checked, "hypercall") == events["VMMCALL"]
    assert {what for _, what in tally.unchecked} <= {"INJ_VIRQ", "HLT", "IOPORT_READ", "IOMEM_READ"}
    assert not any(what in ("VMENTRY", "INTR", "INTR_WINDOW") for _, what in (*tally.inputs, *tally.unchecked))


@pytest.mark.long
def test_the_whole_capture_is_accounted_for():
    tally = replayed(open_capture(capture_set(CAPTURE)).entries())
    assert not tally.divergences
    assert total(tally.checked, "hypercall") == total(tally.checked, "hypercall known") == README["VMMCALL"]
    assert total(tally.inputs, "IOPORT_WRITE") == README["IOPORT_WRITE"]
    assert total(tally.unchecked, "HLT") == README["HLT"]
    assert README["INJ_VIRQ"] - 100 < total(tally.unchecked, "INJ_VIRQ") <= README["INJ_VIRQ"]


@pytest.mark.slow
def test_a_changed_byte_of_the_clock_is_noticed(capture):
    def is_clock(record):
        return isinstance(record, XenEvent) and record.event == xt.IOPORT_READ and record.words[:1] == (0x70,)

    at = next(number for number, entry in enumerate(capture) if any(map(is_clock, entry.outcome)))
    entry = capture[at]
    changed = tuple(
        record._replace(words=(0x70, record.words[1] ^ 1)) if is_clock(record) else record for record in entry.outcome
    )
    tally = replayed([*capture[:at], entry._replace(outcome=changed)])
    assert list(tally.divergences) == ["ioio: device value"]


def test_the_hypervisors_own_records_count_as_nothing():
    class Exchange:
        supplied: frozenset[str] = frozenset()

    for event in (0x81001, 0x8200F, 0x82020, 0x84001, 0x84011):
        assert xen_checks.account(Exchange(), XenEvent(event, (1,))) == ("", "")
    assert xen_checks.account(Exchange(), XenEvent(0x82004, (0x30, 0))) == ("unchecked", "INJ_VIRQ")
    assert xen_checks.account(Exchange(), XenEvent(0x82216, (0x80, 1))) == ("input", "IOPORT_WRITE")
