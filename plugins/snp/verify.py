"""The verification of a report: its signature, the chain behind its key, and what the owner wants of it.

Every line of the result says what was looked at, what was expected and what was found. Reserved bytes and undefined
values are refused earlier, when the report is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sevlab.core.errors import ConfigError
from sevlab.plugins.sev import ARK_ROOTS, Algorithm, Check, Point, verify_ecdsa
from sevlab.plugins.snp.report import (
    SIGNED_BYTES,
    AttestationReport,
    KeyInfo,
    SigningKey,
    decode_report,
    generation_of,
)
from sevlab.plugins.snp.tcb import Tcb
from sevlab.plugins.snp.x509 import SnpCertificate, issued_by, modulus_digest

REPORT_SOURCE = "56860, ATTESTATION_REPORT"
CHAIN_SOURCE = "57230"

ISSUERS = {"VCEK": ("VCEK", "ASK", "ARK"), "VLEK": ("VLEK", "ASVK", "ARK")}
"""The chain of each kind of endorsement key, the root last."""


def verify_report(
    report: AttestationReport,
    certificates: Sequence[SnpCertificate],
    *,
    at: datetime,
    trusted_ark: SnpCertificate | None = None,
) -> list[Check]:
    """Check the signature of `report` and the chain of its key at the time `at` (with a time zone).

    Of several endorsement keys the one that signed is taken. The root must be AMD's, or be `trusted_ark`.
    """
    key_info = KeyInfo.from_bytes(report.key_info.to_bytes(4, "little"))
    signed_by = SigningKey(key_info.signing_key).name
    if signed_by not in ISSUERS:
        return [Check("report", "signing_key", "VCEK or VLEK", signed_by, False, REPORT_SOURCE)]
    chain = _chain(report, certificates, ISSUERS[signed_by])
    checks = [Check("report", "signing_key", "VCEK or VLEK", signed_by, True, REPORT_SOURCE)]
    checks += _chain_checks(chain, at, trusted_ark)
    key = chain[signed_by]
    if key is not None:
        signed = report_signature_verifies(report, key)
        got = "verifies" if signed else "does not verify"
        checks.append(Check("report", f"signature by {signed_by}", "verifies", got, signed, REPORT_SOURCE))
        checks += _key_matches(report, key, signed_by)
    checks += _tcb_order(report)
    return checks


def report_signature_verifies(report: AttestationReport, key: SnpCertificate) -> bool:
    """Whether the VCEK or VLEK `key` signed `report`. Source: 56860, ATTESTATION_REPORT.SIGNATURE."""
    from cryptography.hazmat.primitives.asymmetric import ec

    public = key.x509.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp384r1":
        return False
    numbers = public.public_numbers()
    data = report.to_bytes()
    point = Point(numbers.x, numbers.y)
    return verify_ecdsa(point, data[:SIGNED_BYTES], data[SIGNED_BYTES:], Algorithm.ECDSA_SHA384)


# The chain --------------------------------------------------------------------------------------------------------


def _chain(
    report: AttestationReport, certificates: Iterable[SnpCertificate], roles: tuple[str, ...]
) -> dict[str, SnpCertificate | None]:
    """The certificate of each role: the endorsement key that signed, and above it the one that issued it.

    Where none fits the first of the role stands, so that its failing line can be shown.
    """
    by_role: dict[str, list[SnpCertificate]] = {role: [] for role in roles}
    for certificate in certificates:
        if certificate.role in by_role:
            by_role[certificate.role].append(certificate)
    chain: dict[str, SnpCertificate | None] = {}
    below: SnpCertificate | None = None
    for role in roles:
        found = by_role[role]
        if below is None and role == roles[0]:
            fits = [item for item in found if report_signature_verifies(report, item)]
        else:
            fits = [item for item in found if below is not None and issued_by(below, item)]
        below = next(iter(fits or found), None)
        chain[role] = below
    return chain


def _chain_checks(
    chain: Mapping[str, SnpCertificate | None], at: datetime, trusted_ark: SnpCertificate | None
) -> list[Check]:
    checks = []
    roles = tuple(chain)
    for role, issuer_role in zip(roles, (*roles[1:], roles[-1]), strict=True):
        certificate, issuer = chain[role], chain[issuer_role]
        if certificate is None:
            checks.append(Check(role, "certificate", "present", "missing", False, CHAIN_SOURCE))
            continue
        valid = certificate.x509.not_valid_before_utc <= at <= certificate.x509.not_valid_after_utc
        dates = f"{certificate.x509.not_valid_before_utc:%Y-%m-%d} to {certificate.x509.not_valid_after_utc:%Y-%m-%d}"
        checks.append(Check(role, "validity", f"includes {at:%Y-%m-%d}", dates, valid, "RFC 5280, 4.1.2.5"))
        if role in ISSUERS:
            named = certificate.extensions is not None
            got = "present" if named else "absent"
            checks.append(Check(role, "AMD's extensions", "present", got, named, CHAIN_SOURCE))
        else:
            checks.append(_ca_check(role, certificate))
        signed = issuer is not None and issued_by(certificate, issuer)
        got = "verifies" if signed else "issuer missing" if issuer is None else "does not verify"
        checks.append(Check(role, f"signature by {issuer_role}", "verifies", got, signed, CHAIN_SOURCE))
    root = chain[roles[-1]]
    if root is not None:
        checks.append(_root_check(root, trusted_ark))
    return checks


def _ca_check(role: str, certificate: SnpCertificate) -> Check:
    from cryptography import x509

    try:
        constraints = certificate.x509.extensions.get_extension_for_class(x509.BasicConstraints).value
        authority, length = constraints.ca, constraints.path_length
    except x509.ExtensionNotFound:
        authority, length = False, None
    passed = authority and length in ((None,) if role == "ARK" else (None, 0))
    got = f"CA {str(authority).lower()}, path length {length}"
    return Check(role, "basic constraints", "CA true, no longer path", got, passed, "RFC 5280, 4.2.1.9")


def _root_check(ark: SnpCertificate, trusted: SnpCertificate | None) -> Check:
    if trusted is not None:
        same = ark.der == trusted.der
        return Check("ARK", "root", "the given root", "the same" if same else "another", same, CHAIN_SOURCE)
    name = ARK_ROOTS.get(modulus_digest(ark), "")
    agrees = bool(name) and ark.subject == f"ARK-{name}"
    got = f"AMD's for {name}" if name else "an unknown key"
    return Check("ARK", "root", "a root key of AMD", got, agrees, "AMD KDS; certificates published in virtee/sev")


# The report against its key -----------------------------------------------------------------------------------------


def _key_matches(report: AttestationReport, key: SnpCertificate, role: str) -> list[Check]:
    extensions = key.extensions
    if extensions is None:
        return []
    generation = generation_of(report)
    tcb = Tcb.of(report.reported_tcb, generation)
    same_tcb = tcb == extensions.tcb
    checks = [
        Check("report", "reported_tcb", f"that of the {role}: {extensions.tcb}", str(tcb), same_tcb, CHAIN_SOURCE)
    ]
    product = extensions.product_name.split("-")[0].lower()
    known = ("milan", "genoa") if report.cpuid_family is None and generation == "milan" else (generation,)
    got = " or ".join(known) if generation else "not a known processor"
    checks.append(
        Check("report", "processor", f"that of the {role}: {product}", got, product in known, "google/go-sev-guest")
    )
    if role == "VCEK" and not any(report.chip_id):
        checks.append(Check("report", "chip_id", "hwid of the VCEK, or masked", "masked", True, CHAIN_SOURCE))
    elif role == "VCEK":
        hwid = (extensions.hwid or b"").ljust(64, b"\0")
        same = extensions.hwid is not None and hwid == report.chip_id
        expected = f"hwid of the VCEK {(extensions.hwid or b'').hex()[:16] or 'which it lacks'}..."
        checks.append(Check("report", "chip_id", expected, f"{report.chip_id.hex()[:16]}...", same, CHAIN_SOURCE))
    if role == "VLEK":
        got = extensions.csp_id or "absent"
        checks.append(Check("VLEK", "csp_id", "present", got, extensions.csp_id is not None, CHAIN_SOURCE))
    return checks


def _tcb_order(report: AttestationReport) -> list[Check]:
    generation = generation_of(report)
    tcbs = {
        name: Tcb.of(getattr(report, f"{name}_tcb"), generation)
        for name in ("reported", "committed", "current", "launch")
    }
    source = "56860, TCB_VERSION"
    return [
        Check("report", f"{low} TCB", f"at most the {high} TCB", str(tcbs[low]), tcbs[low].at_most(tcbs[high]), source)
        for low, high in (("reported", "committed"), ("committed", "current"), ("launch", "current"))
    ]


# What the owner wants -----------------------------------------------------------------------------------------------


def check_policy(report: AttestationReport, rules: Iterable[tuple[str, str, str]]) -> list[Check]:
    """Check rules of the owner: (field, "=" or ">=", value).

    `field` is a dotted name of `decode_report`, such as `measurement`, `policy.debug` or `reported_tcb.snp`; bytes are
    compared as hex. A field that the report's version does not define is absent and satisfies no rule. Raises
    `ConfigError` for a field that does not exist or a value of another kind.
    """
    fields = flatten(decode_report(report))
    checks = []
    for field, relation, wanted in rules:
        if field not in fields:
            raise ConfigError(f"policy {field!r}: no such field; there are {', '.join(fields)}")
        value = fields[field]
        checks.append(_policy_check(field, relation, wanted, value, report.report_version))
    return checks


def _policy_check(field: str, relation: str, wanted: str, value: Any, version: int) -> Check:
    expected = f"{relation} {wanted}"
    if isinstance(value, str):
        if relation != "=":
            raise ConfigError(f"policy {field!r} holds bytes: use {field}=HEX")
        passed = value == wanted.lower().removeprefix("0x")
        return Check("policy", field, expected, value, passed, "given")
    try:
        number = int(wanted, 0)
    except ValueError:
        raise ConfigError(f"policy {field!r}: {wanted!r}: expected a number such as 3 or 0x30000") from None
    if value is None:
        return Check("policy", field, expected, f"absent in version {version}", False, "given")
    passed = value == number if relation == "=" else value >= number
    return Check("policy", field, expected, str(value), passed, "given")


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names of nested fields; a part's raw number has the part's own name."""
    out: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            out[f"{prefix}{name}"] = value["raw"]
            out |= flatten({part: item for part, item in value.items() if part != "raw"}, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = value
    return out
