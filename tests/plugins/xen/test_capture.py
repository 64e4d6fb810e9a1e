"""The hypercalls of a real HVM guest: VMMCALL records of the xentrace capture.

A record is a little-endian word (bits 27:0 event, 30:28 extra words, 31 time stamp present), an optional 64-bit TSC,
and the extra words. Source: tests/data/captures/README.md; Xen xen/include/public/trace.h.
"""

from __future__ import annotations

import lzma
from collections import Counter
from struct import iter_unpack, unpack_from

import pytest
from sevlab.plugins.xen import TABLE, Fate, Nr, survival
from sevlab.plugins.xen.numbers import Domid, Version

from tests.plugins.xen.world import PAGE, call, guest_of, machine_of
from tests.vectors import capture_set

VMMCALL, VMEXIT, VMEXIT64 = 0x82012, 0x81002, 0x81102
FILE = "xen-4.17-svm-hvm-boot.xentrace.xz"
README_VMMCALLS = 2652
"""Counted in the capture's README, both as VMMCALL records and as exits 81h."""


def records(data):
    position = 0
    while position < len(data):
        (head,) = unpack_from("<I", data, position)
        position += 4 + (8 if head >> 31 else 0)
        words = head >> 28 & 7
        yield head & 0x0FFF_FFFF, data[position : position + words * 4]
        position += words * 4


@pytest.fixture(scope="module")
def trace():
    path = capture_set(FILE)
    calls, exits = [], 0
    for event, extra in records(lzma.decompress(path.read_bytes())):
        if event == VMMCALL:
            calls.append(unpack_from("<I", extra)[0])
        elif event in (VMEXIT, VMEXIT64):
            exits += unpack_from("<I", extra)[0] == 0x81
    return calls, exits


@pytest.mark.slow
def test_every_vmmcall_of_the_capture_is_a_hypercall_that_the_plugin_has(trace):
    calls, exits = trace
    assert len(calls) == exits == README_VMMCALLS
    assert set(calls) <= set(TABLE)
    names = {TABLE[number].name: count for number, count in Counter(calls).items()}
    assert sum(names.values()) == README_VMMCALLS
    assert max(names, key=names.get) == "vcpu_op"  # a timer for every tick


@pytest.mark.slow
def test_the_capture_replays_through_the_plugin(trace):
    """EAX is all that a record has: each call is made with arguments that its number takes without effect."""
    calls, _ = trace
    machine = machine_of()
    guest = guest_of(machine)
    guest.write(PAGE, Domid.SELF.to_bytes(8, "little"))
    served: Counter[int] = Counter()
    for number in calls:
        arguments = {Nr.XEN_VERSION: (Version.VERSION, 0), Nr.SCHED_OP: (0, 0)}.get(number, (63, PAGE))
        assert call(machine, number, *arguments) != -38 or number not in (Nr.XEN_VERSION, Nr.SCHED_OP)
        served[number] += 1
    assert served == Counter(calls)
    assert not machine.hypervisor.vms[0].stopped


@pytest.mark.slow
def test_what_of_the_capture_survives_encryption(trace):
    calls, _ = trace
    fates = Counter()
    for number, count in Counter(calls).items():
        rows = survival(number)
        assert rows, f"hypercall {number} has no row"
        for fate in {row.fate for row in rows}:
            fates[fate] += count
    assert fates[Fate.LINEAR] > 0


def test_the_reader_reads_a_record_with_and_without_a_time_stamp():
    with_tsc = (1 << 31 | 1 << 28 | VMMCALL).to_bytes(4, "little") + bytes(8) + (29).to_bytes(4, "little")
    without = (1 << 28 | VMMCALL).to_bytes(4, "little") + (32).to_bytes(4, "little")
    found = [(event, [word for (word,) in iter_unpack("<I", extra)]) for event, extra in records(with_tsc + without)]
    assert found == [(VMMCALL, [29]), (VMMCALL, [32])]
