"""`sevlab show secrets|cpuid-page|rmp`: an SNP guest's pages and the reverse map table, from files."""

from __future__ import annotations

from pathlib import Path

import click
from sevlab.core.cli import echo_json
from sevlab.core.cliapi import read_input
from sevlab.core.errors import FormatError
from sevlab.core.layout_tools import read_file_part, to_json
from sevlab.plugins.snp.guest_pages import CPUID_ENTRIES_MAX, CpuidEntry, CpuidHeader, SecretsPage
from sevlab.plugins.snp.layout import RmpEntry
from sevlab.plugins.snp.states import page_state

FILE = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)


@click.command()
@click.argument("file", type=FILE)
@click.option("--keys", is_flag=True, help="Show the VMPCKs too.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def secrets(*, file: Path, keys: bool, as_json: bool) -> None:
    """Decode the secrets page in FILE; the communication keys are hidden unless --keys is given."""
    data = read_input(file)
    read_file_part(SecretsPage, data, str(file))
    fields = to_json(SecretsPage, data[: SecretsPage.SIZE])
    if not keys:
        for number in range(4):
            name = f"vmpck{number}"
            fields[name] = "(hidden)" if any(bytes.fromhex(fields[name])) else "(wiped)"
    if as_json:
        echo_json(fields)
        return
    for name, value in fields.items():
        shown = f"{value:#x}" if isinstance(value, int) and value > 9 else value
        click.echo(f"{name:<22} {shown}")


@click.command("cpuid-page")
@click.argument("file", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def cpuid_page(*, file: Path, as_json: bool) -> None:
    """Decode the CPUID page in FILE."""
    data = read_input(file)
    header = read_file_part(CpuidHeader, data, str(file))
    if not 1 <= header.count <= CPUID_ENTRIES_MAX:
        expected = f"1 to {CPUID_ENTRIES_MAX} entries"
        raise FormatError(str(file), 0, "count", expected=expected, found=str(header.count))
    rows = []
    for number in range(header.count):
        offset = CpuidHeader.SIZE + number * CpuidEntry.SIZE
        entry = read_file_part(CpuidEntry, data, str(file), offset)
        rows.append(to_json(CpuidEntry, entry.to_bytes()))
    if as_json:
        echo_json(rows)
        return
    click.echo("function   sub  XCR0 XSS  EAX      EBX      ECX      EDX")
    for row in rows:
        registers = " ".join(f"{row[name]:08x}" for name in ("eax", "ebx", "ecx", "edx"))
        click.echo(f"{row['eax_in']:08x} {row['ecx_in']:5x} {row['xcr0_in']:5x} {row['xss_in']:3x}  {registers}")


@click.command()
@click.argument("file", type=FILE)
@click.option("--first", default="0", help="SPA of the page that the first entry stands for, e.g. 0x1000000.")
@click.option("--all", "everything", is_flag=True, help="Entries of the hypervisor's pages too.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def rmp(*, file: Path, first: str, everything: bool, as_json: bool) -> None:
    """Decode RMP entries in FILE: 16 bytes for each 4 KiB page, as the parts keep them."""
    data = read_input(file)
    if not data or len(data) % RmpEntry.SIZE:
        expected = f"a multiple of {RmpEntry.SIZE} bytes"
        raise FormatError(str(file), len(data), "end", expected=expected, found=f"{len(data)} bytes")
    try:
        spa = int(first, 0)
    except ValueError:
        raise click.BadParameter(f"{first!r}: expected a number", param_hint="--first") from None
    rows = []
    for offset in range(0, len(data), RmpEntry.SIZE):
        raw = data[offset : offset + RmpEntry.SIZE]
        state = page_state(int.from_bytes(raw[:8], "little"))
        if any(raw) or everything:
            place = spa + offset // RmpEntry.SIZE * 4096
            rows.append({"spa": place, "state": state.name, **to_json(RmpEntry, raw)})
    if as_json:
        echo_json(rows)
        return
    click.echo("SPA           state          size  ASID  GPA              VMSA  VMPL0-3")
    for row in rows:
        size = "2M" if row["page_size"] else "4K"
        rights = " ".join(f"{row[f'vmpl{level}']:02x}" for level in range(4))
        gpa = row["gpa_page"] << 12
        click.echo(
            f"{row['spa']:012x}  {row['state']:<13}  {size}  {row['asid']:5}  {gpa:015x}  {row['vmsa']:4}  {rights}"
        )
