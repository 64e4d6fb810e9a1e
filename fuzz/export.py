"""A finding in the forms that other tools take."""

from __future__ import annotations

import base64
import json

from sevlab.fuzz.runner import Runner
from sevlab.fuzz.store import Stored
from sevlab.fuzz.targets import target_named
from sevlab.fuzz.triage import step_lines

PYTEST = '''"""{title}"""

import base64

from sevlab.fuzz.runner import Runner
from sevlab.fuzz.targets import target_named
from sevlab.fuzz.triage import findings_of

INPUT = base64.b85decode("{data}")
{steps}


def test_{name}(sevlab_given=None):
    runner = Runner(target_named("{target}"), given=sevlab_given)
    found = findings_of(runner, runner.codec.decode(INPUT), paired=True)
    assert not [finding for finding in found if (finding.oracle, finding.rule) == ("{oracle}", "{rule}")]
'''


def to_pytest(stored: Stored) -> str:
    """A test that is green when the fault is gone. Plugins that are not installed come as `sevlab_given`."""
    runner = Runner(target_named(stored.target))
    steps = runner.codec.decode(stored.smallest)
    name = "".join(letter if letter.isalnum() else "_" for letter in f"{stored.oracle}_{stored.rule}")
    return PYTEST.format(
        title=f"{stored.oracle}: {stored.rule}: {stored.message}".replace('"', "'").replace("\\", "/"),
        data=base64.b85encode(stored.smallest).decode(),
        steps="\n".join(f"# {line}" for step in steps for line in step_lines(runner, step)),
        name=name,
        target=stored.target,
        oracle=stored.oracle,
        rule=stored.rule,
    )


def to_json(stored: Stored) -> str:
    """Everything that is known of it, with its steps as arrays of the vocabulary."""
    runner = Runner(target_named(stored.target))
    document = {
        **stored._asdict(),
        "data": stored.data.hex(),
        "minimised": stored.smallest.hex(),
        "steps": [runner.machine.vocabulary.encode(step) for step in runner.codec.decode(stored.smallest)],
    }
    return json.dumps(document, indent=2, default=lambda value: value.hex() if isinstance(value, bytes) else str(value))
