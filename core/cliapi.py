"""What a plugin says to the command line: commands, demo chapters, capabilities - as data, imported when used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple


class CommandSpec(NamedTuple):
    """A command `sevlab NAME` (or `sevlab GROUP NAME`); `target` is `module:attribute` of a click command."""

    name: str
    summary: str
    target: str
    group: str = ""


class DemoChapter(NamedTuple):
    """A chapter of `sevlab demo`: lower `order` first; `target` is `module:function`, called with a `print` function.

    A chapter takes seconds, needs no network, and is deterministic.
    """

    name: str
    title: str
    order: int
    target: str


class Capability(NamedTuple):
    """Something `sevlab doctor` looks for: `check` returns a version or detail, or raises with the reason.

    `ImportError` means not installed, any other exception means present but broken. `needed_for` says what is missing
    without it; a `required` one that is missing makes `doctor` exit with 1.
    """

    name: str
    needed_for: str
    check: Callable[[], str]
    required: bool = False


def read_input(path: Path) -> bytes:
    """The bytes of a file that a command was given; `-` is the standard input."""
    return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()


def resolve(target: str) -> Any:
    """The object named `module:attribute`."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)
