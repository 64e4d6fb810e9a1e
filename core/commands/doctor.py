"""`sevlab doctor`: what is installed, and does it work."""

from __future__ import annotations

import platform
import shutil
import sys
from importlib import metadata
from typing import NamedTuple

import click
from sevlab.core import plugins
from sevlab.core.cli import echo_json
from sevlab.core.cliapi import Capability
from sevlab.core.crypto import aes_xts


class Diagnosis(NamedTuple):
    """One line of the report; `state` is present, "not installed" or failed."""

    name: str
    state: str
    detail: str
    needed_for: str
    required: bool


def _python() -> str:
    return f"{platform.python_version()} {platform.machine()} {sys.platform}"


def _cipher() -> str:
    """Encrypt for real. Source: IEEE 1619-2007, annex B, XTS-AES-128 vector 2."""
    expected = "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0"
    found = aes_xts(b"\x11" * 16 + b"\x22" * 16, (0x3333333333).to_bytes(16, "little"), b"\x44" * 32).hex()
    if found != expected:
        raise ValueError(f"AES-XTS gives {found}, expected {expected}")
    return f"cryptography {metadata.version('cryptography')}, AES-XTS vector passes"


def _import(name: str, distribution: str = "") -> str:
    __import__(name)
    return metadata.version(distribution or name)


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ImportError(f"{name} is not installed")
    return path


KERNEL_CAPABILITIES = (
    Capability("python", "everything", _python, required=True),
    Capability("aes-xts", "memory encryption", _cipher, required=True),
    Capability("msgpack", "records", lambda: _import("msgpack"), required=True),
    Capability("pluggy", "plugins", lambda: _import("pluggy"), required=True),
    Capability("iced-x86", "instruction decode", lambda: _import("iced_x86", "iced-x86"), required=True),
    Capability("atheris", "coverage-guided fuzzing (extra: fuzz)", lambda: _import("atheris")),
    Capability("unicorn", "running real guests (extra: emu)", lambda: _import("unicorn")),
    Capability("plotly", "assess --html (extra: report)", lambda: _import("plotly")),
    Capability("trace-cmd", "import of trace.dat", lambda: _tool("trace-cmd")),
)


def examine(capability: Capability) -> Diagnosis:
    """Try one capability for real."""
    try:
        state, detail = "present", capability.check()
    except ImportError as error:
        state, detail = "not installed", str(error)
    except Exception as error:  # noqa: BLE001  # whatever is wrong with it is the answer
        state, detail = "failed", f"{type(error).__name__}: {error}"
    return Diagnosis(capability.name, state, detail, capability.needed_for, capability.required)


def report() -> list[Diagnosis]:
    """Examine what the kernel and every installed plugin name."""
    loaded = plugins.load_all()
    capabilities = list(KERNEL_CAPABILITIES)
    for brought in loaded.call("sevlab_capabilities").values():
        capabilities += brought
    rows = [examine(capability) for capability in capabilities]
    rows += [
        Diagnosis(
            f"plugin {plugin.name}", "present", f"{plugin.distribution} {plugin.version}".strip(), plugin.summary, False
        )
        for plugin in loaded.plugins
    ]
    return rows


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of the table.")
def doctor(*, as_json: bool) -> None:
    """Check what is installed and works; exit code 1 when something required does not."""
    rows = report()
    if as_json:
        echo_json({"sevlab": metadata.version("sevlab"), "capabilities": [row._asdict() for row in rows]})
    else:
        width = max(len(row.name) for row in rows)
        for row in rows:
            mark = {"present": "ok  ", "not installed": "-   "}.get(row.state, "FAIL")
            click.echo(f"{mark} {row.name:<{width}}  {row.detail}")
            if row.state != "present":
                click.echo(f"     {'':<{width}} needed for {row.needed_for}")
    if any(row.required and row.state != "present" for row in rows):
        sys.exit(1)
