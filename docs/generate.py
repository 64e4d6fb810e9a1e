"""Write the reference pages from the declarations; `--check` fails when a page is not what they say."""

from __future__ import annotations

import sys
from pathlib import Path

from sevlab.core import paging
from sevlab.core.cpu import VmcbControl
from sevlab.core.events import KERNEL_RECORDS
from sevlab.core.generations import GENERATIONS
from sevlab.core.layout_tools import markdown_table
from sevlab.core.plugins import load
from sevlab.core.vocabulary import Boundary, spec_of

FOLDER = Path(__file__).parent / "reference"
BUILT_IN = ("io", "sme")
MARK = "<!-- made by docs/generate.py from the declarations; do not edit -->\n"


def first_sentence(thing: object) -> str:
    return " ".join((thing.__doc__ or "").strip().split("\n\n")[0].split())


def records(plugins) -> str:
    """Every record kind by boundary."""
    kinds = list(KERNEL_RECORDS)
    for brought in plugins.call("sevlab_records").values():
        kinds += brought
    lines = ["# Records\n", MARK, "A step is applied to a machine; an outcome is what the other side answers.\n"]
    for boundary in Boundary:
        chosen = [kind for kind in kinds if spec_of(kind).boundary is boundary]
        if not chosen:
            continue
        lines += [f"## {boundary.value}\n", "| Kind | | Fields | Meaning |", "| --- | --- | --- | --- |"]
        for kind in chosen:
            spec = spec_of(kind)
            fields = ", ".join(f"`{field.name}` ({field.role.value})" for field in spec.fields)
            what = "step" if spec.is_step else "outcome"
            lines.append(f"| `{spec.kind}` | {what} | {fields} | {first_sentence(kind)} |")
        lines.append("")
    return "\n".join(lines)


def layouts(plugins) -> str:
    """Every layout as a table."""
    lines = ["# Layouts\n", MARK]
    groups = {"core": (VmcbControl,)} | plugins.call("sevlab_layouts")
    for owner, chosen in groups.items():
        for layout in chosen:
            lines += [f"## {layout.__name__} ({owner})\n", f"{first_sentence(layout)} {layout.SIZE} bytes.\n"]
            lines += [markdown_table(layout), ""]
    return "\n".join(lines)


def state_machines(plugins) -> str:
    """Every state machine as diagram and table."""
    lines = ["# State machines\n", MARK, "A dash is a rejection: the architecture's status, and nothing changes.\n"]
    for owner, chosen in plugins.call("sevlab_state_machines").items():
        for machine in chosen:
            lines += [f"## {machine.name} ({owner})\n", f"```mermaid\n{machine.mermaid()}\n```\n"]
            lines += [machine.markdown_table(), "", f"Rejection: `{machine.reject}`\n"]
    return "\n".join(lines)


def tables(_plugins) -> str:
    """Paging modes and generations."""
    lines = ["# Paging and generations\n", MARK, "## Paging modes\n", paging.markdown_table(), "", "## Generations\n"]
    lines.append("Numbers other than Genoa's are UNVERIFIED, as `core/generations.py` says.\n")
    fields = next(iter(GENERATIONS.values()))._fields
    lines += [f"| {' | '.join(fields)} |", f"| {' | '.join('---' for _ in fields)} |"]
    for part in GENERATIONS.values():
        cells = [f"{value:#06x}" if name == "asp_device" else str(value) for name, value in part._asdict().items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


PAGES = {"records.md": records, "layouts.md": layouts, "state-machines.md": state_machines, "tables.md": tables}


def main() -> None:
    plugins = load(BUILT_IN)
    wrong = []
    for name, make in PAGES.items():
        path, text = FOLDER / name, make(plugins).rstrip() + "\n"
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            wrong.append(name)
    if wrong:
        sys.exit(f"docs/reference: {', '.join(wrong)} differ from the declarations; run python docs/generate.py")


if __name__ == "__main__":
    main()
