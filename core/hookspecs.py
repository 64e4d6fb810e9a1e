"""Every hook, in one place.

Hooks run while plugins are loaded and a machine is composed, never while it runs. Each returns plain data or registers
with the builder; `docs/plugins.md` shows each with an example.
"""

# mypy: disable-error-code="empty-body"
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cliapi import Capability, CommandSpec, DemoChapter
    from sevlab.core.config import Option
    from sevlab.core.layout import Layout
    from sevlab.core.oracle import Canary, Oracle, StateCounter, Target
    from sevlab.core.payload import Payload
    from sevlab.core.porting import Porting
    from sevlab.core.statemachine import StateMachine

hookspec = pluggy.HookspecMarker("sevlab")
hookimpl = pluggy.HookimplMarker("sevlab")
"""Marks a function of a plugin as the implementation of the hook of that name."""


@hookspec
def sevlab_register(builder: PluginBuilder) -> None:
    """Register handlers, state, slots and observers for one machine that is being composed."""


@hookspec
def sevlab_options() -> tuple[Option, ...]:
    """Declare the options that a configuration file may set for this plugin."""


@hookspec
def sevlab_records() -> tuple[type, ...]:
    """Declare record kinds: NamedTuples made with `step` or `outcome`."""


@hookspec
def sevlab_layouts() -> tuple[type[Layout], ...]:
    """Declare the binary layouts that documentation, `show` and fuzzing work on."""


@hookspec
def sevlab_state_machines() -> tuple[StateMachine[Any, Any, Any], ...]:
    """Declare the state machines that documentation and state feedback work on."""


@hookspec
def sevlab_commands() -> tuple[CommandSpec, ...]:
    """Add commands to the command line; each names the module that is imported when it is called.

    Called on the modules of the entry-point group `sevlab.commands`, so that `sevlab --help` imports no feature.
    """


@hookspec
def sevlab_demo_chapters() -> tuple[DemoChapter, ...]:
    """Add chapters to `sevlab demo`."""


@hookspec
def sevlab_capabilities() -> tuple[Capability, ...]:
    """Name what `sevlab doctor` checks: optional libraries, tools, devices."""


@hookspec
def sevlab_oracles() -> tuple[Oracle, ...]:
    """Bring oracles for fuzzing."""


@hookspec
def sevlab_targets() -> tuple[Target, ...]:
    """Bring fuzzing targets."""


@hookspec
def sevlab_canaries() -> tuple[Canary, ...]:
    """Bring the canaries of seeded bugs."""


@hookspec
def sevlab_state_counters() -> tuple[StateCounter, ...]:
    """Bring coordinates for state feedback."""


@hookspec
def sevlab_porting() -> tuple[Porting, ...]:
    """Say what becomes of a plain guest's exits under a feature, and bring a machine that executes them."""


@hookspec
def sevlab_payloads() -> tuple[Payload, ...]:
    """Say what the bytes of records are: which message a record carries, and its layout."""
