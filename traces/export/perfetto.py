"""Perfetto: a timeline of who was busy with what, for ui.perfetto.dev.

A track for each vCPU, one for the hypervisor (steps that no vCPU takes) and one for the ASP. Each entry is a slice from
the exit to the next entry, with the fields of its step and its outcome as arguments. A capture says how long that
took, in a field `after_ns` of the outcome; in our own recordings no time passes, so there a slice is drawn one
microsecond long and the next begins where it ends.

The messages are few and flat, so they are written here without a protobuf library.

Source: Perfetto protos/perfetto/trace/trace_packet.proto, track_event/track_event.proto, track_descriptor.proto,
debug_annotation.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sevlab.core.vocabulary import Boundary, Record, spec_of
from sevlab.traces.compare import one_line, show
from sevlab.traces.reader import TraceReader
from sevlab.traces.schema import NO_VCPU, Entry
from sevlab.traces.text import title

SEQUENCE = 1
DRAWN_NS = 1000
"""Length of a slice of which nobody knows how long it took."""

PROCESS, HYPERVISOR, ASP, FIRST_VCPU = 1, 2, 3, 16
"""Track uuids."""

SLICE_BEGIN, SLICE_END = 1, 2


def export(reader: TraceReader, path: Path) -> int:
    """Write the timeline of `reader` to `path`; returns the number of slices."""
    count = 0
    free: dict[int, int] = {}  # track: when its last slice ended
    with path.open("wb") as file:
        file.write(_track(PROCESS, None, reader.header.source.file or "sevlab", process=True))
        for number, entry in reader.numbered():
            track = track_of(entry)
            if track not in free:
                file.write(_track(track, PROCESS, _track_name(track)))
            begin = max(entry.time_ns, free.get(track, 0))
            lasted = next((after for record in entry.outcome if (after := getattr(record, "after_ns", None))), None)
            end = begin + DRAWN_NS if lasted is None else max(begin, entry.time_ns + lasted)
            free[track] = end
            arguments = b"".join(_arguments(number, entry))
            file.write(_event(begin, track, SLICE_BEGIN, _text(23, title(entry.step)) + arguments))
            file.write(_event(end, track, SLICE_END, b""))
            count += 1
    return count


def track_of(entry: Entry) -> int:
    """The uuid of the track that an entry belongs to."""
    if entry.vcpu != NO_VCPU:
        return FIRST_VCPU + entry.vcpu
    return ASP if spec_of(entry.step).boundary is Boundary.ASP else HYPERVISOR


def _track_name(track: int) -> str:
    return {HYPERVISOR: "hypervisor", ASP: "ASP"}.get(track, f"vCPU {track - FIRST_VCPU}")


def _arguments(number: int, entry: Entry) -> Iterator[bytes]:
    yield _annotation("entry", number)
    spec = spec_of(entry.step)
    for field, value in zip(spec.fields, entry.step, strict=True):
        yield _annotation(field.name, value)
    for position, record in enumerate(entry.outcome):
        yield _annotation(f"outcome[{position}]", _line(record))


def _line(record: Record) -> str:
    line = one_line(record)
    return line if len(line) <= 400 else f"{line[:400]}..."


# Protobuf ---------------------------------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())


def _packet(content: bytes) -> bytes:
    return _bytes(1, content + _number(10, SEQUENCE))


def _event(time_ns: int, track: int, kind: int, content: bytes) -> bytes:
    event = _number(9, kind) + _number(11, track) + content
    return _packet(_number(8, time_ns) + _bytes(11, event))


def _track(uuid: int, parent: int | None, name: str, *, process: bool = False) -> bytes:
    content = _number(1, uuid) + _text(2, name)
    if parent is not None:
        content += _number(5, parent)
    if process:
        content += _bytes(3, _number(1, 1) + _text(6, name))
    return _packet(_bytes(60, content))


def _annotation(name: str, value: Any) -> bytes:
    if isinstance(value, bool):
        content = _number(2, value)
    elif isinstance(value, int) and value >= 0:
        content = _number(7 if value > 0xFFFF else 3, value)  # a pointer is shown in hexadecimal
    else:
        content = _text(6, value if isinstance(value, str) else show(value))
    return _bytes(4, _text(10, name) + content)
