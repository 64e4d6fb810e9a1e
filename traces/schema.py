"""What a trace is: a header, and entries of one step with the outcome that was recorded for it.

The header says what the trace was taken of (the configuration of the machine that replays it, its plugins with their
versions) and where it came from. It also carries the declaration of every record kind, so that a trace can be shown
where a plugin is missing, and so that a changed declaration is noticed instead of misread; `schema_version` is their
digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgpack
from sevlab.core.config import GuestConfig, MachineConfig
from sevlab.core.errors import ConfigError, TraceFormatError
from sevlab.core.vocabulary import Boundary, FieldSpec, Record, RecordSpec, Role, Vocabulary, spec_of
from sevlab.traces.importers.log_records import LOG_RECORDS
from sevlab.traces.records import TRACE_RECORDS

FORMAT_VERSION = 2

NO_VCPU = -1
"""`Entry.vcpu` of a step that no vCPU takes: the host, the ASP, the clock."""

FIELD_TYPES = {"int": int, "bytes": bytes, "str": str, "bool": bool, "tuple": tuple}
"""The names that field types have in a header."""


class Entry(NamedTuple):
    """One step and the outcome that was recorded for it.

    `time_ns`: 0 to 2^64-1, nanoseconds of the source's clock (of the virtual clock in our own recordings); it may step
    back between entries of different vCPUs. `vcpu`: number of the vCPU, or `NO_VCPU`.
    """

    time_ns: int
    vcpu: int
    step: Record
    outcome: tuple[Record, ...]


class Source(NamedTuple):
    """Where a trace came from: name of the importer's format or "recorded", file name, SHA-256 of the file in hex."""

    format: str = "recorded"
    file: str = ""
    sha256: str = ""


RECORDED = Source()
"""The source of our own recordings."""


class PluginVersion(NamedTuple):
    """A plugin that took part."""

    name: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a trace says about itself before its first entry.

    `oracles` are the names of the oracles that were attached while recording, None when there was no sink;
    `kinds` are the declared record kinds, in the order of their numbers in the file.
    """

    config: MachineConfig
    source: Source = RECORDED
    plugins: tuple[PluginVersion, ...] = ()
    oracles: tuple[str, ...] | None = None
    kinds: tuple[RecordSpec, ...] = field(default=(), repr=False)

    @property
    def schema_version(self) -> str:
        """Digest of the record declarations: equal versions mean that every record reads the same."""
        return hashlib.sha256(msgpack.packb([_kind_array(kind) for kind in self.kinds])).hexdigest()[:16]


def vocabulary_of(plugins: Iterable[str], given: Mapping[str, Any] | None = None) -> Vocabulary:
    """The record kinds of the kernel, of `plugins` and of traces.

    `given` maps names to plugin modules that take part without being installed. Raises `PluginError`.
    """
    from sevlab.core.machine import vocabulary
    from sevlab.core.plugins import load

    return with_trace_records(vocabulary(load([*plugins, *(given or {})], given=given)))


def with_trace_records(vocabulary: Vocabulary) -> Vocabulary:
    """A machine's vocabulary with the records that only traces hold."""
    return Vocabulary(vocabulary.kinds | {spec_of(record).kind: record for record in (*TRACE_RECORDS, *LOG_RECORDS)})


def declared(vocabulary: Vocabulary) -> tuple[RecordSpec, ...]:
    """The declarations of `vocabulary` in the order of their names."""
    return tuple(spec_of(vocabulary.kinds[kind]) for kind in sorted(vocabulary.kinds))


# The header on the wire -------------------------------------------------------------------------------------------


def pack_header(header: Header) -> bytes:
    """The header as a msgpack map."""
    document = {
        "format": FORMAT_VERSION,
        "schema": header.schema_version,
        "source": list(header.source),
        "config": config_document(header.config),
        "plugins": [list(plugin) for plugin in header.plugins],
        "oracles": None if header.oracles is None else list(header.oracles),
        "kinds": [_kind_array(kind) for kind in header.kinds],
    }
    packed: bytes = msgpack.packb(document)
    return packed


def unpack_header(data: bytes) -> Header:
    """The header of a msgpack map. Raises `TraceFormatError` that says what is wrong with it."""
    try:
        return _header_of(msgpack.unpackb(data, use_list=False))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError) as error:
        raise TraceFormatError(f"header: {type(error).__name__}: {error!s:.200}") from error


def _header_of(document: Any) -> Header:
    if document["format"] != FORMAT_VERSION:
        raise TraceFormatError(f"header: format version {document['format']!r:.20}, expected {FORMAT_VERSION}")
    oracles = document["oracles"]
    return Header(
        source=Source(*_texts(document["source"])),
        config=config_from_document(document["config"]),
        plugins=tuple(PluginVersion(*_texts(plugin)) for plugin in document["plugins"]),
        oracles=None if oracles is None else _texts(oracles),
        kinds=tuple(_kind_from_array(kind) for kind in document["kinds"]),
    )


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
        raise TraceFormatError(f"header: expected a list of texts, found {value!r:.80}")
    return value


def _kind_array(spec: RecordSpec) -> list[Any]:
    return [
        spec.kind,
        spec.boundary.value,
        spec.is_step,
        [[item.name, item.type.__name__ if item.type in FIELD_TYPES.values() else "int", item.role.value]
         for item in spec.fields],
    ]  # fmt: skip


def _kind_from_array(array: Any) -> RecordSpec:
    kind, boundary, is_step, fields = array
    return RecordSpec(
        _texts((kind,))[0],
        Boundary(boundary),
        bool(is_step),
        tuple(FieldSpec(_texts((name,))[0], FIELD_TYPES[type_name], Role(role)) for name, type_name, role in fields),
    )


def config_document(config: MachineConfig) -> dict[str, Any]:
    """A configuration as plain data, with every value spelled out."""
    return {
        "generation": config.generation,
        "seed": config.seed,
        "memory_bytes": config.memory_bytes,
        "caches": config.caches,
        "plugins": list(config.plugins),
        "guests": [[guest.name, guest.vcpus, guest.memory_bytes] for guest in config.guests],
        "options": {name: dict(options) for name, options in config.options.items()},
    }


def config_from_document(document: Mapping[str, Any]) -> MachineConfig:
    """The configuration of `config_document`. Raises `TraceFormatError` or `ConfigError` for anything else."""
    types = {"generation": str, "seed": bytes, "memory_bytes": int, "caches": bool, "plugins": tuple, "guests": tuple}
    for name, expected in types.items():
        if type(document[name]) is not expected:
            raise TraceFormatError(f"header: config.{name} is {document[name]!r:.60}, expected {expected.__name__}")
    guests = []
    for name, vcpus, memory_bytes in document["guests"]:
        if not (type(name) is str and type(vcpus) is int and type(memory_bytes) is int):
            raise TraceFormatError(f"header: guest {name!r:.40}: expected a name, a number of vCPUs and of bytes")
        guests.append(GuestConfig(name=name, vcpus=vcpus, memory_bytes=memory_bytes))
    options = {str(name): {str(key): value for key, value in table.items()}
               for name, table in document["options"].items()}  # fmt: skip
    return MachineConfig(
        generation=document["generation"],
        seed=document["seed"],
        memory_bytes=document["memory_bytes"],
        caches=document["caches"],
        plugins=_texts(document["plugins"]),
        guests=tuple(guests),
        options=options,
    )
