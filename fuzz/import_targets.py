"""The targets of the importers: whatever the bytes, entries that a trace takes and a summary that adds up.

Bytes that make no sense are rejected lines or a `TraceFormatError` of the file; nothing else leaves an importer.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from struct import pack
from typing import Any, NamedTuple

from sevlab.core.errors import InvariantViolation, TraceFormatError
from sevlab.core.events import GuestExit
from sevlab.traces.codec import BlockPacker, Codec
from sevlab.traces.importers.catalogue import Log, choose
from sevlab.traces.importers.ccp_log import CcpLog
from sevlab.traces.importers.events import EVENTS
from sevlab.traces.importers.ghcb_lines import GhcbLines
from sevlab.traces.importers.kvm_text import KvmText
from sevlab.traces.importers.source import PACKED, UNPACK_ERRORS, Source, lines_of, open_stream
from sevlab.traces.importers.trace_dat import MAGIC
from sevlab.traces.importers.xentrace import CPU_CHANGE_HEADER, VMENTRY, XenTrace
from sevlab.traces.schema import declared, vocabulary_of

Target = Callable[[bytes], None]
PLUGINS = ("captured",)
MAX_ENTRIES = 1 << 12
"""A small file that unpacks to more is no more of a test."""


def _source(data: bytes) -> Source:
    return open_stream(Path("fuzzed"), io.BytesIO(data))


def _whole(data: bytes) -> Log:
    """As `sevlab import` opens a file; a trace.dat is another program's business."""
    source = _source(data)
    if source.head.startswith(MAGIC):
        raise TraceFormatError("a trace.dat")
    return choose(source).open(source)


class Importer(NamedTuple):
    """One target: how bytes become a log, and inputs to start from."""

    open: Callable[[bytes], Log]
    seeds: Callable[[], Iterator[bytes]]


def import_target(name: str) -> Target:
    """A function that imports its bytes with importer `name`, packs the entries and looks at the summary.

    Raises `InvariantViolation` for a summary that does not add up.
    """
    importer = IMPORTERS[name]
    vocabulary = vocabulary_of(PLUGINS)
    codec = Codec(declared(vocabulary), vocabulary)

    def run(data: bytes) -> None:
        try:
            log = importer.open(data)
            entries = log.entries()
        except TraceFormatError:
            return
        packer, exchanges = BlockPacker(codec), 0
        for number, entry in enumerate(_until_damaged(entries), 1):
            packer.pack(entry)  # an importer makes nothing that a trace does not take
            exchanges += isinstance(entry.step, GuestExit)
            if number >= MAX_ENTRIES:
                return
        _adds_up(log.summary(), exchanges)

    return run


def _until_damaged(entries: Iterator[Any]) -> Iterator[Any]:
    """What comes before the place where a packed file is damaged."""
    while True:
        try:
            entry = next(entries, None)
        except (TraceFormatError, *UNPACK_ERRORS):
            return
        if entry is None:
            return
        yield entry


def _adds_up(summary: Mapping[str, Any], exchanges: int) -> None:
    counted = sum(summary["events"].values())
    wrong = []
    if summary["format"] in ("ftrace", "trace-cmd", "perf"):
        lines = counted + summary["headers"] + summary["rejected"] + summary["gaps"]
        wrong = ["lines"] * (lines != summary["lines"])
        wrong += ["exchanges"] * (summary["exchanges"] != exchanges)
    elif summary["format"] == "ghcb":
        wrong = ["lines"] * (counted + summary["rejected"] != summary["lines"])
    elif summary["format"] == "xentrace":
        wrong = ["exchanges"] * (summary["exchanges"] != exchanges)
    if wrong or len(summary["examples"]) > 10:
        raise InvariantViolation("trace.import", f"the summary's {', '.join(wrong) or 'examples'} do not add up")


# Inputs to start from ---------------------------------------------------------------------------------------------

SAMPLES = {
    "x": "0x1f", "d": "3", "byte": "-1", "bytes": "0f a2", "w": "prot64", "t": "text", "reason": "io",
    "apicreg": "APIC_EOI", "vector": "GP", "clock": "tsc", "delivery": "Fixed", "shorthand": "dst",
}  # fmt: skip
"""A text for each form of a template's field."""


def sample(template: str) -> str:
    """A text that a template describes."""

    def text(field: re.Match[str]) -> str:
        kind, _, rest = field[1].partition(":")
        return rest if kind == "is" else rest.split("|")[0] if kind == "one" else SAMPLES.get(kind, "1")

    return re.sub(r"\{\w+:([^}]*)\}", text, template).replace("<", "").replace(">", "")


def _kvm_seeds() -> Iterator[bytes]:
    head = " CPU 0/KVM-7     [000] d..1.    12.345678: "
    enter = f"{head}kvm_entry: vcpu 0, rip 0xfff0\n"
    leave = "vcpu 0 reason io rip 0xfff0 info1 0x3f80210 info2 0xfff1 intr_info 0x80000030 error_code 0x00000000"
    around = f"{enter}{head}kvm_exit: {leave}\n", enter
    for event in EVENTS.values():
        for template in event.templates:
            yield f"{around[0]}{head}{event.name}: {sample(template)}\n{around[1]}".encode()
    yield b"# tracer: nop\n#\n" + enter.encode() + b"CPU:1 [LOST 12 EVENTS]\n"
    yield b"cpus=2\n" + f"{around[0]}{around[1]}".replace(" rip", ", rip").encode()
    yield b" qemu 7/7 [001]  1.5: kvm:kvm_entry: vcpu 1, rip 0x10\n"


def _xen_seeds() -> Iterator[bytes]:
    def record(event: int, *words: int, time: int | None = None) -> bytes:
        head = event | len(words) << 28 | (0 if time is None else 1 << 31)
        return pack("<I", head) + (b"" if time is None else pack("<Q", time)) + pack(f"<{len(words)}I", *words)

    start = pack("<3I", CPU_CHANGE_HEADER, 0, 200)
    for code, event in ((0x7B, 0x82016), (0x400, 0x82217), (0x7C, 0x8200D), (0x72, 0x8200E), (0x81, 0x82012)):
        leave = record(0x81102, code, 0x10, 0, time=5)
        yield start + leave + record(event, *range(6 if event == 0x8200E else 3)) + record(VMENTRY, time=9)


def _ghcb_seeds() -> Iterator[bytes]:
    lines: list[list[Any]] = [
        ["vc", 1, 0x7B, "0x1", "ee", ["0x0"] * 16, "0x2", 0],
        ["msr", 2, "0x2", "0x4", "0x5"],
        ["ghcb", 3, "0x3", "0x1000", {"0x390": "0x7b"}, 1, 0, "00ff", {"0x1f8": "0x0"}, ""],
    ]
    yield "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()
    yield from (json.dumps(line).encode() for line in lines)


def _ccp_seeds() -> Iterator[bytes]:
    head = "[73879.609280] ccp 0000:07:00.4: sev command "
    yield (
        f"{head}id 0x4 buffer 0x0000001104ce9000 timeout 100s\n(in):  00000000: 0000 01\n{head}0x4 failed (0x1a)\n"
        f"(out): 00000000: 3701 0001\n{head}id 0xc7 buffer 0x10 timeout 1s\n{head}0xc7 timed out, disabling PSP\n"
    ).encode()


def _whole_seeds() -> Iterator[bytes]:
    import gzip
    import lzma

    import zstandard

    for name in ("kvm", "xentrace", "ghcb", "ccp"):
        *_, last = IMPORTERS[name].seeds()
        yield last
        yield from (lzma.compress(last), gzip.compress(last), zstandard.compress(last))
    yield from (magic for magic, _ in PACKED)


def _lines(data: bytes) -> Iterable[str]:
    return lines_of(io.BytesIO(data))


IMPORTERS: Mapping[str, Importer] = {
    "kvm": Importer(lambda data: KvmText("ftrace", _lines(data)), _kvm_seeds),
    "xentrace": Importer(lambda data: XenTrace(io.BytesIO(data)), _xen_seeds),
    "ghcb": Importer(lambda data: GhcbLines(_lines(data)), _ghcb_seeds),
    "ccp": Importer(lambda data: CcpLog(_lines(data)), _ccp_seeds),
    "file": Importer(_whole, _whole_seeds),
}
"""The importers, and `file`: the recognition of formats and compressions in front of them."""
