"""GHCB traffic of a guest, one JSON array a line: every #VC and every VMGEXIT, as the guest made them.

`["vc", n, code, rip, insn, regs, rflags, cpl]`, `["msr", n, rip, request, reply]`, and `["ghcb", n, rip, gpa, in,
version, usage, in_buffer, out, out_buffer]`; numbers are hexadecimal texts, `in` and `out` map offsets to qwords.
A #VC and the requests up to the next one are one exchange. Source: the README of the captures.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from sevlab.core.cpu import GPR_NAMES
from sevlab.core.events import GuestExit
from sevlab.core.svm import ExitCode
from sevlab.core.units import MASK64
from sevlab.core.vocabulary import Record
from sevlab.traces.importers.log_records import GhcbMsrTraffic, GhcbPageTraffic, HostActivity
from sevlab.traces.schema import Entry

VALID_LOW, VALID_HIGH = 0x3F0, 0x3F8
OPERAND_PREFIX, WRMSR = 0x66, b"\x0f\x30"
MAX_QWORDS = 512
MAX_REQUESTS = 1 << 16
"""Requests of one #VC: a string of 4 KiB elements and every CPUID leaf are far fewer."""

LINES = ('["vc"', '["msr"', '["ghcb"')


def recognise(head: bytes) -> bool:
    """Whether a file that starts with `head` holds such lines."""
    return head.decode("ascii", "replace").replace(" ", "").startswith(LINES)


def exit_info(code: int, insn: bytes, rdx: int) -> int:
    """EXITINFO1 of a port access or an MSR access, which the lines leave out: the instruction determines it."""
    if code == ExitCode.MSR:
        return int(insn.startswith(WRMSR))
    if code != ExitCode.IOIO:
        return 0
    narrow = insn[:1] == bytes((OPERAND_PREFIX,))
    rest = insn[1:] if narrow else insn
    opcode = rest[0] if rest else 0
    size = 1 if not opcode & 1 else 2 if narrow else 4
    port = rdx & 0xFFFF if opcode & 0x8 else rest[1] if len(rest) > 1 else 0
    return port << 16 | size << 4 | (0 if opcode & 2 else 1)


class GhcbLines:
    """A log of GHCB traffic."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.format = "ghcb"
        self._lines = lines
        self._events: Counter[str] = Counter()
        self._exchanges = self._count = self._rejected = 0
        self._examples: list[str] = []

    def entries(self) -> Iterator[Entry]:
        """The entries: the time is the number of the record, since the lines have no clock."""
        step: Record = HostActivity(0)
        requests: list[Record] = []
        number = 0
        for line in self._lines:
            self._count += 1
            try:
                array = json.loads(line)
                kind = array[0]
                position, record = _plain(array[1]), READERS[kind](array)
            except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
                self._rejected += 1
                if len(self._examples) < 10:
                    self._examples.append(f"line {self._count}: {type(error).__name__}: {line[:100].rstrip()}")
                continue
            self._events[kind] += 1
            if kind != "vc":
                requests.append(record)
                if len(requests) >= MAX_REQUESTS:
                    yield Entry(number, 0, step, tuple(requests))
                    step, requests = HostActivity(0), []
                continue
            if requests or isinstance(step, GuestExit):
                yield Entry(number, 0, step, tuple(requests))
            step, requests, number = record, [], position
            self._exchanges += 1
        if requests or isinstance(step, GuestExit):
            yield Entry(number, 0, step, tuple(requests))

    def summary(self) -> dict[str, Any]:
        """What was in the log."""
        return {
            "format": self.format,
            "layout": "seen in captures",
            "lines": self._count,
            "events": dict(self._events.most_common()),
            "exchanges": self._exchanges,
            "vcpus": 1,
            "unknown": {},
            "gaps": 0,
            "rejected": self._rejected,
            "examples": self._examples,
        }


def _number(text: str) -> int:
    return _plain(int(text, 16))


def _plain(number: Any) -> int:
    if type(number) is not int or not 0 <= number <= MASK64:
        raise ValueError(f"{number!r:.40} is no number of 64 bits")
    return number


def _vc(array: list[Any]) -> Record:
    _, _, code, rip, insn, regs, rflags, cpl = array
    values = [_number(value) for value in regs]
    registers = (*zip(GPR_NAMES, values, strict=True), ("rflags", _number(rflags)), ("cpl", _plain(cpl)))
    data = bytes.fromhex(insn)
    info = exit_info(_plain(code), data, values[2])
    return GuestExit(
        0, _number(rip), code, info, 0, data, 64, 0, 0, registers, (), (), False, (), False, False
    )  # fmt: skip


def _msr(array: list[Any]) -> Record:
    return GhcbMsrTraffic(_number(array[3]), _number(array[4]))


def _page(array: list[Any]) -> Record:
    _, _, _, gpa, before, version, usage, data, after, data_after = array
    return GhcbPageTraffic(
        _number(gpa), _qwords(before), _plain(version), _plain(usage), bytes.fromhex(data), _qwords(after),
        bytes.fromhex(data_after),
    )  # fmt: skip


def _qwords(mapping: dict[str, str]) -> tuple[tuple[int, int], ...]:
    if len(mapping) > MAX_QWORDS:
        raise ValueError(f"{len(mapping)} qwords in a page")
    return tuple((_number(offset), _number(value)) for offset, value in mapping.items())


READERS = {"vc": _vc, "msr": _msr, "ghcb": _page}
