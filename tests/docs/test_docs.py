"""The documentation says what the code says: hooks with their arguments, examples that run, generated pages."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from enum import Enum
from types import ModuleType
from typing import NamedTuple

import pytest
from sevlab.core import (
    builder,
    cliapi,
    config,
    hookspecs,
    layout,
    oracle,
    payload,
    plugins,
    porting,
    state,
    statemachine,
    vocabulary,
)
from sevlab.core.events import Party
from sevlab.core.machine import Machine

from tests.vectors import ROOT

GUIDE = (ROOT / "docs/plugins.md").read_text()
HOOKS = {name: function for name, function in vars(hookspecs).items() if name.startswith("sevlab_")}


def section(hook):
    found = re.search(rf"^### {hook}\((.*?)\)\n(.*?)(?=^##)", GUIDE, re.MULTILINE | re.DOTALL)
    assert found, f"docs/plugins.md has no section for {hook}"
    return found[1], found[2]


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_is_documented_with_its_arguments(hook):
    arguments, _ = section(hook)
    assert arguments == ", ".join(inspect.signature(HOOKS[hook]).parameters)
    assert (HOOKS[hook].__doc__ or "").strip()


def test_the_guide_names_no_hook_that_does_not_exist():
    assert set(re.findall(r"^### (sevlab_\w+)", GUIDE, re.MULTILINE)) == set(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_each_example_is_a_working_plugin(hook):
    code = re.search(r"```python\n(.*?)```", section(hook)[1], re.DOTALL)[1]
    names = {"Enum": Enum, "NamedTuple": NamedTuple, "Party": Party, "hookimpl": hookspecs.hookimpl}
    for module in (builder, cliapi, config, layout, oracle, payload, porting, state, statemachine, vocabulary):
        names |= {name: value for name, value in vars(module).items() if not name.startswith("_")}
    example = ModuleType("frob", "The example of the guide.")
    vars(example).update(names)
    exec(compile(code, f"docs/plugins.md: {hook}", "exec", dont_inherit=True), vars(example))
    loaded = plugins.load(["frob"], given={"frob": example})
    assert loaded.hooks("frob") == (hook,)
    if hook != "sevlab_register":
        assert loaded.call_one("frob", hook)
    Machine(given={"frob": example})


def test_every_slot_and_registry_is_documented():
    for name in builder.Slots.__slots__:
        assert f"`{name}(" in builder.Slots.__doc__
    facade = vars(builder.PluginBuilder(builder.Builder(config.MachineConfig()), "x", {}))
    for name in (name for name, value in facade.items() if isinstance(value, builder.Registrar)):
        assert f"builder.{name}" in GUIDE, name


def test_generated_pages_are_what_the_declarations_say():
    command = [sys.executable, str(ROOT / "docs/generate.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_readmes_example_runs(capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    exec(compile(code, "README.md", "exec", dont_inherit=True), {})
    printed = capsys.readouterr().out
    assert "Data(data=b" in printed
    assert "secret" not in printed


def test_the_glossary_spells_each_term_once():
    terms = re.findall(r"^\| ([^|]+?) \|", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)[2:]
    single = [term for row in terms for term in row.split(", ")]
    assert len(single) == len(set(single))
    assert {"GHCB", "C-bit", "VMSA", "RMP", "step", "outcome"} <= set(single)
