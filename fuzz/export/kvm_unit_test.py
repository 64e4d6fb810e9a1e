"""The VMGEXITs of a finding as a C file for kvm-unit-tests.

The same file compiles on its own: then it writes the bytes of each GHCB page, which are those of the model.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from sevlab.core.layout import FieldInfo, Kind
from sevlab.core.units import MASK64, PAGE_BYTES, PAGE_MASK
from sevlab.core.vocabulary import spec_of
from sevlab.fuzz.export.case import Case
from sevlab.fuzz.export.pieces import parts
from sevlab.plugins.sev_es import Ghcb, Vmgexit
from sevlab.traces.records import TRACE_RECORDS, State
from sevlab.traces.schema import Entry

HELPER = Path(__file__).with_name("vmgexit.c")
MAIN = Path(__file__).with_name("vmgexit_main.c")
BYTES_A_LINE = 12


def text(case: Case) -> str:
    """The file."""
    shown = [(number, step) for number, entry in enumerate(case.entries) if (step := _vmgexit(entry)) is not None]
    gpa = _ghcb_gpa([step for _, step in shown])
    lines = [*_comment([*case.about(), "", *_left_out(case)]), "", HELPER.read_text().rstrip(), ""]
    lines += [*_comment(["Where the model's guest has its GHCB; a real guest has it elsewhere."])]
    lines += [f"#define MODEL_GHCB_GPA {_number(gpa)}", ""]
    rows = []
    for number, step in shown:
        lines += _step(number, step, gpa)
        fill = "NULL" if step.ghcb_msr & PAGE_MASK else f"fill_{number}"
        rows.append(f'\t{{ "step {number}: {case.title(case.entries[number])}", msr_{number}, {fill} }},')
    if not rows:
        rows = ["\t{ NULL, NULL, NULL },"]
    lines += [
        "static const struct {",
        "\tconst char *name;",
        "\tuint64_t (*msr)(uint64_t ghcb_gpa);",
        "\tvoid (*fill)(uint8_t *page, uint64_t ghcb_gpa); /* NULL: the MSR protocol */",
        "} steps[] = {",
        *rows,
        "};",
        "",
        f"static const size_t STEPS = {len(shown)};",
        "",
        MAIN.read_text().rstrip(),
        "",
    ]
    return "\n".join(lines)


def _vmgexit(entry: Entry) -> Vmgexit | None:
    step = entry.step
    return step if isinstance(step, Vmgexit) and len(step.page) <= PAGE_BYTES else None


def _left_out(case: Case) -> list[str]:
    """What a guest alone cannot do, said step by step."""
    lines = []
    steps = [step for entry in case.entries if (step := _vmgexit(entry)) is not None]
    vcpus = {step.vcpu for step in steps}
    if len(vcpus) > 1:
        lines.append(f"The steps are of vCPUs {', '.join(map(str, sorted(vcpus)))}; here one vCPU takes them all.")
    lines += [
        f"Not here, since no VMGEXIT: step {number}, {case.title(entry)} ({spec_of(entry.step).boundary.value})."
        for number, entry in enumerate(case.entries)
        if _vmgexit(entry) is None and type(entry.step) not in TRACE_RECORDS
    ]
    if any(isinstance(entry.step, State) for entry in case.entries):
        lines.append("Not here: the state that the trace sets; a real guest has been launched by its host.")
    elsewhere = {step.ghcb_msr for step in steps if not step.ghcb_msr & PAGE_MASK} - {_ghcb_gpa(steps)}
    if elsewhere:
        shown = ", ".join(f"{gpa:#x}" for gpa in sorted(elsewhere))
        lines.append(f"Requests in other pages than the firmware's GHCB: map {shown} shared first.")
    lines.append("Addresses inside the GHCB move with it; other guest-physical addresses are as in the model.")
    return lines


def _ghcb_gpa(steps: list[Vmgexit]) -> int:
    """The GHCB that most pages are in."""
    found = Counter(step.ghcb_msr for step in steps if not step.ghcb_msr & PAGE_MASK)
    return found.most_common(1)[0][0] if found else 0


def _step(number: int, step: Vmgexit, ghcb_gpa: int) -> list[str]:
    """The functions that give one step's MSR and page."""
    value = _address(step.ghcb_msr, ghcb_gpa) if not step.ghcb_msr & PAGE_MASK else _number(step.ghcb_msr)
    lines = [
        f"static uint64_t msr_{number}(uint64_t ghcb_gpa)",
        "{",
        "\t(void)ghcb_gpa;",
        f"\treturn {value};",
        "}",
        "",
    ]
    if step.ghcb_msr & PAGE_MASK:
        return lines
    fields, pieces = parts(Ghcb, step.page.ljust(PAGE_BYTES, b"\0"))
    lines += [f"static void fill_{number}(uint8_t *page, uint64_t ghcb_gpa)", "{", "\t(void)page, (void)ghcb_gpa;"]
    for name, field in fields.items():
        lines += _field(Ghcb.FIELDS[name], field, ghcb_gpa)
    for piece in pieces:
        where = f" /* in {piece.field} */" if piece.field else ""
        lines += _raw(piece.offset, piece.data, where)
    return [*lines, "}", ""]


def _field(info: FieldInfo, value: object, ghcb_gpa: int) -> list[str]:
    if info.kind is not Kind.UINT or not isinstance(value, int):
        return _raw(info.offset, bytes(value) if isinstance(value, bytes) else b"", f" /* {info.name} */")
    store = "ghcb_set" if info.valid_bit else "ghcb_put"
    shown = _address(value, ghcb_gpa) if info.name == "sw_scratch" else _number(value)
    return [f"\t{store}(page, {info.offset:#x}, {info.width_bytes}, {shown}); /* {info.name} */"]


def _raw(offset: int, data: bytes, note: str) -> list[str]:
    rows = [data[start : start + BYTES_A_LINE] for start in range(0, len(data), BYTES_A_LINE)]
    shown = [f"\t\t\t{', '.join(f'{byte:#04x}' for byte in row)}," for row in rows]
    return [
        "\t{",
        f"\t\tstatic const uint8_t bytes[] = {{{note}",
        *shown,
        "\t\t};",
        f"\t\tghcb_raw(page, {offset:#x}, bytes, sizeof(bytes));",
        "\t}",
    ]


def _address(value: int, ghcb_gpa: int) -> str:
    """An address; one that lies in the GHCB by its place there."""
    if ghcb_gpa and ghcb_gpa <= value < ghcb_gpa + PAGE_BYTES:
        return f"ghcb_gpa + {value - ghcb_gpa:#x}" if value != ghcb_gpa else "ghcb_gpa"
    return _number(value)


def _number(value: int) -> str:
    return f"{value & MASK64:#x}ull"


def _comment(lines: list[str]) -> list[str]:
    """A C comment: nothing in it can end it."""
    safe = [line.replace("*/", "* /").replace("/*", "/ *").replace("\\", "/") for line in lines]
    if len(safe) == 1:
        return [f"/* {safe[0]} */"]
    return ["/*", *(f" * {line}".rstrip() for line in safe), " */"]
