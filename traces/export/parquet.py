"""Parquet: one row a record, for whoever asks a trace questions in SQL or a data frame."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sevlab.core.errors import ConfigError
from sevlab.core.vocabulary import Record, spec_of
from sevlab.traces.reader import TraceReader
from sevlab.traces.schema import NO_VCPU
from sevlab.traces.text import record_json

BATCH_ROWS = 1 << 16

NUMBERS = ("exit_code", "exit_info_1", "exit_info_2", "rip", "gpa", "port", "msr", "leaf")
"""Fields with a column of their own, empty where a record has none; the column `fields` has all of them as JSON."""


def export(reader: TraceReader, path: Path) -> int:
    """Write the records of `reader` to `path`; returns the number of entries. Raises `ConfigError` without pyarrow."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError("Parquet needs pyarrow: pip install 'sevlab[parquet]'") from error
    schema = pa.schema([
        ("entry", pa.uint64()), ("time_ns", pa.uint64()), ("vcpu", pa.int64()), ("kind", pa.string()),
        ("step", pa.bool_()), *((name, pa.uint64()) for name in NUMBERS), ("fields", pa.string()),
    ])  # fmt: skip
    count = 0
    rows: list[tuple[Any, ...]] = []
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:

        def put() -> None:
            columns = zip(*rows, strict=True) if rows else ((),) * len(schema)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            rows.clear()

        for number, entry in reader.numbered():
            place = (number, entry.time_ns, None if entry.vcpu == NO_VCPU else entry.vcpu)
            rows.extend(place + tuple(_columns(record)) for record in (entry.step, *entry.outcome))
            count += 1
            if len(rows) >= BATCH_ROWS:
                put()
        put()
    return count


def _columns(record: Record) -> Iterator[Any]:
    spec = spec_of(record)
    fields = record_json(record)
    yield fields.pop("kind")
    yield spec.is_step
    for name in NUMBERS:
        value = fields.get(name)
        yield value if type(value) is int else None
    yield json.dumps(fields, separators=(",", ":"))
