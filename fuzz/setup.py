"""How a campaign's targets are made up: plugins that are not installed, and options of plugins.

A campaign keeps both as they were given, so that every later command builds the same machines.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import Any, NamedTuple

from sevlab.core.config import Scalar
from sevlab.core.errors import ConfigError
from sevlab.core.oracle import Target
from sevlab.core.plugins import PluginSet, load, load_all
from sevlab.fuzz.runner import Runner
from sevlab.fuzz.store import Store
from sevlab.fuzz.targets import target_named


class Setup(NamedTuple):
    """`given`: plugins as `NAME=MODULE`; `settings`: options as `PLUGIN.OPTION=VALUE`, whose plugins take part."""

    given: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    @classmethod
    def of(cls, store: Store) -> Setup:
        """What a campaign was started with."""
        return cls(tuple(store.meta("given") or ()), tuple(store.meta("settings") or ()))

    def keep(self, store: Store) -> None:
        """Write it into the campaign."""
        store.set_meta("given", list(self.given))
        store.set_meta("settings", list(self.settings))

    @property
    def words(self) -> str:
        """As on the command line."""
        items = (*(f"--given {item}" for item in self.given), *(f"--set {item}" for item in self.settings))
        return " ".join(items) or "no other plugins and options"

    @property
    def modules(self) -> dict[str, Any]:
        """The plugins that are given, by name. Raises `ConfigError` for one that cannot be imported."""
        found = {}
        for item in self.given:
            name, equals, module = item.partition("=")
            if not (name and equals and module):
                raise ConfigError(f"--given {item!r}: expected NAME=MODULE")
            try:
                found[name] = importlib.import_module(module)
            except ImportError as error:
                raise ConfigError(f"--given {item!r}: {error}") from error
        return found

    @property
    def options(self) -> dict[str, dict[str, Scalar]]:
        """The options by plugin. Raises `ConfigError` for a setting of another form."""
        found: dict[str, dict[str, Scalar]] = {}
        for item in self.settings:
            name, equals, value = item.partition("=")
            plugin, dot, option = name.rpartition(".")
            if not (equals and dot and plugin and option):
                raise ConfigError(f"--set {item!r}: expected PLUGIN.OPTION=VALUE")
            found.setdefault(plugin, {})[option] = scalar(value)
        return found

    def target(self, name: str) -> Target:
        """A target with all of this. Raises `CampaignError` for an unknown one."""
        modules = self.modules
        target = target_named(name, load_all(given=modules))
        options = {plugin: dict(values) for plugin, values in target.options.items()}
        for plugin, values in self.options.items():
            options.setdefault(plugin, {}).update(values)
        return target._replace(
            plugins=tuple(dict.fromkeys((*target.plugins, *self.options))),
            options=MappingProxyType({plugin: MappingProxyType(values) for plugin, values in options.items()}),
        )

    def without_faults(self) -> Setup:
        """The same without what is given and without plugins that plant faults: what to compare a finding with."""
        planting = {name for name, canaries in load_all().call("sevlab_canaries").items() if canaries}
        return Setup(settings=tuple(item for item in self.settings if item.partition(".")[0] not in planting))

    def plugins(self, name: str) -> PluginSet:
        """What a target is composed of, as far as it declares it."""
        modules = self.modules
        return load([*self.target(name).plugins, *modules], given=modules)

    def runner(self, name: str, *, seed: int = 0) -> Runner:
        """A target, ready to run."""
        return Runner(self.target(name), given=self.modules, seed=seed)


NOTHING = Setup()
"""The targets as they are installed."""


def scalar(text: str) -> Scalar:
    """The value of an option as TOML has it: a number, true or false, a string; other text is a string as it is."""
    import tomllib

    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, (bool, int, str)) else text
