"""An assessment as one HTML page that needs nothing else: charts by plotly, with its script inside."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from sevlab.core.errors import ConfigError
from sevlab.core.porting import Path
from sevlab.traces.assess.judge import BUCKETS
from sevlab.traces.assess.report import MEANING, called, extra_exits, ordered

if TYPE_CHECKING:
    from sevlab.traces.assess.judge import Assessment

COLOURS = {Path.STAYS: "#4c78a8", Path.AUTOMATIC: "#72b7b2", Path.NAE: "#f2a541", Path.CANNOT: "#d1495b"}
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;width:100%}td,th{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:left}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}code,pre{font:13px/1.4 ui-monospace,monospace}
pre{background:#f6f6f6;padding:.6rem;overflow:auto}.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%}
h1{font-size:1.6rem}h2{margin-top:2rem}"""


def html_page(result: Assessment, title: str) -> str:
    """The page. Raises `ConfigError` when plotly is not installed."""
    try:
        from plotly import graph_objects, offline
    except ImportError as error:
        raise ConfigError("the HTML report needs plotly: pip install 'sevlab[report]'") from error
    figures = [_timeline(graph_objects, result), _kinds(graph_objects, result)]
    charts = [offline.plot(figure, output_type="div", include_plotlyjs=False) for figure in figures]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f"<script>{offline.get_plotlyjs()}</script></head><body>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{result.exits:,} exits of {result.vcpus} vCPU, as a guest under {escape(result.feature.upper())}.</p>",
        _paths(result),
        "<h2>Over time</h2>",
        charts[0],
        "<h2>By exit</h2>",
        charts[1],
        _rows(result),
        _refused(result),
        _hypercalls(result),
        "<h2>Must be shared memory</h2><ul>",
        *(f"<li>{escape(what)}</li>" for what in result.shared()),
        *(("</ul><h2>Page states</h2><ul>",) if result.page_state() else ()),
        *(f"<li>{escape(what)}</li>" for what in result.page_state()),
        "</ul><h2>Exchanges, executed</h2>",
        *_examples(result),
        "</body></html>",
    ]
    return "\n".join(parts)


def _dot(path: Path) -> str:
    return f"<span class='dot' style='background:{COLOURS[path]}'></span>"


def _paths(result: Assessment) -> str:
    rows = "".join(
        f"<tr><td>{_dot(path)} {path.value}</td><td class='n'>{result.total(path):,}</td>"
        f"<td class='n'>{result.total(path) / max(result.exits, 1):.1%}</td><td>{MEANING[path]}</td>"
        f"<td class='n'>{result.early[path]:,}</td></tr>"
        for path in Path
    )
    names = ("path", "exits", "share", "", "before the kernel")
    cells = "".join(f"<th{' class=n' if n in (1, 2, 4) else ''}>{name}</th>" for n, name in enumerate(names))
    head = f"<tr>{cells}</tr>"
    return f"<table>{head}{rows}</table>"


def _rows(result: Assessment) -> str:
    names = ("", "exit", "exits", "share", "requests", "extra exits", "Linux #VC handler", "Xen's emulator", "remark")
    head = "".join(f"<th{' class=n' if 2 <= n <= 5 else ''}>{name}</th>" for n, name in enumerate(names))
    body = []
    for row in ordered(result):
        asked = row.executed.exits > 0
        remark = "; ".join(f"{escape(reason)} ({count:,})" for reason, count in row.reasons.most_common(3))
        body.append(
            f"<tr><td>{_dot(row.path)}</td><td>{escape(row.kind)}</td><td class='n'>{row.exits:,}</td>"
            f"<td class='n'>{row.exits / result.exits:.2%}</td>"
            f"<td class='n'>{f'{row.executed.requests:,}' if asked else ''}</td>"
            f"<td class='n'>{f'{extra_exits(row):+,}' if asked else ''}</td>"
            f"<td>{'refuses' if row.linux else 'serves'}</td><td>{'refuses' if row.xen else 'serves'}</td>"
            f"<td>{remark}</td></tr>"
        )
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _refused(result: Assessment) -> str:
    if not result.refused:
        return "<h2>Cannot be served</h2><p>Nothing.</p>"
    rows = "".join(
        f"<tr><td class='n'>{place.exits:,}</td><td><code>{place.rip:#x}</code></td>"
        f"<td><code>{place.insn.hex(' ') or '-'}</code></td><td>{escape(place.kind)}</td>"
        f"<td>{escape(place.reason)}</td></tr>"
        for place in result.refused.values()
    )
    head = "<tr><th class='n'>exits</th><th>rip</th><th>instruction</th><th>kind</th><th>why</th></tr>"
    return f"<h2>Cannot be served</h2><table>{head}{rows}</table>"


def _hypercalls(result: Assessment) -> str:
    if not result.hypercalls:
        return ""
    rows = "".join(
        f"<tr><td class='n'>{call.calls:,}</td><td class='n'>{call.number}</td><td>{escape(call.name)}</td>"
        f"<td>{escape(call.fate())}</td><td>{escape(', '.join(call.instead()))}</td>"
        f"<td>{escape(', '.join(call.shared()))}</td></tr>"
        for call in called(result)
    )
    head = "<tr><th class='n'>calls</th><th class='n'>number</th><th>hypercall</th><th>encrypted</th><th>instead</th>"
    head += "<th>must be shared besides</th></tr>"
    return f"<h2>Hypercalls with the legacy ABI</h2><table>{head}{rows}</table>"


def _examples(result: Assessment) -> list[str]:
    return [
        f"<h3>{escape(row.kind)}</h3><pre>{escape(chr(10).join(row.executed.example))}</pre>"
        for row in ordered(result)
        if row.executed.example
    ]


def _timeline(objects: Any, result: Assessment) -> Any:
    """Exits a slice of time, by path."""
    timeline = result.timeline
    seconds = [round(n * timeline.width_ns / 1e9, 4) for n in range(BUCKETS)]
    figure = objects.Figure()
    for path in Path:
        figure.add_bar(x=seconds, y=timeline.counts[path], name=path.value, marker_color=COLOURS[path])
    figure.update_layout(
        barmode="stack", bargap=0, height=360, margin={"t": 20}, xaxis_title="seconds", yaxis_title="exits"
    )
    return figure


def _kinds(objects: Any, result: Assessment) -> Any:
    """Exits by kind."""
    rows = ordered(result)[::-1]
    figure = objects.Figure()
    figure.add_bar(
        x=[row.exits for row in rows],
        y=[f"{row.kind} ({row.path.value})" for row in rows],
        orientation="h",
        marker_color=[COLOURS[row.path] for row in rows],
    )
    figure.update_layout(height=120 + 22 * len(rows), margin={"t": 10, "l": 200}, xaxis_type="log", xaxis_title="exits")
    return figure
