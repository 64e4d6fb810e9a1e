"""The ccp driver's debug output in a kernel log: mailbox commands with their buffers before and after.

A command prints its id and buffer address, a dump before (`(in)`), an error line if it failed, and a dump after
(`(out)`). A dump is 16-bit words in little-endian order, so that bytes look swapped; a row with an odd rest is bytes. A
command without buffer prints no dump. Commands nest: page-state work happens between the dumps of another command.

Source: Linux drivers/crypto/ccp/sev-dev.c (__sev_do_cmd_locked), lib/hexdump.c.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from sevlab.core.events import AspCommand, AspStatus
from sevlab.core.vocabulary import Record
from sevlab.traces.importers.log_records import OpaqueEvent
from sevlab.traces.schema import NO_VCPU, Entry

STAMP = re.compile(r"\s*(?:\[\s*(?P<time>\d{1,10}\.\d{1,9})\]\s*)?(?P<text>.*)")
COMMAND = re.compile(r"(?:\S+ )*?sev command id (?P<id>0x[0-9a-f]{1,8}) buffer 0x(?P<spa>[0-9a-f]{1,16}) timeout \d+s")
FAILED = re.compile(
    r"(?:\S+ )*?sev command (?P<id>0x[0-9a-f]{1,8}) (?:failed \((?P<status>0x[0-9a-f]{1,8})\)|timed out.*)"
)
GROUP = "[0-9a-f]{2}(?:[0-9a-f]{2})?"
DUMP = re.compile(rf"\((?P<side>in|out)\):\s+(?P<offset>[0-9a-f]{{8}}): (?P<bytes>{GROUP}(?: {GROUP})*)")
WORD_DIGITS = 4
MAX_BUFFER_BYTES = 4096
MAX_NESTED = 16
INTERFACE = "sev"
TIMED_OUT = 0xFFFF_FFFF
"""Stands for the status of a command that the firmware did not finish."""


def recognise(head: bytes) -> bool:
    """Whether a text that starts with `head` holds a command of the driver."""
    return any("sev command id 0x" in line for line in head.decode("utf-8", "replace").splitlines())


def dump_bytes(text: str) -> bytes:
    """The bytes of a dump's row."""
    return b"".join(
        int(group, 16).to_bytes(2, "little") if len(group) == WORD_DIGITS else bytes.fromhex(group)
        for group in text.split()
    )


class _Command:
    """A command under way."""

    def __init__(self, number: int, spa: int, time_ns: int) -> None:
        self.number = number
        self.spa = spa
        self.time_ns = time_ns
        self.status = 0
        self.before = b""
        self.after = b""

    def entry(self) -> Entry:
        """The command as a step with what it was answered."""
        step: Record = AspCommand(INTERFACE, self.number, self.spa, self.before)
        return Entry(self.time_ns, NO_VCPU, step, (AspStatus(self.number, self.status, self.after),))


class CcpLog:
    """A kernel log with the driver's debug output."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.format = "ccp"
        self._lines = lines
        self._count = self._others = self._orphans = 0
        self._commands: Counter[int] = Counter()
        self._failed: Counter[int] = Counter()

    def entries(self) -> Iterator[Entry]:
        """The commands in the order in which they ended; dumps without command are kept as opaque events."""
        stack: list[_Command] = []
        for line in self._lines:
            self._count += 1
            stamped = STAMP.match(line.rstrip("\n"))
            text = stamped["text"] if stamped else ""
            time_ns = int(float(stamped["time"]) * 1_000_000_000) if stamped and stamped["time"] else 0
            dump = DUMP.fullmatch(text.rstrip())
            if dump is not None:
                if dump["side"] == "out" and not int(dump["offset"], 16) and stack and stack[-1].after:
                    yield stack.pop().entry()  # another dump begins: the inner command has ended
                if not self._dump(stack, dump):
                    self._orphans += 1
                    yield Entry(time_ns, NO_VCPU, AspCommand("", 0, 0, b""), (OpaqueEvent("ccp", text),))
                continue
            if stack and stack[-1].after:
                yield stack.pop().entry()
            begun = COMMAND.fullmatch(text.rstrip())
            if begun is not None:
                if stack and not stack[-1].before:
                    yield stack.pop().entry()  # it has no buffer: nothing more is printed of it
                if len(stack) >= MAX_NESTED:
                    yield stack.pop(0).entry()
                stack.append(_Command(int(begun["id"], 16), int(begun["spa"], 16), time_ns))
                self._commands[stack[-1].number] += 1
                continue
            failed = FAILED.fullmatch(text.rstrip())
            if failed is not None and stack and stack[-1].number == int(failed["id"], 16):
                stack[-1].status = int(failed["status"], 16) if failed["status"] else TIMED_OUT
                self._failed[stack[-1].status] += 1
            else:
                self._others += 1
        while stack:
            yield stack.pop().entry()

    @staticmethod
    def _dump(stack: list[_Command], dump: re.Match[str]) -> bool:
        """Add a row to the command it belongs to; False when there is none."""
        data, offset = dump_bytes(dump["bytes"]), int(dump["offset"], 16)
        if not stack or offset + len(data) > MAX_BUFFER_BYTES:
            return False
        command = stack[-1]
        side = "before" if dump["side"] == "in" else "after"
        if len(getattr(command, side)) != offset:
            return False
        setattr(command, side, getattr(command, side) + data)
        return True

    def summary(self) -> dict[str, Any]:
        """What was in the log."""
        return {
            "format": self.format,
            "layout": "source-derived",
            "lines": self._count,
            "events": {f"command {number:#x}": count for number, count in self._commands.most_common()},
            "failed": {f"{status:#x}": count for status, count in self._failed.items()},
            "exchanges": sum(self._commands.values()),
            "other_lines": self._others,
            "unknown": {"dump without command": self._orphans} if self._orphans else {},
            "gaps": 0,
            "rejected": 0,
            "examples": [],
        }
