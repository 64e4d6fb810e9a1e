"""Which modules are behaviour: what atheris instruments, and whose lines `sevlab fuzz cover` counts."""

from __future__ import annotations

import re
import sys

from sevlab.core.plugins import PluginSet

HANDLERS = ("sevlab.core.steps", "sevlab.core.asp", "sevlab.core.hypervisor", "sevlab.core.cpu", "sevlab.core.delivery")
"""The kernel's own behaviour."""

LEFT_ALONE = re.compile(
    r"\.plugins\.oracles\b|\.(commands|demo|fuzzing|oracles|targets|layout|buffers|numbers|command)$"
)
"""Modules of plugins without behaviour of their own: what judges and what declares."""


def handler_modules(plugins: PluginSet) -> tuple[str, ...]:
    """The modules whose functions are instrumented for a set of plugins."""
    packages = tuple(plugin.module.__name__ for plugin in plugins.plugins)
    found = [
        name
        for name in sys.modules
        if any(name == package or name.startswith(package + ".") for package in packages)
        and not LEFT_ALONE.search(name)
    ]
    return (*HANDLERS, *sorted(found))
