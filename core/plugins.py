"""Find, load, order and check plugins.

A plugin is a module named by an entry point of the group `sevlab.plugins`; built-in features are entries like any
other. It says what it `REQUIRES` (names of plugins); loading adds the requirements and sorts, so that a plugin is
always registered after what it builds on. Everything that can be wrong with a plugin is said here, before a machine
exists: an unknown hook, wrong arguments, a missing requirement, a cycle, call-order options.

`SEVLAB_TRACE_PLUGINS=1` prints each hook call, who implements it and what came back, on standard error.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any, NamedTuple

import pluggy
from sevlab.core import hookspecs
from sevlab.core.errors import PluginError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "sevlab.plugins"
COMMANDS_GROUP = "sevlab.commands"
"""Modules that implement the hook `sevlab_commands`: cheap to import, since every command line loads them all."""


class PluginInfo(NamedTuple):
    """A loaded plugin: its name, its module (or object), where it came from, what it needs."""

    name: str
    module: Any
    distribution: str
    version: str
    requires: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The first line of the plugin's documentation."""
        return (self.module.__doc__ or "").strip().partition("\n")[0]


def installed(group: str = GROUP) -> dict[str, EntryPoint]:
    """All plugins of an entry-point group, by name; none is imported. Raises `PluginError` when two share a name."""
    from importlib import metadata  # 20 ms that only loading needs

    found: dict[str, EntryPoint] = {}
    for entry in metadata.entry_points(group=group):
        other = found.get(entry.name)
        if other is not None and other.value != entry.value:
            raise PluginError(
                f"two installed plugins are called {entry.name!r}: {other.value} ({_origin(other)[0]})"
                f" and {entry.value} ({_origin(entry)[0]})"
            )
        found[entry.name] = entry
    return found


def _origin(entry: EntryPoint) -> tuple[str, str]:
    return (entry.dist.name, entry.dist.version) if entry.dist is not None else ("unknown", "")


class PluginSet:
    """Loaded plugins in dependency order, with their hooks."""

    def __init__(self, plugins: Iterable[PluginInfo]) -> None:
        self.plugins = tuple(plugins)
        self._manager = pluggy.PluginManager("sevlab")
        self._manager.add_hookspecs(hookspecs)
        for plugin in reversed(self.plugins):  # pluggy calls the last registered first
            self._register(plugin)
        if os.environ.get("SEVLAB_TRACE_PLUGINS") == "1":
            self._manager.add_hookcall_monitoring(_trace_before, _trace_after)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in dependency order."""
        return tuple(plugin.name for plugin in self.plugins)

    def hooks(self, name: str) -> tuple[str, ...]:
        """The hooks that plugin `name` implements."""
        plugin = next(plugin for plugin in self.plugins if plugin.name == name)
        return tuple(sorted(caller.name for caller in self._manager.get_hookcallers(plugin.module) or ()))

    def call(self, hook: str, **arguments: Any) -> dict[str, Any]:
        """Call `hook` of each plugin that implements it, in dependency order; the results by plugin name."""
        return {
            plugin.name: self.call_one(plugin.name, hook, **arguments)
            for plugin in self.plugins
            if hook in self.hooks(plugin.name)
        }

    def call_one(self, name: str, hook: str, **arguments: Any) -> Any:
        """Call `hook` of plugin `name` alone, so that what it registers bears its name; None if it has none."""
        others = [plugin.module for plugin in self.plugins if plugin.name != name]
        results = self._manager.subset_hook_caller(hook, others)(**arguments)
        return results[0] if results else None

    def _register(self, plugin: PluginInfo) -> None:
        try:
            self._manager.register(plugin.module, plugin.name)
        except pluggy.PluginValidationError as error:
            raise PluginError(f"plugin {plugin.name!r}: {str(error).partition(chr(10))[2] or error}") from error
        for caller in self._manager.get_hookcallers(plugin.module) or ():
            if caller.spec is None:
                legal = [name for name in vars(hookspecs) if name.startswith("sevlab_")]
                near = difflib.get_close_matches(caller.name, legal, 1)
                hint = f"; did you mean {near[0]}?" if near else f"; the hooks are {', '.join(legal)}"
                raise PluginError(f"plugin {plugin.name!r}: unknown hook {caller.name!r}{hint}")
            for implementation in caller.get_hookimpls():
                if implementation.plugin is plugin.module and (
                    implementation.tryfirst
                    or implementation.trylast
                    or implementation.hookwrapper
                    or implementation.wrapper
                ):
                    raise PluginError(
                        f"plugin {plugin.name!r}: {caller.name} uses tryfirst, trylast or a wrapper;"
                        " order comes from REQUIRES alone"
                    )


def _trace_before(name: str, implementations: Iterable[Any], arguments: Mapping[str, Any]) -> None:
    who = ", ".join(implementation.plugin_name for implementation in implementations)
    print(f"sevlab plugins: {name}({', '.join(arguments)}) -> {who or 'nobody'}", file=sys.stderr)


def _trace_after(outcome: Any, name: str, _implementations: Any, _arguments: Any) -> None:
    result = outcome.exception if outcome.exception is not None else outcome.get_result()
    print(f"sevlab plugins: {name} = {result!r}", file=sys.stderr)


def load(names: Iterable[str], *, given: Mapping[str, Any] | None = None, group: str = GROUP) -> PluginSet:
    """Load the plugins `names` and what they require.

    `given` maps names to modules or objects that take part without being installed; requirements are those of
    features and mean nothing in another `group`. Raises `PluginError` that names the plugin: not installed, fails to
    import, requires something unknown, or is part of a cycle.
    """
    given = given or {}
    entries = installed(group)
    found: dict[str, PluginInfo] = {}
    wanted = [(name, "") for name in names]
    while wanted:
        name, needed_by = wanted.pop()
        if name not in found:
            plugin = _load_one(name, needed_by, entries, given)
            found[name] = plugin if group == GROUP else plugin._replace(requires=())
            wanted += [(requirement, name) for requirement in found[name].requires]
    return PluginSet(found[name] for name in _sorted(found))


def load_all(*, given: Mapping[str, Any] | None = None, group: str = GROUP) -> PluginSet:
    """Load every installed plugin of a group, for listings and the command line."""
    return load([*installed(group), *(given or {})], given=given, group=group)


def _load_one(name: str, needed_by: str, entries: Mapping[str, EntryPoint], given: Mapping[str, Any]) -> PluginInfo:
    if name in given:
        module, distribution, version = given[name], "given", ""
    else:
        entry = entries.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, [*entries, *given], 1)
            reason = f", which plugin {needed_by!r} requires" if needed_by else ""
            hint = f"did you mean {near[0]!r}?" if near else f"installed are {', '.join(sorted(entries))}"
            raise PluginError(f"no plugin {name!r} is installed{reason}; {hint}")
        try:
            module = entry.load()
        except Exception as error:
            raise PluginError(f"plugin {name!r} ({entry.value}) fails to import: {error!r}") from error
        distribution, version = _origin(entry)
    requires = getattr(module, "REQUIRES", ())
    if not isinstance(requires, tuple) or not all(isinstance(requirement, str) for requirement in requires):
        raise PluginError(f"plugin {name!r}: REQUIRES is {requires!r}, expected a tuple of plugin names")
    return PluginInfo(name, module, distribution, version, requires)


def _sorted(found: Mapping[str, PluginInfo]) -> tuple[str, ...]:
    sorter = TopologicalSorter({name: sorted(found[name].requires) for name in sorted(found)})
    try:
        return tuple(sorter.static_order())
    except CycleError as error:
        raise PluginError(f"plugins require each other in a circle: {' -> '.join(error.args[1])}") from error
