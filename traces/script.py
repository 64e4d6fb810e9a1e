"""Scripts of steps: one JSON object a line, as `sevlab export --format jsonl` writes the steps of a trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from sevlab.core.errors import TraceFormatError
from sevlab.core.vocabulary import Record, Vocabulary, spec_of
from sevlab.traces.text import record_from_json


def read_script(path: Path, vocabulary: Vocabulary) -> Iterator[Record]:
    """The steps of a script: each line a step, or an exported entry with one; empty lines and # comments are skipped.

    Raises `TraceFormatError` with the line's number.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip() and not line.lstrip().startswith("#"):
                    yield _step(line, vocabulary, f"{path}: line {number}")
    except OSError as error:
        raise TraceFormatError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TraceFormatError(f"{path}: not UTF-8: {error}") from error


def _step(line: str, vocabulary: Vocabulary, where: str) -> Record:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceFormatError(f"{where}: not JSON: {error}") from error
    if isinstance(document, dict) and "step" in document:
        document = document["step"]
    record = record_from_json(document, vocabulary, where)
    if not spec_of(record).is_step:
        raise TraceFormatError(f"{where}: {spec_of(record).kind} is no step")
    return record
