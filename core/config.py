"""Machine configuration: TOML at the edge, frozen values inside, errors that name file, key, value and legal values.

```toml
[machine]
generation = "milan"        # naples, rome, milan, genoa, turin
seed = 7                    # a number or a string
memory = "1 GiB"
plugins = ["sme"]
caches = false              # model stale cache lines

[[guest]]
name = "linux"
vcpus = 2
memory = "64 MiB"

[plugin.sme]
enabled = true
```
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sevlab.core.errors import ConfigError
from sevlab.core.generations import GENERATIONS, Generation
from sevlab.core.units import PAGE_BYTES

Scalar = int | bool | str

UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
MAX_MEMORY_BYTES = 1 << 52
MAX_GUESTS = 4096
MAX_VCPUS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An option that a plugin declares.

    `default` gives the type (bool, int or str); an int may have `low` and `high` (both legal), any may have `choices`.
    """

    name: str
    default: Scalar
    doc: str
    low: int | None = None
    high: int | None = None
    choices: tuple[Scalar, ...] = ()

    def check(self, value: object, where: str) -> Scalar:
        """`value` if it is legal. Raises `ConfigError` that names `where`, the value and the legal values."""
        kind = type(self.default)
        if type(value) is not kind:
            raise ConfigError(f"{where}: {value!r} is not {_KIND_WORDS[kind]}; expected {self.legal}")
        if self.choices and value not in self.choices:
            raise ConfigError(f"{where}: {value!r}: expected {self.legal}")
        if isinstance(value, int) and not isinstance(value, bool):
            low = value if self.low is None else self.low
            high = value if self.high is None else self.high
            if not low <= value <= high:
                raise ConfigError(f"{where}: {value!r}: expected {self.legal}")
        return value

    @property
    def legal(self) -> str:
        """The legal values in words."""
        if self.choices:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        if self.low is not None or self.high is not None:
            return f"a number from {self.low} to {self.high}"
        return _KIND_WORDS[type(self.default)]


_KIND_WORDS: Mapping[type, str] = {bool: "true or false", int: "a number", str: "a string"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestConfig:
    """One VM to create: `vcpus` 1 to 512, `memory_bytes` a multiple of 4096."""

    name: str = "guest"
    vcpus: int = 1
    memory_bytes: int = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineConfig:
    """Everything that a machine is made from; the same configuration gives the same machine, bit for bit."""

    generation: str = "milan"
    seed: bytes = b"\0"
    memory_bytes: int = 1 << 30
    caches: bool = False
    plugins: tuple[str, ...] = ("sme",)
    guests: tuple[GuestConfig, ...] = ()
    options: Mapping[str, Mapping[str, Scalar]] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        _one_of(self.generation, tuple(GENERATIONS), "machine.generation")
        _pages(self.memory_bytes, "machine.memory")
        if len(self.guests) > MAX_GUESTS:
            raise ConfigError(f"guest: {len(self.guests)} guests: expected at most {MAX_GUESTS}")
        for index, guest in enumerate(self.guests):
            where = f"guest[{index}]"
            _pages(guest.memory_bytes, f"{where}.memory")
            if not 1 <= guest.vcpus <= MAX_VCPUS:
                raise ConfigError(f"{where}.vcpus: {guest.vcpus}: expected a number from 1 to {MAX_VCPUS}")

    @property
    def part(self) -> Generation:
        """The facts of the generation."""
        return GENERATIONS[self.generation]


def _one_of(value: object, legal: Sequence[str], where: str) -> None:
    if value not in legal:
        raise ConfigError(f"{where}: {value!r}: expected one of {', '.join(legal)}")


def _pages(length_bytes: int, where: str) -> None:
    if not 0 < length_bytes <= MAX_MEMORY_BYTES or length_bytes % PAGE_BYTES:
        raise ConfigError(f"{where}: {length_bytes} bytes: expected a multiple of 4096 from 4096 to 2^52")


def parse_size(value: object, where: str) -> int:
    """A size in bytes from a number or a text like "64 MiB"."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,18})\s*([KMGT]?i?B)", value.strip())
        if match and match[2] in UNITS:
            return int(match[1]) * UNITS[match[2]]
    raise ConfigError(f"{where}: {value!r}: expected bytes as a number, or a text like '64 MiB' ({', '.join(UNITS)})")


def parse_seed(value: object, where: str = "machine.seed") -> bytes:
    """A seed from a number (its little-endian bytes) or a text (its UTF-8 bytes)."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value.to_bytes(max(1, -(-value.bit_length() // 8)), "little")
    raise ConfigError(f"{where}: {value!r}: expected a number from 0 or a string")


def load_config(path: str | Path) -> MachineConfig:
    """Read a configuration file.

    Raises `ConfigError`: for a syntax error with line and column, else with the dotted key, the value and the legal
    values; the file's name stands in front.
    """
    import tomllib

    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start:#x} is not UTF-8, which TOML is written in") from error
    try:
        return parse_config(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_config(document: Mapping[str, Any]) -> MachineConfig:
    """The configuration in a parsed document; plugin options are checked when the machine is composed."""
    _known(document, ("machine", "guest", "plugin"), "")
    machine = _table(document.get("machine", {}), "machine")
    _known(machine, ("generation", "seed", "memory", "caches", "plugins"), "machine.")
    values: dict[str, Any] = {}
    if "generation" in machine:
        values["generation"] = machine["generation"]
    if "seed" in machine:
        values["seed"] = parse_seed(machine["seed"])
    if "memory" in machine:
        values["memory_bytes"] = parse_size(machine["memory"], "machine.memory")
    if "caches" in machine:
        values["caches"] = Option(name="caches", default=False, doc="").check(machine["caches"], "machine.caches")
    if "plugins" in machine:
        names = machine["plugins"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"machine.plugins: {names!r}: expected a list of plugin names")
        values["plugins"] = tuple(names)
    guests = document.get("guest", [])
    if not isinstance(guests, list):
        raise ConfigError(f"guest: {guests!r:.60}: expected [[guest]] tables")
    values["guests"] = tuple(_guest(guest, f"guest[{index}]") for index, guest in enumerate(guests))
    options = {
        name: MappingProxyType(dict(_table(table, f"plugin.{name}")))
        for name, table in _table(document.get("plugin", {}), "plugin").items()
    }
    return MachineConfig(**values, options=MappingProxyType(options))


def _guest(value: object, where: str) -> GuestConfig:
    table = _table(value, where)
    _known(table, ("name", "vcpus", "memory"), f"{where}.")
    values: dict[str, Any] = {}
    if "name" in table:
        values["name"] = Option(name="name", default="", doc="").check(table["name"], f"{where}.name")
    if "vcpus" in table:
        vcpus = Option(name="vcpus", default=1, low=1, high=MAX_VCPUS, doc="")
        values["vcpus"] = vcpus.check(table["vcpus"], f"{where}.vcpus")
    if "memory" in table:
        values["memory_bytes"] = parse_size(table["memory"], f"{where}.memory")
    return GuestConfig(**values)


def _table(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {value!r:.60}: expected a table")
    return value


def _known(table: Mapping[str, Any], legal: Sequence[str], prefix: str) -> None:
    for key in table:
        if key not in legal:
            raise ConfigError(f"{prefix}{key}: unknown key; expected one of {', '.join(legal)}")
