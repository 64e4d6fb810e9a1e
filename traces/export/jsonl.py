"""JSON lines: one entry a line, bytes as hexadecimal digits."""

from __future__ import annotations

import json
from pathlib import Path

from sevlab.traces.reader import TraceReader
from sevlab.traces.text import entry_json


def export(reader: TraceReader, path: Path) -> int:
    """Write the entries of `reader` to `path`; returns their number."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for number, entry in reader.numbered():
            json.dump(entry_json(number, entry), file, separators=(",", ":"))
            file.write("\n")
            count += 1
    return count
