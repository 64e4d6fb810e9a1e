"""`sevlab attest verify`: a report, the chain behind its key, and what the owner wants of it."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import click
from sevlab.core.errors import ConfigError
from sevlab.plugins.sev import show_checks
from sevlab.plugins.snp.cert_table import parse_cert_table
from sevlab.plugins.snp.report import parse_report
from sevlab.plugins.snp.verify import check_policy, verify_report
from sevlab.plugins.snp.x509 import SnpCertificate, parse_certificates

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
SUFFIXES = (".der", ".crt", ".cer", ".pem", ".cert")
RULE = re.compile(r"([a-z0-9_.]+)(>=|=)(.+)")


def certificates_in(folder: Path) -> list[SnpCertificate]:
    """The X.509 certificates of a folder's files. Raises `FormatError`, `ConfigError` for a folder without any."""
    paths = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if not paths:
        raise ConfigError(f"{folder}: no file ends in {', '.join(SUFFIXES)}")
    return [item for path in paths for item in parse_certificates(path.read_bytes(), str(path))]


def certificates_of_table(path: Path) -> list[SnpCertificate]:
    """The certificates in an extended request's table, revocation lists left out. Raises `FormatError`."""
    found = []
    for entry in parse_cert_table(path.read_bytes(), str(path)):
        if entry.kind and entry.kind != "crl":
            found += parse_certificates(entry.data, f"{path}, {entry.kind} at {entry.offset:#x}")
    return found


def rule_of(text: str) -> tuple[str, str, str]:
    """A rule "field=value" or "field>=value" in its parts."""
    found = RULE.fullmatch(text)
    if found is None:
        raise click.BadParameter(f"{text!r}: expected FIELD=VALUE or FIELD>=VALUE, such as policy.debug=0")
    return found[1], found[2], found[3]


@click.command()
@click.option("--report", type=FILE, required=True, help="The report, 1184 bytes as the firmware gives it.")
@click.option(
    "--certs", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of DER or PEM files."
)
@click.option("--table", type=FILE, help="Certificate table of an extended guest request, in place of --certs.")
@click.option("--ark", type=FILE, help="A root to trust in place of AMD's, for a simulated chain.")
@click.option(
    "--policy", "rules", type=rule_of, metavar="RULE", multiple=True, help="FIELD=VALUE or FIELD>=VALUE; repeat."
)
@click.option("--at", type=click.DateTime(), help="Check validity at this time (UTC) and not now.")
@click.option("--json", "as_json", is_flag=True, help="The checks, as JSON.")
def verify(
    *,
    report: Path,
    certs: Path | None,
    table: Path | None,
    ark: Path | None,
    rules: tuple[tuple[str, str, str], ...],
    at: datetime | None,
    as_json: bool,
) -> None:
    """Verify an SNP attestation report: exit code 0 if every check passes, 1 if one fails.

    FIELD in a rule is a dotted name that `sevlab show report --json` prints, such as measurement, policy.debug,
    reported_tcb.snp. A field that the report's version does not define is absent and satisfies no rule.
    """
    parsed = parse_report(report.read_bytes(), str(report))
    if (certs is None) == (table is None):
        raise click.UsageError("give one of --certs and --table")
    certificates = certificates_in(certs) if certs is not None else certificates_of_table(table or Path())
    trusted = None
    if ark is not None:
        trusted = parse_certificates(ark.read_bytes(), str(ark))[0]
        certificates = [item for item in certificates if item.role != "ARK"] + [trusted]
    moment = at.replace(tzinfo=UTC) if at is not None else datetime.now(UTC)
    checks = verify_report(parsed, certificates, at=moment, trusted_ark=trusted)
    show_checks([*checks, *check_policy(parsed, rules)], as_json=as_json)
