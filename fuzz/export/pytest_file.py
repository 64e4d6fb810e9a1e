"""A finding as a pytest file: the steps as constructors, red where the fault is, green where it is not."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from sevlab.core.config import GuestConfig, MachineConfig
from sevlab.fuzz.export.case import Case, without
from sevlab.fuzz.export.literals import INDENT, Source, call, quoted
from sevlab.traces.machine_state import without_components
from sevlab.traces.records import End, Found, State, Violation
from sevlab.traces.replay_recorded import machine_of, perform
from sevlab.traces.schema import Entry, Header, PluginVersion

WITH_FAULT = "SEVLAB_WITH_FAULT"
"""Environment variable: compose the machine with the fault that the trace was recorded with."""


def text(case: Case) -> str:
    """The file."""
    source = Source()
    for used in (Header, machine_of, perform, Found, Violation, PluginVersion):
        source.imports.setdefault(used.__module__, set()).add(used.__name__)
    steps = [
        f"{INDENT}# {number}: {case.title(entry)}\n{INDENT}{_step(case, entry, source)},"
        for number, entry in enumerate(case.entries)
    ]
    if not any(isinstance(entry.step, End) for entry in case.entries):
        steps.append(f"{INDENT}# the oracles look at the whole sequence\n{INDENT}{source.record(End(), None, 1)},")
    body = [
        *_header(case, source),
        "",
        "STEPS = (",
        *steps,
        ")",
        "",
        "",
        f"def test_{case.slug}():",
        f"{INDENT}machine = machine_of(HEADER)",
        f"{INDENT}for number, step in enumerate(STEPS):",
        f"{INDENT * 2}outcome = perform(machine, step)",
        f"{INDENT * 2}wrong = [record for record in outcome if isinstance(record, (Found, Violation))]",
        f'{INDENT * 2}assert not wrong, f"step {{number}}: {{wrong}}"',
        "",
    ]
    standard = (["import os"] if case.faults else []) + (["from base64 import b85decode"] if source.needs_b85 else [])
    head = [*_docstring(case), "", *standard, *([""] if standard else []), *source.import_lines(), ""]
    helper = [WITH_BYTES, ""] if source.needs_with_bytes else []
    return "\n".join((*head, *helper, *body))


WITH_BYTES = '''\

def with_bytes(data, pieces):
    """`data` with the bytes of `pieces` at their offsets."""
    changed = bytearray(data)
    for offset, piece in pieces.items():
        changed[offset : offset + len(piece)] = piece
    return bytes(changed)
'''


def _step(case: Case, entry: Entry, source: Source) -> str:
    """A step; a state, which holds the counters of a planted fault, with and without them."""
    text = source.record(entry.step, case.carried(entry), 1)
    if not case.faults or not isinstance(entry.step, State):
        return text
    clean = State(without_components(entry.step.snapshot, case.faults))
    return text if clean == entry.step else f"{text} if WITH_FAULT else {source.record(clean, None, 1)}"


def _docstring(case: Case) -> list[str]:
    lines = [line.replace("\\", "\\\\").replace('"""', "'''") for line in case.about()]
    lines += ["", "Red where the fault is, green where it is not: run it with pytest."]
    if case.faults:
        lines += [
            f"The trace was recorded with the plugin {', '.join(case.faults)}, which puts a fault into a handler;",
            f"{WITH_FAULT}=1 composes the machine with it.",
        ]
    return [f'"""{lines[0]}', *lines[1:], '"""']


def _header(case: Case, source: Source) -> list[str]:
    """The machine: `CONFIG` without a known fault, `HEADER` for the composition."""
    config = case.header.config
    plugins = [plugin for plugin in case.header.plugins if plugin.name not in case.faults]
    lines = [f"CONFIG = {_config(without(config, case.faults), source)}"]
    lines.append(f"PLUGINS = {_plugins(plugins)}")
    if case.faults:
        faulty = [plugin for plugin in case.header.plugins if plugin.name in case.faults]
        lines += [
            f'WITH_FAULT = bool(os.environ.get("{WITH_FAULT}"))',
            "if WITH_FAULT:",
            f"{INDENT}CONFIG = {_config(config, source, 1)}",
            f"{INDENT}PLUGINS = (*PLUGINS, *{_plugins(faulty, 1)})",
        ]
    oracles = case.header.oracles
    lines.append(f"ORACLES = {oracles if oracles is None else source.value(tuple(oracles), 0)}")
    lines.append("HEADER = Header(config=CONFIG, plugins=PLUGINS, oracles=ORACLES)")
    return lines


def _plugins(plugins: list[PluginVersion], depth: int = 0) -> str:
    items = [f"PluginVersion({quoted(plugin.name)}, {quoted(plugin.version)})" for plugin in plugins]
    return call("", items, depth, one=len(items) == 1)


def _config(config: MachineConfig, source: Source, depth: int = 0) -> str:
    """A configuration by what differs from the default."""
    source.imports.setdefault(MachineConfig.__module__, set()).add("MachineConfig")
    default = MachineConfig()
    values = []
    for field in fields(MachineConfig):
        value: Any = getattr(config, field.name)
        if field.name == "options":
            value = {name: dict(options) for name, options in value.items()}
            if value:
                values.append(f"options={value!r}")
        elif field.name == "guests":
            if value:
                guests = [_guest(guest, source, depth + 2) for guest in value]
                values.append(f"guests={call('', guests, depth + 1, one=len(guests) == 1)}")
        elif value != getattr(default, field.name) or field.name in {"generation", "seed", "plugins"}:
            shown = source.value(value, depth + 1)
            values.append(f"{field.name}={shown}")
    return call("MachineConfig", values, depth)


def _guest(guest: GuestConfig, source: Source, depth: int) -> str:
    source.imports.setdefault(GuestConfig.__module__, set()).add("GuestConfig")
    values = [
        f"name={quoted(guest.name)}",
        f"vcpus={guest.vcpus}",
        f"memory_bytes={source.value(guest.memory_bytes, depth)}",
    ]
    return call("GuestConfig", values, depth)
