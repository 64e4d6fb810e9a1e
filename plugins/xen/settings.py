"""Options of the plugin, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from sevlab.core.config import Option

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sevlab.core.config import Scalar

XEN_MAJOR, XEN_MINOR = 4, 17
"""The version that guests are told, that of the capture in tests/data."""


class AltAbi(Enum):
    """What bit 30 of a hypercall number selects. Both series claim CPUID leaf 4 EAX bit 7, so a host offers one."""

    NONE = "none"
    PHYSICAL = "physical"
    FAST = "fast"


class Start(Enum):
    """How the domain builder leaves the first vCPU."""

    RESET = "reset"
    PROTECTED = "protected"
    LONG = "long"


OPTIONS = (
    Option(
        name="abi",
        default="none",
        doc="the ABI beside the legacy one that bit 30 of a number selects",
        choices=tuple(abi.value for abi in AltAbi),
    ),
    Option(name="viridian", default=False, doc="Hyper-V leaves and hypercalls"),
    Option(name="control_domain", default=False, doc="the first guest is domain 0 and may do everything"),
    Option(
        name="start",
        default="reset",
        doc="first vCPU of each guest: as after reset, 32-bit flat, or 64-bit with identity page tables",
        choices=tuple(start.value for start in Start),
    ),
    Option(
        name="preempt_after",
        default=64,
        doc="pieces of work after which a hypercall is preempted",
        low=2,
        high=1 << 20,
    ),
    Option(
        name="adapt",
        default=False,
        doc="treat an encrypted guest as if its kernel had been adapted: buffers, hypercall page; each time is told",
    ),
    Option(
        name="debug_build",
        default=False,
        doc="poison argument registers and used multicall entries; console_io for everybody",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options, typed."""

    alt_abi: AltAbi = AltAbi.NONE
    viridian: bool = False
    control_domain: bool = False
    start: Start = Start.RESET
    preempt_after: int = 64
    debug_build: bool = False
    adapt: bool = False


def settings_of(options: Mapping[str, Scalar]) -> Settings:
    """The settings that a configuration asks for."""
    return Settings(
        alt_abi=AltAbi(options["abi"]),
        viridian=bool(options["viridian"]),
        control_domain=bool(options["control_domain"]),
        start=Start(options["start"]),
        preempt_after=int(options["preempt_after"]),
        debug_build=bool(options["debug_build"]),
        adapt=bool(options["adapt"]),
    )
