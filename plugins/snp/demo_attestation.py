"""The demo chapter of attestation: a real report of a Milan, its real chain, and what one changed bit does."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from importlib import resources

from sevlab.core.errors import FormatError
from sevlab.plugins.sev import Check
from sevlab.plugins.snp.report import parse_report
from sevlab.plugins.snp.verify import check_policy, verify_report
from sevlab.plugins.snp.x509 import parse_der

AT = datetime(2026, 1, 1, tzinfo=UTC)
"""The date of the verification: the chapter gives the same output on every day."""


def chapter(say: Callable[[str], object]) -> None:
    """Verify the sample report, then the same with one bit of the measurement, of the TCB and of a reserved byte."""
    samples = resources.files("sevlab.plugins.snp") / "samples"
    data = (samples / "milan-report.bin").read_bytes()
    chain = [parse_der((samples / f"milan-{role}.der").read_bytes(), role) for role in ("vcek", "ask", "ark")]
    say("   A report that an EPYC Milan signed, with AMD's certificates of its chip (VCEK), ASK and ARK\n")
    report = parse_report(data, "milan-report.bin")
    checks = verify_report(report, chain, at=AT)
    checks += check_policy(report, [("policy.debug", "=", "0"), ("platform_info.alias_check_complete", "=", "1")])
    for check in checks:
        _line(say, check)
    say("\n   The last line: a report of version 2 does not say whether aliases were checked, and absent is not yes\n")
    for offset, what in ((0x90, "the measurement"), (0x180, "the reported TCB"), (0x4C, "a reserved byte")):
        changed = bytearray(data)
        changed[offset] ^= 1
        say(f"   One bit of {what} changed:")
        try:
            failed = [check for check in verify_report(parse_report(bytes(changed)), chain, at=AT) if not check.passed]
        except FormatError as error:
            say(f"     refused  {error}")
            continue
        for check in failed:
            _line(say, check)


def _line(say: Callable[[str], object], check: Check) -> None:
    say(f"     {'ok  ' if check.passed else 'FAIL'} {check.subject:<7} {check.field:<36} {check.got}")
