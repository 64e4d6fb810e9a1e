"""Real guests: CPU engines that execute unmodified x86-64 code as plain, SEV and SEV-ES guests of the machine.

Documents: 24593 (APM volume 2) revision 3.42; Linux Documentation/arch/x86/boot.rst for the loaders.

What you may touch: `boot` (load a guest, launch it through the ASP, get its `Execution`), `Execution` (run it, look at
it), `GuestImage` (what to launch: pages and registers). An engine of your own implements `core.cpu.CpuEngine`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sevlab.core.cliapi import Capability
from sevlab.core.config import Option
from sevlab.core.hookspecs import hookimpl
from sevlab.plugins.engines import cpuid, msrs
from sevlab.plugins.engines.execution import Ended, Execution
from sevlab.plugins.engines.launch import Booted, Feature, Paging, boot, compose
from sevlab.plugins.engines.loaders.image import GuestImage
from sevlab.plugins.engines.records import Idle, idle
from sevlab.plugins.engines.symbols import Symbols, read_symbols

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder

REQUIRES: tuple[str, ...] = ("sme", "sev", "sev_es", "io")

__all__ = [
    "Booted",
    "Ended",
    "Execution",
    "Feature",
    "GuestImage",
    "Paging",
    "Symbols",
    "boot",
    "compose",
    "read_symbols",
]


@hookimpl
def sevlab_options() -> tuple[Option, ...]:
    return (Option(name="x2apic", default=False, doc="the guest's processor has an x2APIC"),)


@hookimpl
def sevlab_register(builder: PluginBuilder) -> None:
    cpuid.register(builder, physical_bits=min(48, builder.config.part.physical_bits))
    msrs.register(builder)
    builder.steps.add(Idle, idle)


@hookimpl
def sevlab_records() -> tuple[type, ...]:
    return (Idle,)


@hookimpl
def sevlab_capabilities() -> tuple[Capability, ...]:
    return (Capability("engine unicorn", "sevlab run", _engine),)


def _engine() -> str:
    from importlib import import_module

    from sevlab.plugins.engines.unicorn_state import VERSION, Window

    unicorn: Any = import_module("unicorn")

    if unicorn.__version__ != VERSION:
        raise ValueError(f"version {unicorn.__version__}, expected {VERSION}")
    Window(unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64))
    return f"unicorn {VERSION}, processor state as expected"
