"""`sevlab measure diff`: what differs between two launches, page by page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
from sevlab.core.cli import echo_json
from sevlab.core.errors import FormatError

FIELDS = ("part", "page_type", "gpa", "contents", "launch_digest")
MAY_BE_ABSENT = ("page_type", "gpa")
"""Pages of SEV and SEV-ES have no type, and their VMSAs no address."""


class PageDifference(NamedTuple):
    """One page that only one launch has, or that both have with other contents."""

    number: int
    part: str
    page_type: str
    gpa: str
    a: str | None
    b: str | None


def differences(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> Iterator[PageDifference]:
    """Pages that differ; a page is found in the other launch by type, address and how often it came before."""
    pages = _by_place(b)
    for place, (number, page) in _by_place(a).items():
        _, other = pages.pop(place, (0, None))
        if other is None or other["contents"] != page["contents"]:
            yield _difference(number, page, page["contents"], other["contents"] if other else None)
    for number, page in pages.values():
        yield _difference(number, page, None, page["contents"])


def _difference(number: int, page: dict[str, Any], a: str | None, b: str | None) -> PageDifference:
    return PageDifference(number, page["part"], page.get("page_type") or "", page["gpa"] or "", a, b)


def _by_place(pages: list[dict[str, Any]]) -> dict[tuple[Any, ...], tuple[int, dict[str, Any]]]:
    seen: Counter[tuple[Any, ...]] = Counter()
    placed = {}
    for number, page in enumerate(pages):
        place = (page.get("page_type"), page["gpa"])
        placed[*place, seen[place]] = (number, page)
        seen[place] += 1
    return placed


def first_parting(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> int | None:
    """The number of the first page after which the launch digests differ; None when all are alike."""
    for number, (mine, theirs) in enumerate(zip(a, b, strict=False)):
        if mine["launch_digest"] != theirs["launch_digest"]:
            return number
    return None if len(a) == len(b) else min(len(a), len(b))


def read_measurement(path: Path) -> list[dict[str, Any]]:
    """The pages in a file that `sevlab measure --json` wrote. Raises `FormatError`."""
    data = path.read_bytes()
    try:
        document: Any = json.loads(data)
    except UnicodeDecodeError as error:
        raise FormatError(str(path), error.start, "JSON", expected="UTF-8", found=error.reason) from None
    except json.JSONDecodeError as error:
        raise FormatError(str(path), error.pos, "JSON", expected="a JSON document", found=error.msg) from None
    except RecursionError:
        raise FormatError(str(path), 0, "JSON", expected="an object of pages", found="too deep a nesting") from None
    pages = document.get("pages") if isinstance(document, dict) else None
    expected = "what `sevlab measure --json` writes"
    if not isinstance(pages, list):
        raise FormatError(str(path), 0, "pages", expected=expected, found="no list of pages")
    for number, page in enumerate(pages):
        if not isinstance(page, dict):
            raise FormatError(str(path), 0, f"pages[{number}]", expected=expected, found=f"{page!r:.40}")
        for field in FIELDS:
            value = page.get(field)
            if not isinstance(value, str) and not (value is None and field in MAY_BE_ABSENT):
                found = f"{value!r:.40}"
                raise FormatError(str(path), 0, f"pages[{number}].{field}", expected=expected, found=found)
    return pages


@click.command()
@click.argument("a", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("b", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="The differing pages, as JSON.")
@click.pass_context
def diff(ctx: click.Context, *, a: Path, b: Path, as_json: bool) -> None:
    """Compare two files that `sevlab measure --json` wrote; exits with 1 when the launches differ."""
    one, other = read_measurement(a), read_measurement(b)
    found = list(differences(one, other))
    parting = first_parting(one, other)
    if as_json:
        echo_json({"first_differing_page": parting, "pages": [item._asdict() for item in found]})
    elif parting is None:
        click.echo(f"the same {len(one)} pages")
    else:
        click.echo(f"the launch digests part at page {parting} (of {len(one)} and {len(other)}):")
        for item in found:
            where = f"page {item.number:>5}  {item.gpa:>14}  {item.page_type:<10} {item.part:<22}"
            click.echo(f"  {where} {_digest(item.a)} | {_digest(item.b)}")
        if not found:
            click.echo("  the same pages in another order")
    if parting is not None:
        ctx.exit(1)


def _digest(contents: str | None) -> str:
    return "absent".ljust(16) if contents is None else contents[:16]
