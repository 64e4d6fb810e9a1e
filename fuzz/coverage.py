"""What the corpus of a campaign reaches: the declared surface, and the lines of the handlers' code.

Every input is run again on the campaign's machines, each step counted in the surface; lines come from Python's own
tracing, which is slow and exact, on the modules that atheris would instrument.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from sevlab.core.plugins import PluginSet, load
from sevlab.fuzz.handlers import handler_modules
from sevlab.fuzz.runner import Runner
from sevlab.fuzz.setup import Setup
from sevlab.fuzz.store import Store
from sevlab.fuzz.surface import Row, Surface
from sevlab.fuzz.surface_html import page

FORMAT_VERSION = 1


class Lines:
    """The executable lines of functions in some modules, and which of them ran."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        self._files = {
            file: name for name in modules if (file := getattr(sys.modules.get(name), "__file__", None)) is not None
        }
        self.there: dict[str, set[int]] = {name: _function_lines(file) for file, name in self._files.items()}
        self.ran: dict[str, set[int]] = {name: set() for name in self.there}

    @contextmanager
    def counted(self) -> Iterator[None]:
        """While inside, every line that runs is counted."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, _event: str, _argument: object) -> Callable[..., Any] | None:
        name = self._files.get(frame.f_code.co_filename)
        if name is None:
            return None
        ran = self.ran[name]

        def line(inner: FrameType, event: str, _argument: object) -> Callable[..., Any]:
            if event == "line":
                ran.add(inner.f_lineno)
            return line

        return line

    def rows(self) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        """Module, executable lines, and those that never ran."""
        for name, there in sorted(self.there.items()):
            if there:
                yield name, len(there), tuple(sorted(there - self.ran[name]))


def _function_lines(file: str) -> set[int]:
    """The lines of code inside functions: what runs at import is nobody's behaviour."""
    code = compile(Path(file).read_bytes(), file, "exec")
    return {line for constant in code.co_consts if isinstance(constant, CodeType) for line in _lines(constant)}


def _lines(code: CodeType) -> Iterator[int]:
    if code.co_flags & inspect.CO_NEWLOCALS and code.co_flags & inspect.CO_OPTIMIZED:  # a function, not a class body
        yield from (line for _, _, line in code.co_lines() if line is not None and line != code.co_firstlineno)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _lines(constant)


class Audit:
    """The surface and the code of one campaign."""

    def __init__(self, surface: Surface, steps: frozenset[str], lines: Lines | None) -> None:
        self._surface = surface
        self._lines = lines
        surface.rows = [row for row in surface.rows if row.payload.kind in steps]

    def document(self) -> dict[str, Any]:
        """All of it as plain data."""
        code = [
            {"module": name, "lines": count, "not_run": list(missing)}
            for name, count, missing in (self._lines.rows() if self._lines is not None else ())
        ]
        return {"format": "sevlab-cover", "version": FORMAT_VERSION, "surface": self._surface.document(), "code": code}

    def lines(self) -> Iterator[str]:
        """The summary: sums, a line for each message, a line for each module."""
        for name, (reached, declared) in self._surface.totals().items():
            yield f"{name}: {reached} of {declared} reached"
        for row in self._surface.rows:
            yield _message_line(row)
        for name, count, missing in self._lines.rows() if self._lines is not None else ():
            yield f"  {name:<52} {count - len(missing):>5} of {count} lines"

    def page(self, title: str) -> str:
        """All of it as one page of HTML."""
        return page(self._surface, title).replace("</body>", f"{self._code_table()}</body>")

    def _code_table(self) -> str:
        if self._lines is None:
            return ""
        rows = "".join(
            f"<tr><td><code>{escape(name)}</code></td><td>{count - len(missing)} of {count}</td>"
            f"<td>{', '.join(spans(missing)) or '-'}</td></tr>"
            for name, count, missing in self._lines.rows()
        )
        return (
            "<h2>Code of the handlers</h2>"
            f"<table><tr><th>module</th><th>lines run</th><th>lines that never ran</th></tr>{rows}</table>"
        )


def _message_line(row: Row) -> str:
    values = sum(len(field.classes) for field in row.fields)
    reached = values - sum(len(field.not_reached) for field in row.fields)
    outcomes = len(row.declared) - len(row.not_reached)
    name = f"{row.payload.kind} {row.message.name}"
    return f"  {name:<52} sent {row.sent:>6}, outcomes {outcomes} of {len(row.declared)}, values {reached} of {values}"


def spans(lines: tuple[int, ...]) -> Iterator[str]:
    """Line numbers as ranges."""
    start = previous = None
    for line in (*lines, None):
        if start is not None and (line is None or line != previous + 1):  # type: ignore[operator]
            yield str(start) if start == previous else f"{start}-{previous}"
            start = None
        if start is None:
            start = line
        previous = line


def audit_campaign(store: Store, *, code: bool = True) -> Audit:
    """Run the corpora and the findings of a campaign, and say what they reach."""
    setup = Setup.of(store)
    names = list(store.targets())
    runners: list[Runner] = [setup.runner(name) for name in names]
    together = {plugin: None for runner in runners for plugin in runner.plugins.names}
    plugins: PluginSet = load([*together], given=setup.modules)
    surface = Surface(plugins)
    lines = Lines(handler_modules(plugins)) if code else None
    for name, runner in zip(names, runners, strict=True):
        inputs = [data for _, data in store.inputs(name)]
        inputs += [stored.smallest for stored in store.findings() if stored.target == name]
        for data in inputs:
            steps = runner.codec.decode(data)
            if lines is None:
                runner.run(steps, told=lambda step, outcome: surface.add(step, outcome.records))
                continue
            with lines.counted():
                runner.run(steps, told=lambda step, outcome: surface.add(step, outcome.records))
    return Audit(surface, frozenset(kind for runner in runners for kind in runner.target.steps), lines)
