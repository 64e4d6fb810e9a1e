"""`sevlab show command`: a command buffer of the SEV mailbox, legacy or SNP, decoded from its declaration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from sevlab.core.cli import echo_json
from sevlab.core.errors import ConfigError, FormatError
from sevlab.core.layout import Layout
from sevlab.core.layout_tools import reserved_ranges, to_json, validate
from sevlab.plugins import sev
from sevlab.plugins.snp.command_table import SNP, SNP_COMMANDS

KNOWN: dict[int, tuple[sev.Family, sev.MailboxCommand]] = {
    declared.command: (family, declared)
    for family, commands in ((sev.LEGACY, sev.LEGACY_COMMANDS), (SNP, SNP_COMMANDS))
    for declared in commands
}


@click.command()
@click.argument("name", required=False)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.option("--hex", "hex_bytes", metavar="BYTES", help="The buffer as hexadecimal digits in place of FILE.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(*, name: str | None, file: Path | None, hex_bytes: str | None, as_json: bool) -> None:
    """Decode the buffer in FILE of the mailbox command NAME (a name or a number).

    Without FILE and --hex: what the command takes, where it is legal, what it writes back. Without NAME: all commands.
    """
    if name is None:
        _list(as_json=as_json)
        return
    family, declared = find(name)
    data, source = _buffer(file, hex_bytes)
    described = describe(family, declared, data, source)
    if as_json:
        echo_json(described)
        return
    click.echo(f"{described['command']} ({described['number']:#04x}): {described['summary']}")
    click.echo(f"platform states  {', '.join(described['platform_states'])}")
    for field in described["fields"]:
        value = field["value"]
        text = "" if value is None else value if isinstance(value, str) else f"{value:#x}"
        mark = "*" if field["written_back"] else " "
        click.echo(f"{field['offset']:#06x} {mark} {field['name']:<22} {text:<20} {field['note']}".rstrip())
    for problem in described["problems"]:
        click.echo(f"!      {problem}")


def find(name: str) -> tuple[sev.Family, sev.MailboxCommand]:
    """The declaration of a command by name or number. Raises `ConfigError`."""
    members = sev.Command.__members__
    number = members.get(name.upper().replace("-", "_"))
    if number is None:
        try:
            number = int(name, 0)  # type: ignore[assignment]
        except ValueError:
            number = None
    if number is None or number not in KNOWN:
        legal = ", ".join(declared.command.name for _, declared in KNOWN.values())
        raise ConfigError(f"command {name!r}: expected a number, or one of {legal}")
    return KNOWN[number]


def _buffer(file: Path | None, hex_bytes: str | None) -> tuple[bytes | None, str]:
    if file is not None and hex_bytes is not None:
        raise ConfigError("--hex: expected FILE or --hex, found both")
    if hex_bytes is not None:
        try:
            return bytes.fromhex(hex_bytes), "--hex"
        except ValueError as error:
            raise ConfigError(f"--hex: {hex_bytes!r:.60}: expected pairs of hexadecimal digits ({error})") from error
    return (None, "") if file is None else (file.read_bytes(), str(file))


def describe(family: sev.Family, declared: sev.MailboxCommand, data: bytes | None, source: str) -> dict[str, Any]:
    """Everything about a command, with the values of `data`. Raises `FormatError` for a buffer of another length."""
    layout = declared.buffer
    allows = family.automaton.allows
    states = [state.name for state in family.automaton.states if allows(state, declared.command)]
    size = 0 if layout is None else layout.SIZE
    if data is not None and len(data) != size:
        raise FormatError(
            source,
            min(len(data), size),
            declared.command.name,
            expected=f"{size:#x} bytes",
            found=f"{len(data):#x} bytes",
        )
    return {
        "command": declared.command.name,
        "number": int(declared.command),
        "summary": declared.summary,
        "platform_states": states,
        "bytes": size,
        "fields": [] if layout is None else _fields(layout, declared.outputs, data),
        "problems": [] if layout is None or data is None else _problems(layout, data),
    }


def _fields(layout: type[Layout], outputs: tuple[str, ...], data: bytes | None) -> list[dict[str, Any]]:
    values = {} if data is None else to_json(layout, data)
    return [
        {
            "name": name,
            "offset": info.offset,
            "bytes": info.length_bytes,
            "value": values.get(name),
            "written_back": name in outputs,
            "note": info.doc,
        }
        for name, info in layout.FIELDS.items()
    ]


def _problems(layout: type[Layout], data: bytes) -> list[str]:
    broken = [
        f"{problem.field} at {problem.offset:#x} is {problem.found:#x}: expected {problem.expected}"
        for problem in validate(layout, data)
    ]
    return broken + [
        f"unnamed bytes from {offset:#x} are {data[offset : offset + length].hex()}: expected zero"
        for offset, length in reserved_ranges(layout)
        if any(data[offset : offset + length])
    ]


def _list(*, as_json: bool) -> None:
    rows = [declared for _, declared in KNOWN.values()]
    if as_json:
        echo_json(
            [{"command": row.command.name, "number": int(row.command), "bytes": row.buffer_bytes} for row in rows]
        )
        return
    for row in rows:
        click.echo(f"{row.command:#04x}  {row.command.name:<26} {row.buffer_bytes:#6x} bytes  {row.summary}")
