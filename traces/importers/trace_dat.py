"""trace.dat files, through `trace-cmd report -N`: the kernel's own layouts, none of the tool's plugins.

Source: trace-cmd.dat(5) for the magic number, trace-cmd-report(1).
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sevlab.core.errors import TraceFormatError
from sevlab.traces.importers.source import Source

MAGIC = b"\x17\x08\x44tracing"
HINT = "install trace-cmd (Debian: apt install trace-cmd), or turn it into text elsewhere: trace-cmd report -N -i FILE"


def tool() -> str:
    """Path of trace-cmd. Raises `ImportError` when it is not installed: `doctor` asks, too."""
    found = shutil.which("trace-cmd")
    if found is None:
        raise ImportError("trace-cmd is not installed")
    return found


def lines(source: Source) -> Iterator[str]:
    """The text of a trace.dat. Raises `TraceFormatError` without the tool, or with what the tool complains of."""
    try:
        command = tool()
    except ImportError as error:
        raise TraceFormatError(f"{source.path}: a trace.dat needs trace-cmd: {HINT}") from error
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "trace.dat")
        with plain.open("wb") as file:
            shutil.copyfileobj(source.stream, file)
        with subprocess.Popen(  # noqa: S603  # a tool of the system on a file of ours
            [command, "report", "-N", "-i", str(plain)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            yield from process.stdout
            complaint = process.stderr.read()
        if process.returncode:
            raise TraceFormatError(f"{source.path}: trace-cmd: {complaint.strip()[:300]}")
