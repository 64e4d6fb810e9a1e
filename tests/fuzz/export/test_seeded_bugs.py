"""What a seeded bug shows, exported as pytest: red on the build with the bug, green without it."""

from __future__ import annotations

import pytest
from sevlab.fuzz.export import export
from sevlab.plugins.seeded import BUGS
from sevlab.traces.record import recording

from tests.plugins.seeded.triggers import GIVEN, TRIGGERS

VISIBLE = sorted(name for name, bug in BUGS.items() if bug.oracle in {"invariant", "crash"})
"""Those that need no oracle of a target."""


@pytest.mark.parametrize("name", VISIBLE)
def test_red_with_the_bug_and_green_without(name, tmp_path, monkeypatch):
    build, act = TRIGGERS[name]
    with recording(tmp_path) as paths, pytest.raises(Exception, match="."):
        act(build({"seeded": {"bugs": name, "mode": "live"}}))
    text = export(paths[-1], "pytest", given=GIVEN)
    assert name in text
    _test(text)()
    monkeypatch.setenv("SEVLAB_WITH_FAULT", "1")
    with pytest.raises(AssertionError, match=r"step \d+: \[(Found|Violation)"):
        _test(text)()


def _test(text):
    space = {}
    exec(compile(text, "exported", "exec"), space)
    (found,) = [value for name, value in space.items() if name.startswith("test_")]
    return found
