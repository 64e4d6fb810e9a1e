"""The package that `sevlab plugins new` writes: small, complete, tested."""

from __future__ import annotations

from pathlib import Path
from string import Template

from sevlab.core.errors import PluginError

FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "sevlab-$dashed"
version = "0.1.0"
description = "A plugin for sevlab: $name"
requires-python = ">=3.11"
dependencies = ["sevlab"]

[project.optional-dependencies]
test = ["pytest"]

[project.entry-points."sevlab.plugins"]
$name = "sevlab_$name"

[tool.hatch.build.targets.wheel]
packages = ["src/sevlab_$name"]
""",
    "README.md": """\
# sevlab-$dashed

A plugin for sevlab. `pip install -e .`, then `python -m pytest`, then `sevlab plugins show $name`.
""",
    "src/sevlab_$name/__init__.py": '''\
"""$title: one register with a lock, to start from.

Name here the documents that the feature follows, with revision and section.
"""

from __future__ import annotations

from typing import Any

from sevlab.core.builder import PluginBuilder
from sevlab.core.hookspecs import hookimpl
from sevlab.core.layout import Layout
from sevlab.core.statemachine import StateMachine
from sevlab_$name.handlers import register
from sevlab_$name.layout import Control
from sevlab_$name.states import LOCK

REQUIRES: tuple[str, ...] = ()


@hookimpl
def sevlab_register(builder: PluginBuilder) -> None:
    register(builder)


@hookimpl
def sevlab_layouts() -> tuple[type[Layout], ...]:
    return (Control,)


@hookimpl
def sevlab_state_machines() -> tuple[StateMachine[Any, Any, Any], ...]:
    return (LOCK,)
''',
    "src/sevlab_$name/layout.py": '''\
"""Structures of the feature."""

from __future__ import annotations

from sevlab.core.layout import Layout, bits, flag, u64


class Control(Layout, size=8):
    """The control register."""

    enable = flag(0, u64, 0, doc="the feature is on", source="your document, section")
    lock = flag(0, u64, 1, doc="no write until reset", source="your document, section")
    level = bits(0, u64, 7, 4, values=range(4), source="your document, section")
''',
    "src/sevlab_$name/states.py": '''\
"""State machines and state of the feature."""

from __future__ import annotations

from enum import Enum

from sevlab.core.events import Fault
from sevlab.core.state import Stateful
from sevlab.core.statemachine import StateMachine
from sevlab.core.svm import Vector


class LockState(Enum):
    """Whether the register takes writes."""

    OPEN = 0
    LOCKED = 1


class Message(Enum):
    """What is written to the register."""

    WRITE = 0
    WRITE_WITH_LOCK = 1


LOCK = StateMachine(
    name="$name.lock",
    initial=LockState.OPEN,
    reject=Fault(Vector.GP, 0, 0),
    table={
        LockState.OPEN: {Message.WRITE: LockState.OPEN, Message.WRITE_WITH_LOCK: LockState.LOCKED},
        LockState.LOCKED: {},
    },
)


class State(Stateful):
    """All state of the plugin; it resets and snapshots by itself."""

    control: int = 0
    lock: LockState = LockState.OPEN
''',
    "src/sevlab_$name/handlers.py": '''\
"""Behaviour: one function for each command or event."""

from __future__ import annotations

from typing import cast

from sevlab.core.builder import Msr, PluginBuilder
from sevlab.core.cpu import Vcpu
from sevlab.core.events import Fault
from sevlab.core.layout_tools import validate
from sevlab.core.machine import Machine
from sevlab_$name.layout import Control
from sevlab_$name.states import LOCK, Message, State

CONTROL_MSR = 0xC001_1FF0


def register(builder: PluginBuilder) -> None:
    """Register the feature with a machine."""
    builder.component(State())
    builder.host_msrs.add(CONTROL_MSR, Msr(read_control, write_control))


def read_control(machine: Machine, vcpu: Vcpu | None, msr: int) -> int:
    """RDMSR of the control register. Source: your document, section."""
    return cast(State, machine.components["$name"]).control


def write_control(machine: Machine, vcpu: Vcpu | None, msr: int, value: int) -> Fault | None:
    """WRMSR of the control register: #GP(0) for an illegal value or when locked; then nothing changes."""
    state = cast(State, machine.components["$name"])
    image = value.to_bytes(8, "little")
    message = Message.WRITE_WITH_LOCK if Control.from_bytes(image).lock else Message.WRITE
    following = LOCK.next(state.lock, message)
    if following is None or validate(Control, image):
        return LOCK.reject
    state.lock = following
    state.control = value
    return None
''',
    "tests/test_$name.py": """\
from sevlab.core.events import Done, Faulted, HostMsr, Value
from sevlab.core.testing import assert_changes_nothing, make_machine
from sevlab_$name.handlers import CONTROL_MSR
from sevlab_$name.states import LOCK


def test_the_register_keeps_what_is_written():
    machine = make_machine("$name")
    assert machine.apply(HostMsr(CONTROL_MSR, True, 0x31)).first(Done) is not None
    assert machine.apply(HostMsr(CONTROL_MSR, False, 0)).first(Value) == Value(0x31)


def test_a_locked_register_refuses_and_changes_nothing():
    machine = make_machine("$name")
    machine.apply(HostMsr(CONTROL_MSR, True, 0x2))
    outcome = assert_changes_nothing(machine, HostMsr(CONTROL_MSR, True, 0x1))
    assert outcome.first(Faulted) == Faulted(*LOCK.reject)


def test_a_level_past_the_last_one_is_refused():
    machine = make_machine("$name")
    assert_changes_nothing(machine, HostMsr(CONTROL_MSR, True, 0x40))
    machine.apply(HostMsr(CONTROL_MSR, True, 0x30))
    assert machine.apply(HostMsr(CONTROL_MSR, False, 0)).first(Value) == Value(0x30)
""",
}


def write_skeleton(name: str, into: Path) -> Path:
    """Write the package for plugin `name` below `into`; returns its folder. Raises `PluginError` if it exists."""
    dashed = name.replace("_", "-")
    folder = into / f"sevlab-{dashed}"
    if folder.exists():
        raise PluginError(f"{folder}: exists already; nothing was written")
    values = {"name": name, "dashed": dashed, "title": name.replace("_", " ").capitalize()}
    for path, text in FILES.items():
        target = folder / Template(path).substitute(values)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(Template(text).substitute(values))
    return folder
