from __future__ import annotations

import pytest

from tests.fuzz.export.findings import faulty_plugin, record_finding


@pytest.fixture(scope="session")
def given():
    return {"faulty": faulty_plugin()}


@pytest.fixture(scope="session")
def finding(tmp_path_factory, given):
    return record_finding(tmp_path_factory.mktemp("findings") / "finding.sevtrace", given)
