"""What a seeded bug shows, exported as pytest: red on the build with the bug, green without it."""

from __future__ import annotations

from contextlib import suppress

import pytest
from sevlab.core.machine import Machine
from sevlab.core.oracle import OracleSink
from sevlab.fuzz.export import export
from sevlab.plugins.seeded import BUGS
from sevlab.traces.record import recording

from tests.plugins.seeded.test_detection import all_oracles
from tests.plugins.seeded.triggers import GIVEN, TRIGGERS

PAIRED = {name for name, bug in BUGS.items() if bug.oracle == "non-interference"}
"""What these show is a difference of two runs, which no file of one run can hold."""


@pytest.fixture
def judged(monkeypatch):
    """Machines come with every oracle, from their first step on."""
    compose = Machine.__init__

    def composed(self, *args, **keywords):
        compose(self, *args, **keywords)
        self.sink = OracleSink(all_oracles(self.plugins))
        self.fetches.keep_log(keep=True)

    monkeypatch.setattr(Machine, "__init__", composed)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BUGS.keys() - PAIRED))
def test_red_with_the_bug_and_green_without(name, judged, tmp_path, monkeypatch):
    build, act = TRIGGERS[name]
    with recording(tmp_path) as paths:
        machine = build({"seeded": {"bugs": name, "mode": "live"}})
        with suppress(AttributeError):  # the crash that S06 is
            act(machine)
        machine.apply.__self__.end()
    path = paths[-1]
    text = export(path, "pytest", given=GIVEN)
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
