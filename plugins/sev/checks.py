"""A verification as a list of checks, and how a command shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

EXIT_NO = 1


class Check(NamedTuple):
    """One line of a verification: `subject` is the thing, `field` what of it was looked at."""

    subject: str
    field: str
    expected: str
    got: str
    passed: bool
    source: str


def show_checks(checks: Sequence[Check], *, as_json: bool) -> None:
    """Print the checks and leave the running command with 1 if one of them failed."""
    import click
    from sevlab.core.cli import echo_json

    failed = sum(not check.passed for check in checks)
    if as_json:
        echo_json({"passed": not failed, "checks": [check._asdict() for check in checks]})
    else:
        for check in checks:
            click.echo(f"{'ok  ' if check.passed else 'FAIL'}  {check.subject:<7} {check.field:<22} {check.got}")
            if not check.passed:
                click.echo(f"      expected: {check.expected}   (source: {check.source})")
        count = "1 check" if len(checks) == 1 else f"{len(checks)} checks"
        click.echo(f"{count}, {failed} failed" if failed else f"{count} passed")
    if failed:
        click.get_current_context().exit(EXIT_NO)
