"""Records as JSON and as lines for people; and back from JSON.

In JSON a record is an object with its `kind` and its fields; bytes are hexadecimal digits, numbers stay numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sevlab.core.errors import TraceFormatError
from sevlab.core.svm import exit_name
from sevlab.core.vocabulary import FieldSpec, Record, Vocabulary, spec_of
from sevlab.traces.compare import show
from sevlab.traces.schema import NO_VCPU, Entry


def record_json(record: Record) -> dict[str, Any]:
    """A record as a JSON object."""
    spec = spec_of(record)
    return {"kind": spec.kind} | {field.name: _json(value) for field, value in zip(spec.fields, record, strict=True)}


def _json(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    return [_json(item) for item in value] if isinstance(value, tuple) else value


def record_from_json(document: Any, vocabulary: Vocabulary, where: str) -> Record:
    """The record of a JSON object. Raises `TraceFormatError` that names `where`, field, expected and found."""
    if not isinstance(document, dict) or not isinstance(document.get("kind"), str):
        raise TraceFormatError(f"{where}: expected an object with a kind, found {document!r:.80}")
    kind = document["kind"]
    cls = vocabulary.kinds.get(kind)
    if cls is None:
        raise TraceFormatError(f"{where}: unknown record kind {kind!r:.80}; is a plugin missing?")
    spec = spec_of(cls)
    names = [field.name for field in spec.fields]
    for name in names:
        if name not in document:
            raise TraceFormatError(f"{where}: {kind} has no {name!r}; its fields are {', '.join(names)}")
    for name in document:
        if name not in names and name != "kind":
            raise TraceFormatError(f"{where}: {kind} has a {name!r:.40}; its fields are {', '.join(names) or 'none'}")
    values = [_from_json(document[field.name], field, f"{where}: {kind}.{field.name}") for field in spec.fields]
    return vocabulary.decode([kind, *values], where=where)


def _from_json(value: Any, field: FieldSpec, where: str) -> Any:
    if field.type is not bytes:
        return value
    try:
        return bytes.fromhex(value)
    except (ValueError, TypeError) as error:
        raise TraceFormatError(f"{where} is {value!r:.40}, expected hexadecimal digits") from error


def entry_json(number: int, entry: Entry) -> dict[str, Any]:
    """An entry as a JSON object."""
    return {
        "entry": number,
        "time_ns": entry.time_ns,
        "vcpu": None if entry.vcpu == NO_VCPU else entry.vcpu,
        "step": record_json(entry.step),
        "outcome": [record_json(record) for record in entry.outcome],
    }


def title(step: Record) -> str:
    """What a step is, in a word or two: the name of the exit, else its kind."""
    spec = spec_of(step)
    for field, value in zip(spec.fields, step, strict=True):
        if field.name == "exit_code" and isinstance(value, int):
            return exit_name(value)
    return spec.kind


def place(entry: Entry) -> str:
    """When and where an entry happened."""
    seconds, nanoseconds = divmod(entry.time_ns, 1_000_000_000)
    return f"{seconds}.{nanoseconds:09d} s, " + ("no vCPU" if entry.vcpu == NO_VCPU else f"vCPU {entry.vcpu}")


def field_lines(record: Record) -> Iterator[str]:
    """A record field by field: name, value, role."""
    spec = spec_of(record)
    width = max((len(field.name) for field in spec.fields), default=0)
    for field, value in zip(spec.fields, record, strict=True):
        note = f" {exit_name(value)}" if field.name == "exit_code" and isinstance(value, int) else ""
        yield f"{field.name:<{width}}  {_shown(value)}{note}  ({field.role.value})"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(_shown(item) for item in value) + ")"
    return show(value) if value != b"" else "no bytes"


def counts_of(kinds: Mapping[str, int]) -> list[tuple[str, int]]:
    """Kinds by their number, most first."""
    return sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
