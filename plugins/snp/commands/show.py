"""`sevlab show report|certtable|cert|chain`: what is in a file, without judging it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypeAlias

import click
from sevlab.core.cli import echo_json
from sevlab.core.cliapi import read_input
from sevlab.plugins import sev
from sevlab.plugins.snp.cert_table import parse_cert_table
from sevlab.plugins.snp.report import decode_report, generation_of, parse_report
from sevlab.plugins.snp.verify import flatten
from sevlab.plugins.snp.x509 import SnpCertificate, issued_by, modulus_digest, parse_certificates

FILE = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)


@click.command()
@click.argument("file", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="As JSON; null is what the report's version does not define.")
def report(*, file: Path, as_json: bool) -> None:
    """Decode the attestation report in FILE."""
    parsed = parse_report(read_input(file), str(file))
    fields = decode_report(parsed)
    if as_json:
        echo_json({"generation": generation_of(parsed) or None, **fields})
        return
    click.echo(f"{'generation':<40} {generation_of(parsed) or 'unknown'}")
    for name, value in flatten(fields).items():
        click.echo(f"{name:<40} {_text(name, value)}")


def _text(name: str, value: Any) -> str:
    if value is None:
        return "absent"
    wide = isinstance(value, int) and value > 0xFFFF
    return f"{value:#x}" if wide or name in {"policy", "platform_info", "key_info"} else str(value)


@click.command()
@click.argument("file", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def certtable(*, file: Path, as_json: bool) -> None:
    """Decode the certificate table in FILE, as an extended guest request returns it."""
    entries = parse_cert_table(read_input(file), str(file))
    if as_json:
        echo_json([entry._asdict() | {"data": entry.data.hex()} for entry in entries])
        return
    for entry in entries:
        digest = hashlib.sha256(entry.data).hexdigest()[:16]
        kind = entry.kind.upper() or "unknown"
        click.echo(f"{kind:<8} {entry.guid}  offset {entry.offset:#x}  {len(entry.data)} bytes  SHA-256 {digest}...")


@click.command()
@click.argument("file", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def cert(*, file: Path, as_json: bool) -> None:
    """Decode the certificates in FILE: SEV's own, AMD's ASK and ARK, or X.509 in DER or PEM."""
    described = [describe(item) for item in read_certificates(file)]
    if as_json:
        echo_json(described)
        return
    for number, fields in enumerate(described):
        if number:
            click.echo()
        for name, value in fields.items():
            click.echo(f"{name:<22} {'absent' if value is None else value}")


@click.command()
@click.argument("files", type=FILE, nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def chain(*, files: tuple[Path, ...], as_json: bool) -> None:
    """Say who signed whom among the certificates in FILES."""
    named = [(f"{role_of(item)} ({path.name})", item) for path in files for item in read_certificates(path)]
    found = [(name, known_root(item), [by for by, signer in named if signs(signer, item)]) for name, item in named]
    if as_json:
        echo_json([{"subject": name, "root": root or None, "signed_by": signers} for name, root, signers in found])
        return
    for name, root, signers in found:
        note = f"  (root key of AMD for {root})" if root else ""
        click.echo(f"{name:<34} signed by {', '.join(signers) or 'none of these'}{note}")


AnyCertificate: TypeAlias = sev.certificates.Certificate | SnpCertificate


def read_certificates(path: Path) -> list[AnyCertificate]:
    """The certificates of a file of any of the three formats. Raises `FormatError`."""
    data = read_input(path)
    if data[:2] == b"\x30\x82" or b"-----BEGIN" in data[:200]:
        return list(parse_certificates(data, str(path)))
    return [item for _, item in sev.certificates.parse_certificates(data, str(path))]


def role_of(item: AnyCertificate) -> str:
    """ARK, ASK, CEK and so on."""
    return (item.role or item.subject) if isinstance(item, SnpCertificate) else sev.certificates.usage_of(item).name


def signs(signer: AnyCertificate, item: AnyCertificate) -> bool:
    """Whether one certificate's key signed another of the same family."""
    if isinstance(item, SnpCertificate):
        return isinstance(signer, SnpCertificate) and issued_by(item, signer)
    return not isinstance(signer, SnpCertificate) and sev.chain.signature_verifies(signer, item)


def known_root(item: AnyCertificate) -> str:
    """The product whose root key of AMD this is, "" for any other."""
    if role_of(item) != "ARK":
        return ""
    if isinstance(item, SnpCertificate):
        return sev.ARK_ROOTS.get(modulus_digest(item), "")
    return sev.chain.root_name(item) if isinstance(item, sev.certificates.AmdCertificate) else ""


def describe(item: AnyCertificate) -> dict[str, Any]:
    """The fields of a certificate by name."""
    if not isinstance(item, SnpCertificate):
        kind = "AMD" if isinstance(item, sev.certificates.AmdCertificate) else "SEV"
        return {"format": kind} | sev.certificates.describe(item)
    extensions = item.extensions
    return {
        "format": "X.509",
        "role": role_of(item),
        "sha256": hashlib.sha256(item.der).hexdigest(),
        "subject": item.subject,
        "issuer": item.issuer,
        "serial": item.serial,
        "not_before": item.x509.not_valid_before_utc.isoformat(),
        "not_after": item.x509.not_valid_after_utc.isoformat(),
        "product_name": extensions and extensions.product_name,
        "tcb": extensions and str(extensions.tcb),
        "hwid": extensions and extensions.hwid and extensions.hwid.hex(),
        "csp_id": extensions and extensions.csp_id,
    }
