"""pytest --sevlab-record=DIR: keep what every failing test did to its machines, as traces that replay.

With `--sevlab-record-all` the traces of passing tests are kept too. A machine is recorded from the test that composes
it, to the end of that test.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the two options."""
    group = parser.getgroup("sevlab")
    group.addoption("--sevlab-record", metavar="DIR", help="keep traces of the machines of failing tests in DIR")
    group.addoption("--sevlab-record-all", action="store_true", help="keep the traces of passing tests too")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Note a failure of any phase."""
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Record all phases of a test."""
    target = item.config.getoption("--sevlab-record")
    if not target:
        return (yield)
    from sevlab.traces.record import recording

    folder = Path(target) / re.sub(r"[^\w.\[\]-]+", "_", item.nodeid)
    with recording(folder) as paths:
        result = yield
    if item.stash.get(FAILED, False) or item.config.getoption("--sevlab-record-all"):
        reporter = item.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None and item.stash.get(FAILED, False):
            for path in paths:
                reporter.write_line(f"recorded; see it again with: sevlab replay {path}")
    else:
        shutil.rmtree(folder)
    if folder.exists() and not paths:
        shutil.rmtree(folder)
    return result
