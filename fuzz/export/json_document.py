"""A finding as one JSON document: the machine, the steps with the fields of their messages, and what is wrong."""

from __future__ import annotations

import json
from typing import Any

from sevlab.core.payload import payload_bytes
from sevlab.fuzz.export.case import Case
from sevlab.fuzz.export.pieces import parts
from sevlab.traces.schema import Entry, config_document
from sevlab.traces.text import entry_json

FORMAT_VERSION = 1


def text(case: Case) -> str:
    """The document."""
    config = config_document(case.header.config)
    config["seed"] = case.header.config.seed.hex()
    document = {
        "format": "sevlab-reproducer",
        "version": FORMAT_VERSION,
        "command": case.command,
        "versions": case.versions,
        "seed": case.header.config.seed.hex(),
        "config": config,
        "oracles": case.header.oracles,
        "faults": case.faults,
        "findings": [found._asdict() for found in case.findings],
        "entries": [entry_json(number, entry) | _message(case, entry) for number, entry in enumerate(case.entries)],
    }
    return json.dumps(document, indent=2) + "\n"


def _message(case: Case, entry: Entry) -> dict[str, Any]:
    """The message that a step carries, by its fields."""
    carried = case.carried(entry)
    if carried is None:
        return {}
    document: dict[str, Any] = {"number": carried.number, "name": carried.name}
    if carried.layout is not None:
        data = payload_bytes(carried.payload, entry.step)[: carried.layout.SIZE].ljust(carried.layout.SIZE, b"\0")
        fields, pieces = parts(carried.layout, data)
        document["layout"] = carried.layout.__name__
        document["fields"] = {
            name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items()
        }
        document["other_bytes"] = {f"{piece.offset:#x}": piece.data.hex() for piece in pieces}
    return {"message": document}
