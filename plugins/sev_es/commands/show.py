"""`sevlab show ghcb|ghcb-msr|vmsa|exitinfo`: decode bytes or a value, and name every rule that is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from sevlab.core.cliapi import read_input
from sevlab.core.errors import ConfigError, FormatError
from sevlab.core.exitinfo import EventWord, IoioInfo
from sevlab.core.layout import FieldInfo, Kind, Layout
from sevlab.core.layout_tools import read_field, reserved_ranges, validate
from sevlab.core.svm import ExitCode, NpfError, exit_name
from sevlab.plugins.sev_es.ghcb import VALID_BITS, Ghcb, Reason
from sevlab.plugins.sev_es.hypervisor import ALWAYS
from sevlab.plugins.sev_es.matrix import ALL, event_name
from sevlab.plugins.sev_es.msr_layout import INFO_MASK, LAYOUTS, TERMINATION_REASONS, MsrInfo, TerminateRequest
from sevlab.plugins.sev_es.vmsa import SevFeatures, Vmsa, segment_of

FILE = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="print JSON")
SHOWN_DIGITS = 64
SEGMENT_BYTES, SEGMENT_PARTS = 16, ("selector", "attributes", "limit", "base")
CLEAR = "its valid bit is clear"


def read_page(path: Path, layout: type[Layout]) -> bytes:
    """The page in a file: raw, or as hexadecimal text. Raises `FormatError` when there is less or more."""
    data = read_input(path)
    if len(data) != layout.SIZE:
        text = "".join(data.decode("ascii", "replace").split())
        try:
            decoded = bytes.fromhex(text)
        except ValueError:
            decoded = data
        data = decoded if len(decoded) == layout.SIZE else data
    if len(data) != layout.SIZE:
        expected = f"{layout.SIZE} bytes of {layout.__name__}, raw or hexadecimal"
        raise FormatError(str(path), min(len(data), layout.SIZE), "end", expected=expected, found=f"{len(data)} bytes")
    return data


def read_number(text: str) -> int:
    """A 64-bit number, decimal or with 0x. Raises `ConfigError` that shows the text."""
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 64:
        raise ConfigError(f"{text!r}: expected a number from 0 to 2^64-1, decimal or with 0x")
    return value


def rows_of(layout: type[Layout], data: bytes, *, everything: bool) -> list[dict[str, Any]]:
    """A row for each field that holds something, or for every one."""
    item = layout.from_bytes(data)
    rows = []
    for name, info in layout.FIELDS.items():
        value = read_field(info, data)
        valid = item.is_valid(name) if info.valid_bit else None
        filled = any(value) if isinstance(value, (bytes, tuple)) else bool(value)
        if everything or filled or valid:
            rows.append(
                {
                    "field": name,
                    "offset": info.offset,
                    "value": _plain(value) if name != "valid_bitmap" else value.hex(),
                    "valid": valid,
                    "doc": info.doc,
                }
                | _bits(info)
            )
    return rows


def _bits(info: FieldInfo) -> dict[str, Any]:
    return {"bits": [info.high_bit, info.low_bit]} if info.kind is Kind.BITS else {}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes) and len(value) == SEGMENT_BYTES:
        return dict(zip(SEGMENT_PARTS, segment_of(value), strict=True))
    return value.hex() if isinstance(value, bytes) else list(value) if isinstance(value, tuple) else value


def broken_rules(layout: type[Layout], data: bytes) -> list[dict[str, Any]]:
    """Every rule of the layout that the bytes break, non-zero reserved ranges included."""
    found: list[dict[str, Any]] = [
        {"field": problem.field, "offset": problem.offset, "found": problem.found, "expected": problem.expected}
        for problem in validate(layout, data)
    ]
    for offset, length in reserved_ranges(layout):
        piece = data[offset : offset + length]
        if any(piece):
            where = offset + next(index for index, byte in enumerate(piece) if byte)
            found.append({"field": "reserved", "offset": where, "found": data[where], "expected": "zero"})
    return found


def show(
    title: str,
    layout: type[Layout],
    data: bytes,
    *,
    as_json: bool,
    more: list[dict[str, Any]] | None = None,
    notes: dict[str, Any] | None = None,
    everything: bool = False,
) -> None:
    """Print fields, notes and broken rules; exit code 1 when a rule is broken."""
    rows = rows_of(layout, data, everything=everything)
    broken = [*broken_rules(layout, data), *(more or [])]
    if as_json:
        click.echo(json.dumps({"kind": title, **(notes or {}), "fields": rows, "broken": broken}, indent=1))
    else:
        click.echo(title)
        for name, note in (notes or {}).items():
            click.echo(f"  {name}: {note}")
        for row in rows:
            mark = {None: " ", True: "v", False: "-"}[row["valid"]]
            place = f"{row['offset']:#05x}" + (f"[{row['bits'][0]}:{row['bits'][1]}]" if "bits" in row else "")
            click.echo(f"  {mark} {place:<13} {row['field']:<26} {_shown(row['value'])}")
        for problem in broken:
            found = problem["found"]
            shown = f"{found:#x}" if isinstance(found, int) else found
            click.echo(
                f"  broken: {problem['field']} at {problem['offset']:#05x}: {shown}, expected {problem['expected']}"
            )
    if broken:
        raise SystemExit(1)


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:#x}"
    if isinstance(value, dict):
        return ", ".join(f"{part} {number:#x}" for part, number in value.items())
    text = str(value)
    return (
        text if len(text) <= 64 else f"{text[:64]}... ({len(text) // 2} bytes)" if isinstance(value, str) else text[:80]
    )


@click.command()
@click.argument("file", type=FILE)
@click.option("--all", "everything", is_flag=True, help="show empty fields too")
@JSON
def ghcb(file: Path, *, everything: bool, as_json: bool) -> None:
    """Decode a GHCB page (raw or hexadecimal): each field, its valid bit (v, or - where it holds something stale)."""
    data = read_page(file, Ghcb)
    item = Ghcb.from_bytes(data)
    valid = int.from_bytes(item.valid_bitmap, "little")
    more = [_problem(name, CLEAR, "valid in every request") for name in ALWAYS if not item.is_valid(name)]
    unnamed = valid & ~sum(VALID_BITS.values())
    if unnamed:
        more.append(
            {"field": "valid_bitmap", "offset": 0x3F0, "found": unnamed, "expected": "only bits of named fields"}
        )
    notes: dict[str, Any] = {}
    if item.is_valid("sw_exit_code"):
        code = item.sw_exit_code
        event = ALL.get(code)
        notes["event"] = f"{event_name(code)} ({code:#x})"
        if event is not None:
            more += [
                _problem(name, CLEAR, f"an input of {event.name}") for name in event.required if not item.is_valid(name)
            ]
        if code == ExitCode.IOIO:
            notes["ioio"] = ioio_words(item.value_or_zero("sw_exit_info_1"))
    elif item.is_valid("sw_exit_info_1"):
        notes["reply"] = reply_words(item.sw_exit_info_1, item.value_or_zero("sw_exit_info_2"))
        more = []
    show("GHCB", Ghcb, data, as_json=as_json, more=more, notes=notes, everything=everything)


def _problem(name: str, found: str, expected: str) -> dict[str, Any]:
    return {"field": name, "offset": Ghcb.FIELDS[name].offset, "found": found, "expected": expected}


def reply_words(info_1: int, info_2: int) -> str:
    """What the two infos of a reply say."""
    result = info_1 & 0xFFFF_FFFF
    if result == 0:
        return "done"
    if result == 1:
        return f"exception, vector {info_2 & 0xFF}" + (f", error code {info_2 >> 32:#x}" if info_2 >> 11 & 1 else "")
    names = {reason.value: reason.name.lower().replace("_", " ") for reason in Reason}
    return (
        f"refused: {names.get(info_2, 'unknown reason')} ({info_2:#x})"
        if result == 2
        else f"unknown result {result:#x}"
    )


def ioio_words(info: int) -> str:
    """What EXITINFO1 of an IOIO says."""
    item = IoioInfo.from_bytes(info.to_bytes(8, "little"))
    what = ("INS" if item.direction else "OUTS") if item.string else ("IN" if item.direction else "OUT")
    return f"{'REP ' if item.rep else ''}{what} port {item.port:#x}, {item.size} byte(s)"


@click.command("ghcb-msr")
@click.argument("value")
@JSON
def ghcb_msr(value: str, *, as_json: bool) -> None:
    """Decode a value of the GHCB MSR (C0010130h)."""
    number = read_number(value)
    layout = LAYOUTS.get(number & INFO_MASK)
    if layout is None:
        raise ConfigError(f"{value}: info {number & INFO_MASK:#05x} is no request or response of the MSR protocol")
    info = MsrInfo(number & INFO_MASK)
    notes: dict[str, Any] = {"info": info.name.lower().replace("_", " ")}
    if layout is TerminateRequest:
        reason = (number >> 12 & 0xF, number >> 16 & 0xFF)
        meanings = [
            f"{row.meaning} ({row.sender})" for row in TERMINATION_REASONS if (row.reason_set, row.code) == reason
        ]
        notes["reason"] = " or ".join(meanings) or "not known"
    show(f"GHCB MSR {number:#x}", layout, number.to_bytes(8, "little"), as_json=as_json, notes=notes)


@click.command()
@click.argument("file", type=FILE)
@click.option("--all", "everything", is_flag=True, help="show empty fields too")
@JSON
def vmsa(file: Path, *, everything: bool, as_json: bool) -> None:
    """Decode a VMSA page in plaintext (raw or hexadecimal)."""
    data = read_page(file, Vmsa)
    features = data[Vmsa.FIELDS["sev_features"].offset :][:8]
    on = [name for name, info in SevFeatures.FIELDS.items() if read_field(info, features)]
    more = [
        {"field": "sev_features", "offset": 0x3B0, "found": problem["found"], "expected": problem["expected"]}
        for problem in _unnamed_bits(SevFeatures, features)
    ]
    show(
        "VMSA",
        Vmsa,
        data,
        as_json=as_json,
        more=more,
        notes={"features": ", ".join(on) or "none"},
        everything=everything,
    )


def _unnamed_bits(layout: type[Layout], data: bytes) -> list[dict[str, Any]]:
    named = 0
    for info in layout.FIELDS.values():
        named |= info.mask << info.offset * 8
    left = int.from_bytes(data, "little") & ~named
    return [{"field": "reserved", "offset": 0, "found": left, "expected": "zero"}] if left else []


@click.command()
@click.argument("code")
@click.argument("value")
@JSON
def exitinfo(code: str, value: str, *, as_json: bool) -> None:
    """Decode EXITINFO1 VALUE of exit CODE (a number or a name such as IOIO); "event" for EVENTINJ words."""
    number = read_number(value)
    if code == "event":
        show("event", EventWord, number.to_bytes(8, "little"), as_json=as_json)
        return
    names = {member.name: member.value for member in ExitCode}
    exit_code = names[code.upper()] if code.upper() in names else read_number(code)
    if exit_code == ExitCode.IOIO:
        data = number.to_bytes(8, "little")
        show(
            exit_name(exit_code),
            IoioInfo,
            data,
            as_json=as_json,
            notes={"meaning": ioio_words(number)},
            more=_unnamed_bits(IoioInfo, data),
        )
        return
    meaning = exit_words(exit_code, number)
    if as_json:
        click.echo(json.dumps({"kind": event_name(exit_code), "value": number, "meaning": meaning}))
    else:
        click.echo(f"{event_name(exit_code)}\n  meaning: {meaning}")


def exit_words(exit_code: int, info: int) -> str:
    """EXITINFO1 of the other exits in words."""
    if exit_code == ExitCode.NPF:
        bits = [bit.name or "" for bit in NpfError if info & bit]
        return "nested page fault: " + (", ".join(bits) or "read of a page that is not present")
    if exit_code == ExitCode.MSR:
        return "WRMSR" if info & 1 else "RDMSR"
    if exit_code < ExitCode.DR0_READ:
        return f"MOV, general register {info & 0xF}" if info >> 63 else "not a MOV (LMSW, SMSW or CLTS)"
    if exit_code < ExitCode.EXCEPTION_0:
        return f"general register {info & 0xF}"
    if exit_code == ExitCode.SWINT:
        return f"INT {info & 0xFF:#x}"
    if exit_code == ExitCode.EXCEPTION_0 + 14:
        return f"page fault error code {info:#x}"
    return f"{info:#x}"
