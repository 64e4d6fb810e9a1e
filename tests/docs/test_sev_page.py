"""The Python examples of the page on SEV run."""

from __future__ import annotations

import re

import pytest

from tests.vectors import ROOT

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs/sev.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs(code):
    exec(compile(code, "docs/sev.md", "exec", dont_inherit=True), {})


def test_there_are_examples():
    assert len(EXAMPLES) >= 2
