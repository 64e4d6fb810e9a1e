"""The surface as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from collections import Counter
from html import escape

from sevlab.fuzz.surface import CLASSES, Field, Row, Surface

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: .6em 0 1.2em; }
th, td { border: 1px solid #ccc; padding: .15em .5em; text-align: left; font-size: 13px; vertical-align: top; }
th { background: #f2f2f2; } code { font-size: 12.5px; }
.yes { background: #d8f0d8; } .no { background: #f6dcdc; } .none { color: #999; }
summary { cursor: pointer; padding: .15em 0; } .bar { color: #666; font-size: 13px; }
@media (prefers-color-scheme: dark) {
  body { background: #1b1b1b; color: #ddd; } th { background: #2a2a2a; } th, td { border-color: #444; }
  .yes { background: #1f4a26; } .no { background: #5a2626; }
}
"""


def page(surface: Surface, title: str = "Surface audit") -> str:
    """The whole page."""
    totals = surface.totals()
    words = {
        "messages": "messages sent",
        "outcomes": "declared outcomes reached",
        "values": "classes of values reached",
    }
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        "<ul>",
        *(f"<li>{words[name]}: {reached} of {declared}</li>" for name, (reached, declared) in totals.items()),
        "</ul>",
        f"<p>Values of a field: {'; '.join(f'<b>{name}</b>, {escape(what)}' for name, what in CLASSES.items())}.</p>",
    ]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in surface.rows:
        groups.setdefault((row.payload.kind, row.payload.field), []).append(row)
    for (kind, field), rows in groups.items():
        sent = sum(bool(row.sent) for row in rows)
        parts.append(f"<h2>{escape(kind)}, {escape(field)} <span class=bar>{sent} of {len(rows)} messages</span></h2>")
        parts += [_row(row) for row in rows]
    if surface.undeclared:
        parts += ["<h2>Messages that nobody declares</h2>", _counts(surface.undeclared)]
    return "\n".join([*parts, "</body></html>", ""])


def _row(row: Row) -> str:
    """One message: a line to open, behind it the matrix of fields by outcomes."""
    values = sum(len(field.classes) for field in row.fields)
    reached = values - sum(len(field.not_reached) for field in row.fields)
    head = (
        f'<summary class="{"yes" if row.sent else "no"}"><b>{escape(row.message.name)}</b>'
        f" <code>{row.message.number:#x}</code> <span class=bar>sent {row.sent},"
        f" outcomes {len(row.declared) - len(row.not_reached)} of {len(row.declared)},"
        f" values {reached} of {values}</span></summary>"
    )
    outcomes = [*row.outcomes, *row.not_reached]
    columns = "".join(
        f'<th class="{"yes" if name in row.outcomes else "no"}">{escape(name)} {row.outcomes[name] or "never"}</th>'
        for name in outcomes
    )
    lines = [_field(field, outcomes) for field in row.fields]
    table = f"<table><tr><th>field</th>{columns}<th>not reached</th></tr>{''.join(lines)}</table>"
    return f"<details>{head}{table}</details>"


def _field(field: Field, outcomes: list[str]) -> str:
    cells = []
    for outcome in outcomes:
        found = [f"{name} {counts[outcome]}" for name, counts in field.reached.items() if counts[outcome]]
        cells.append(f"<td class=yes>{', '.join(found)}</td>" if found else "<td class=none>-</td>")
    missing = ", ".join(field.not_reached)
    kind = "no" if missing else "yes"
    name = f"<td><code>{escape(field.name)}</code></td>"
    return f'<tr>{name}{"".join(cells)}<td class="{kind}">{missing or "-"}</td></tr>'


def _counts(counts: Counter[str]) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{count}</td></tr>" for name, count in counts.most_common())
    return f"<table><tr><th>outcome</th><th>how often</th></tr>{rows}</table>"
