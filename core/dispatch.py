"""Registries: what handles which exit code, MSR, CPUID leaf, port, mailbox command, ...

While a machine is composed, plugins add handlers under keys; `freeze` makes a plain dictionary of each registry, and
at run time nothing else is consulted. A key has one owner. Whoever wants to change what another plugin does replaces
that handler by name - in the open, and once, except over a replacement that it names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from sevlab.core.errors import PluginError

K = TypeVar("K")
H = TypeVar("H")

MAX_RANGE = 1 << 16
"""Keys of one `add_range`: a range is spelled out, so that look-up stays one dictionary access."""


class Entry(NamedTuple, Generic[H]):
    """Who handles a key, and who replaced whom."""

    handler: H
    plugin: str
    replaces: str = ""


class Registry(Generic[K, H]):
    """Handlers of one kind while the machine is composed.

    `what` is the kind in words ("exit", "MSR"); `show` prints a key in messages and listings.
    """

    __slots__ = ("_entries", "_replacements", "show", "what")

    def __init__(self, what: str, show: Callable[[K], str]) -> None:
        self.what = what
        self.show = show
        self._entries: dict[K, Entry[H]] = {}
        self._replacements: dict[K, list[tuple[Callable[[H], H], str, H | None]]] = {}

    def add(self, key: K, handler: H, *, plugin: str) -> None:
        """Let `handler` of `plugin` handle `key`. Raises `PluginError` if the key has an owner."""
        owner = self._entries.get(key)
        if owner is not None:
            raise PluginError(
                f"{self.what} {self.show(key)} is registered twice:"
                f" by plugin {owner.plugin!r} and by plugin {plugin!r};"
                " a plugin that means to change another's handler uses replace"
            )
        self._entries[key] = Entry(handler, plugin)

    def replace(
        self, key: K, make: Callable[[H], H], *, plugin: str, absent: H | None = None, over: tuple[str, ...] = ()
    ) -> None:
        """Put `make(original handler)` in the place of the handler of `key`, after all plugins have registered.

        With `absent` the key need not have an owner: `make` gets that instead. A replacement of a plugin that `over`
        names may stand already: `make` then gets that one. Raises `PluginError` at once if somebody else replaces it
        already, at `freeze` if nobody handles the key.
        """
        made = self._replacements.setdefault(key, [])
        if made and made[-1][1] not in over:
            raise PluginError(
                f"{self.what} {self.show(key)} is replaced twice: by plugin {made[-1][1]!r} and by plugin {plugin!r}"
            )
        made.append((make, plugin, absent))

    def entries(self) -> dict[K, Entry[H]]:
        """All keys with their final handler and owner. Raises `PluginError` for a replacement of nothing."""
        entries = dict(self._entries)
        made = ((key, *one) for key, all_made in self._replacements.items() for one in all_made)
        for key, make, plugin, absent in made:
            original = entries.get(key)
            if original is None and absent is not None:
                original = Entry(absent, plugin)
            if original is None:
                raise PluginError(f"plugin {plugin!r} replaces {self.what} {self.show(key)}, which nobody handles")
            entries[key] = Entry(make(original.handler), plugin, original.plugin)
        return entries

    def freeze(self) -> dict[K, H]:
        """The table that the machine uses."""
        return {key: entry.handler for key, entry in self.entries().items()}


class Registrar(Generic[K, H]):
    """One plugin's side of a registry: the same calls without the plugin's name."""

    __slots__ = ("_plugin", "_registry")

    def __init__(self, registry: Registry[K, H], plugin: str) -> None:
        self._registry = registry
        self._plugin = plugin

    def add(self, key: K, handler: H) -> None:
        """Handle `key`. Raises `PluginError` if the key has an owner."""
        self._registry.add(key, handler, plugin=self._plugin)

    def replace(self, key: K, make: Callable[[H], H], *, absent: H | None = None, over: tuple[str, ...] = ()) -> None:
        """Replace another plugin's handler of `key` by `make(original)`; the rest as in `Registry.replace`."""
        self._registry.replace(key, make, plugin=self._plugin, absent=absent, over=over)


def add_range(registrar: Registrar[int, H], first: int, last: int, handler: H) -> None:
    """Let `handler` handle every key from `first` to `last`, both included; at most 65536."""
    if not 0 <= last - first < MAX_RANGE:
        raise PluginError(f"range {first:#x} to {last:#x}: expected 1 to {MAX_RANGE} keys")
    for key in range(first, last + 1):
        registrar.add(key, handler)
