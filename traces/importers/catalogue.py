"""Which importer reads a capture: every format says whether it recognises the first bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sevlab.core.config import GuestConfig, MachineConfig
from sevlab.core.errors import TraceFormatError
from sevlab.traces.importers import ccp_log, ghcb_lines, kvm_text, trace_dat, xentrace
from sevlab.traces.importers.source import UNPACK_ERRORS, Source, open_source
from sevlab.traces.schema import Entry, Header
from sevlab.traces.schema import Source as Origin

MAX_VCPUS = 64
GUEST_BYTES = 1 << 16
"""Memory of the model's guest: only operands of string instructions lie there. What a log maps is the log's."""


class Log(Protocol):
    """A capture that is being read: `entries` reads it once, `summary` says afterwards what was in it."""

    format: str

    def entries(self) -> Iterator[Entry]: ...

    def summary(self) -> dict[str, Any]: ...


class Format(NamedTuple):
    """One format. `refuses(head)` says why a file that starts so is another; empty when it may be this one."""

    name: str
    what: str
    plugins: tuple[str, ...]
    """What replays it."""
    refuses: Callable[[bytes], str]
    open: Callable[[Source], Log]


def _kvm(name: str) -> Format:
    def refuses(head: bytes) -> str:
        found = kvm_text.recognise(head)
        first = head[:80].split(b"\n", 1)[0].decode("ascii", "replace")
        return "" if found == name else f"its lines are {found or 'no event lines'}: {first!r}"

    what = {"ftrace": "tracefs: cat trace", "trace-cmd": "trace-cmd report, both styles", "perf": "perf script"}[name]
    return Format(name, what, ("captured",), refuses, lambda source: kvm_text.KvmText(name, source.text()))


def _dat(source: Source) -> Log:
    return kvm_text.KvmText("trace.dat", trace_dat.lines(source))


def _starts(magic: bytes) -> Callable[[bytes], str]:
    return lambda head: "" if head.startswith(magic) else f"it starts with {head[:10].hex(' ')}, not {magic.hex(' ')}"


FORMATS: tuple[Format, ...] = (
    Format("trace.dat", "trace-cmd's binary file", ("captured",), _starts(trace_dat.MAGIC), _dat),
    Format(
        "xentrace",
        "xentrace's binary file",
        ("captured", "xen"),
        lambda head: "" if xentrace.recognise(head) else "it does not start with a window of a CPU",
        lambda source: xentrace.XenTrace(source.stream),
    ),
    Format(
        "ghcb",
        "GHCB traffic of a guest, JSON lines",
        ("io", "sme", "sev", "sev_es"),
        lambda head: "" if ghcb_lines.recognise(head) else "its lines are no arrays of vc, msr, ghcb",
        lambda source: ghcb_lines.GhcbLines(source.text()),
    ),
    Format(
        "ccp",
        "debug output of the ccp driver in a kernel log",
        ("sev",),
        lambda head: "" if ccp_log.recognise(head) else "no line of its start is a command of the ccp driver",
        lambda source: ccp_log.CcpLog(source.text()),
    ),
    *(_kvm(name) for name in ("ftrace", "trace-cmd", "perf")),
)
"""All formats, in the order in which they are tried."""


class Capture(NamedTuple):
    """A capture, opened: `format`, the reader of its entries, and the header of a trace of it."""

    format: Format
    log: Log
    header: Header
    source: Source

    def entries(self) -> Iterator[Entry]:
        """The entries; the file is closed behind the last one. Raises `TraceFormatError` for one that is damaged."""
        try:
            yield from self.log.entries()
        except UNPACK_ERRORS as error:
            raise TraceFormatError(f"{self.source.path}: cannot be unpacked further: {error}") from error
        finally:
            self.source.close()


def choose(source: Source, format_name: str = "") -> Format:
    """The format of a source, or the one that is named. Raises `TraceFormatError` as `open_capture`."""
    if format_name:
        named = next((one for one in FORMATS if one.name == format_name), None)
        if named is None:
            names = ", ".join(one.name for one in FORMATS)
            raise TraceFormatError(f"{source.path}: format {format_name!r}: expected one of {names}")
        return named
    reasons = [(one, one.refuses(source.head)) for one in FORMATS]
    chosen = next((one for one, reason in reasons if not reason), None)
    if chosen is None:
        tried = "\n".join(f"  {one.name}: {reason}" for one, reason in reasons)
        raise TraceFormatError(f"{source.path}: no format that is known; tried:\n{tried}")
    return chosen


def open_capture(path: str | Path, format_name: str = "") -> Capture:
    """Open a capture; `format_name` forces a format.

    Raises `TraceFormatError` that says what was tried and why each failed, or that the format is unknown.
    """
    source = open_source(Path(path))
    try:
        chosen = choose(source, format_name)
    except TraceFormatError:
        source.close()
        raise
    config = MachineConfig(plugins=chosen.plugins, guests=(GuestConfig(vcpus=MAX_VCPUS, memory_bytes=GUEST_BYTES),))
    header = Header(config=config, source=Origin(chosen.name, source.path.name, source.sha256()))
    return Capture(chosen, chosen.open(source), header, source)
