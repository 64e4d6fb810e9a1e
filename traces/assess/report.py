"""An assessment as a terminal report and as plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sevlab.core.porting import Path

if TYPE_CHECKING:
    from rich.console import Console
    from sevlab.traces.assess.judge import Assessment, Called, Row

MEANING = {
    Path.STAYS: "leaves the guest as before",
    Path.AUTOMATIC: "no exit of this kind any more: the guest does it alone, or a write trap tells",
    Path.NAE: "becomes #VC and a GHCB request",
    Path.CANNOT: "cannot be served",
}


NUMBERS = ("exits", "share", "requests", "extra")
"""Columns of numbers."""


def ordered(result: Assessment) -> list[Row]:
    """The rows by path, the frequent first."""
    return sorted(result.rows.values(), key=lambda row: (list(Path).index(row.path), -row.exits))


def document(result: Assessment) -> dict[str, Any]:
    """The assessment as plain data."""
    return {
        "feature": result.feature,
        "exits": result.exits,
        "vcpus": result.vcpus,
        "paths": {path.value: result.total(path) for path in Path},
        "early": {path.value: result.early[path] for path in Path},
        "rows": [
            {
                "path": row.path.value,
                "kind": row.kind,
                "exits": row.exits,
                "share": round(row.exits / result.exits, 6),
                "instructions": row.instructions,
                "reasons": dict(row.reasons),
                "linux": dict(row.linux),
                "xen": dict(row.xen),
                "executed": {
                    "exits": row.executed.exits,
                    "forms": row.executed.forms,
                    "requests": row.executed.requests,
                    "extra_exits": extra_exits(row),
                    "example": row.executed.example,
                },
            }
            for row in ordered(result)
        ],
        "cannot": [
            {
                "rip": place.rip,
                "insn": place.insn.hex(" "),
                "kind": place.kind,
                "reason": place.reason,
                "exits": place.exits,
                "first_exchange": place.number,
            }
            for place in result.refused.values()
        ],
        "hypercalls": [
            {
                "number": call.number,
                "name": call.name,
                "calls": call.calls,
                "legacy_abi": call.fate(),
                "instead": call.instead(),
                "shared": call.shared(),
                "operations": [one._asdict() for one in call.operations],
            }
            for call in called(result)
        ],
        "shared": result.shared(),
        "page_state": result.page_state(),
        "device_pages": {f"{page << 12:#x}": count for page, count in sorted(result.device_pages.items())},
    }


def called(result: Assessment) -> list[Called]:
    """The hypercalls, the frequent first."""
    return sorted(result.hypercalls.values(), key=lambda call: -call.calls)


def extra_exits(row: Row) -> int:
    """Requests beyond one for each exit: what executing them showed."""
    return row.executed.requests - row.executed.exits


def print_report(result: Assessment, console: Console) -> None:
    """The report for a terminal."""
    from rich.table import Table

    console.print(f"{result.exits:,} exits of {result.vcpus} vCPU, as a guest under {result.feature.upper()}:")
    for path in Path:
        count = result.total(path)
        console.print(f"  {count:>9,}  {count / max(result.exits, 1):>6.1%}  {path.value:<10} {MEANING[path]}")
    table = Table(box=None, pad_edge=False)
    for name in ("path", "exit", "exits", "share", "requests", "extra", "Linux", "Xen"):
        table.add_column(name, justify="right" if name in NUMBERS else "left")
    for row in ordered(result):
        asked = row.executed.exits > 0
        table.add_row(
            row.path.value,
            row.kind,
            f"{row.exits:,}",
            f"{row.exits / result.exits:.1%}",
            f"{row.executed.requests:,}" if asked else "",
            f"{extra_exits(row):+,}" if asked else "",
            "refuses" if row.linux else "serves",
            "refuses" if row.xen else "serves",
        )
    console.print(table)
    for row in ordered(result):
        if row.path is Path.NAE and row.executed.example:
            console.print(
                f"\n{row.kind}: {row.executed.exits:,} exits, {row.executed.forms:,} forms executed. One of them:"
            )
            for line in row.executed.example:
                console.print(f"  {line}")
    strings = next((row for row in result.rows.values() if row.kind == "IOIO string"), None)
    if strings is not None and strings.instructions != strings.exits:
        console.print(f"\nString I/O shrinks: {strings.exits:,} exits are {strings.instructions:,} instructions.")
    if result.refused:
        console.print("\nCannot be served:")
    for place in result.refused.values():
        insn = place.insn.hex(" ") or "-"
        console.print(f"  {place.exits:>5,} x  rip {place.rip:#x}  {insn:<24} {place.kind}: {place.reason}")
    if result.hypercalls:
        console.print("\nHypercalls with the legacy ABI (the log has the number, not which operation it was):")
        table = Table(box=None, pad_edge=False)
        for name in ("calls", "number", "hypercall", "encrypted", "instead", "must be shared besides"):
            table.add_column(name, justify="right" if name in ("calls", "number") else "left")
        for call in called(result):
            words = call.name, call.fate(), ", ".join(call.instead()), ", ".join(call.shared())
            table.add_row(f"{call.calls:,}", str(call.number), *words)
        console.print(table)
    early = ", ".join(f"{result.early[path]:,} {path.value}" for path in Path)
    console.print(f"\nBefore the kernel (firmware and early boot need a #VC handler of their own): {early}.")
    console.print("Must be shared memory:")
    for what in result.shared():
        console.print(f"  - {what}")
    if result.page_state():
        console.print("Page states:")
    for what in result.page_state():
        console.print(f"  - {what}")
