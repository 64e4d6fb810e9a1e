"""Write the reference pages from the declarations; `--check` fails when a page is not what they say.

One page for the kernel, one for each plugin - records, layouts, state machines, the plugin's own tables - and one for
traces.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from sevlab.core import paging
from sevlab.core.cliapi import resolve
from sevlab.core.cpu import VmcbControl
from sevlab.core.events import KERNEL_RECORDS
from sevlab.core.generations import GENERATIONS
from sevlab.core.layout_tools import markdown_table
from sevlab.core.plugins import GROUP, load
from sevlab.core.vocabulary import Boundary, spec_of
from sevlab.traces import frames
from sevlab.traces.records import TRACE_RECORDS

FOLDER = Path(__file__).parent / "reference"
MARK = "<!-- made by docs/generate.py from the declarations; do not edit -->\n"

TABLES: dict[str, tuple[tuple[str, str], ...]] = {
    "sev": (("Commands", "sevlab.plugins.sev.legacy:markdown_tables"),),
    "sev_es": (
        ("Policy switches", "sevlab.plugins.sev_es.matrix:options_table"),
        ("NAE events", "sevlab.plugins.sev_es.matrix:events_table"),
        ("Each field of each event, and the answer", "sevlab.plugins.sev_es.matrix:markdown_table"),
        ("The MSR protocol", "sevlab.plugins.sev_es.matrix:msr_table"),
        ("Termination reasons", "sevlab.plugins.sev_es.matrix:termination_table"),
        ("Automatic exits and #VC", "sevlab.plugins.sev_es.exits:markdown_table"),
    ),
    "io": (
        ("Which form of an access who can serve", "sevlab.plugins.io.coverage:markdown_table"),
        ("Which event is served how", "sevlab.plugins.io.feasibility:markdown_table"),
        ("Registers of the devices", "sevlab.plugins.io.devices.board:markdown_tables"),
    ),
    "xen": (
        ("Hypercalls", "sevlab.plugins.xen.hypercalls.table:markdown_table"),
        ("Which call survives encryption", "sevlab.plugins.xen.assess:markdown_table"),
    ),
    "seeded": (("The bugs", "sevlab.plugins.seeded:markdown_table"),),
}
"""By plugin: title and `module:function` of each table of its own, made from its data."""


def first_sentence(thing: object) -> str:
    return " ".join((thing.__doc__ or "").strip().split("\n\n")[0].split())


def records(kinds) -> list[str]:
    """Record kinds by boundary."""
    lines = ["## Records\n", "A step is applied to a machine; an outcome is what the other side answers.\n"]
    for boundary in Boundary:
        chosen = [kind for kind in kinds if spec_of(kind).boundary is boundary]
        if not chosen:
            continue
        lines += [f"### {boundary.value}\n", "| Kind | | Fields | Meaning |", "| --- | --- | --- | --- |"]
        for kind in chosen:
            spec = spec_of(kind)
            fields = ", ".join(f"`{field.name}` ({field.role.value})" for field in spec.fields)
            what = "step" if spec.is_step else "outcome"
            lines.append(f"| `{spec.kind}` | {what} | {fields} | {first_sentence(kind)} |")
        lines.append("")
    return lines


def layouts(chosen) -> list[str]:
    """Layouts as tables."""
    lines = ["## Layouts\n"]
    for layout in chosen:
        lines += [f"### {layout.__name__}\n", f"{first_sentence(layout)} {layout.SIZE} bytes.\n"]
        lines += [markdown_table(layout), ""]
    return lines


def state_machines(chosen) -> list[str]:
    """State machines as diagrams and tables."""
    lines = ["## State machines\n", "A dash is a rejection: the architecture's status, and nothing changes.\n"]
    for machine in chosen:
        lines += [f"### {machine.name}\n", f"```mermaid\n{machine.mermaid()}\n```\n"]
        lines += [machine.markdown_table(), "", f"Rejection: `{machine.reject}`\n"]
    return lines


def kernel() -> str:
    """Records, VMCB, paging modes and generations."""
    lines = ["# The kernel\n", MARK, *records(KERNEL_RECORDS), *layouts((VmcbControl,))]
    lines += ["## Paging modes\n", paging.markdown_table(), "", "## Generations\n"]
    lines.append("Numbers other than Genoa's are UNVERIFIED, as `core/generations.py` says.\n")
    fields = next(iter(GENERATIONS.values()))._fields
    lines += [f"| {' | '.join(fields)} |", f"| {' | '.join('---' for _ in fields)} |"]
    for part in GENERATIONS.values():
        cells = [f"{value:#06x}" if name == "asp_device" else str(value) for name, value in part._asdict().items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plugin_page(plugins, plugin) -> str:
    """Everything that one plugin declares."""
    name = plugin.name
    lines = [f"# {name}\n", MARK, f"{plugin.summary}\n"]
    for hook, make in (
        ("sevlab_records", records),
        ("sevlab_layouts", layouts),
        ("sevlab_state_machines", state_machines),
    ):
        declared = plugins.call_one(name, hook)
        if declared:
            lines += make(declared)
    for title, target in TABLES.get(name, ()):
        lines += [f"## {title}\n", resolve(target)(), ""]
    return "\n".join(lines)


def trace_page() -> str:
    """The frames of a `.sevtrace` file, and the records that only traces hold."""
    lines = ["# Traces\n", MARK, "What the format is for and how it is used: [.sevtrace](../sevtrace.md).\n"]
    lines += ["## Head of a frame\n", frames.markdown_table(), "", *records(TRACE_RECORDS)]
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """Every page by file name."""
    own = [entry.name for entry in metadata.distribution("sevlab").entry_points if entry.group == GROUP]
    plugins = load(own)
    made = {"kernel.md": kernel(), "traces.md": trace_page()}
    made |= {f"{plugin.name}.md": plugin_page(plugins, plugin) for plugin in plugins.plugins}
    return {name: text.rstrip() + "\n" for name, text in made.items()}


def main() -> None:
    wrong = []
    for name, text in pages().items():
        path = FOLDER / name
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            wrong.append(name)
    if wrong:
        sys.exit(f"docs/reference: {', '.join(wrong)} differ from the declarations; run python docs/generate.py")


if __name__ == "__main__":
    main()
