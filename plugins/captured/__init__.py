"""Captured guests: exits that another hypervisor's log shows, served by the model with what the log knows.

A log does not show registers and memory, only what crossed the boundary. This plugin takes `GuestExit` steps, fills in
the registers that an instruction's bytes and the log's data determine, lets the handlers of `io` serve the exit, and
takes from the step what no model can know: the captured processor's CPUID and MSRs, data of devices outside the
board, interrupts. What was taken is said by `Supplied`; everything else is computed.

Documents: 24593 (APM volume 2) revision 3.42, 15.7 to 15.25; how KVM and Xen behave is cited where it matters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.cliapi import DemoChapter
from sevlab.core.hookspecs import hookimpl
from sevlab.core.porting import Porting
from sevlab.plugins.captured import exits, faults, learned, steps
from sevlab.plugins.captured.porting import JUDGES
from sevlab.plugins.captured.records import (
    ApicAccessed,
    Decoded,
    InterruptCommand,
    InterruptEnded,
    PicAcknowledged,
)
from sevlab.plugins.captured.state import Captured

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder

REQUIRES: tuple[str, ...] = ("io",)

__all__ = ["ApicAccessed", "Decoded", "InterruptCommand", "InterruptEnded", "PicAcknowledged"]


@hookimpl
def sevlab_register(builder: PluginBuilder) -> None:
    builder.component(Captured())
    steps.register(builder)
    exits.register(builder)
    faults.register(builder)
    learned.register(builder)


@hookimpl
def sevlab_demo_chapters() -> tuple[DemoChapter, ...]:
    return (
        DemoChapter(
            "captured",
            "A captured boot: imported, replayed, and assessed for SEV-ES",
            1,
            "sevlab.traces.demo:chapter",
        ),
    )


@hookimpl
def sevlab_porting() -> tuple[Porting, ...]:
    return tuple(Porting(feature, judge) for feature, judge in JUDGES.items())


@hookimpl
def sevlab_records() -> tuple[type, ...]:
    return (Decoded, ApicAccessed, InterruptEnded, PicAcknowledged, InterruptCommand)
