"""I/O emulation: instruction decode, ports and windows, intercepts, event injection, and a board of PC devices.

Documents: 24593 (APM volume 2) revision 3.42, chapters 13, 15, 16; 24594 (APM volume 3) revision 3.36, instruction
pages; the chips' datasheets, each in its module of `devices`.

What you may touch: `decode` and `execute` (instructions), `port_in`, `port_out`, `mmio_read`, `mmio_write` (devices by
address), `devices` (the board of a VM), `acpi_tables` (what a kernel is told of it), `inject_exception` and friends,
and the data: `MATRIX` (which instruction form who can serve), `EVENTS` (which intercept in which mode).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sevlab.core.cliapi import Capability, DemoChapter
from sevlab.core.hookspecs import hookimpl
from sevlab.plugins.io import exits, interrupts, msrs, steps, system_msrs
from sevlab.plugins.io.bus import mmio_read, mmio_write, port_in, port_out, port_out_string
from sevlab.plugins.io.coverage import MATRIX, Form, form_of, refusal
from sevlab.plugins.io.decode import Insn, Undecodable, decode, effective_address
from sevlab.plugins.io.devices import acpi, board
from sevlab.plugins.io.devices.acpi import acpi_tables
from sevlab.plugins.io.devices.board import Devices, devices, next_event
from sevlab.plugins.io.devices.fw_cfg import DmaDescriptor
from sevlab.plugins.io.devices.pic import INITIALISATION
from sevlab.plugins.io.emulate import Executed, Unsupported, execute
from sevlab.plugins.io.execution import Bus, write_register
from sevlab.plugins.io.feasibility import EVENTS, Way, way
from sevlab.plugins.io.fuzzing import PAYLOADS, TARGETS
from sevlab.plugins.io.injection import inject_exception, inject_software, reinjection
from sevlab.plugins.io.interrupts import nmi_complete, wake
from sevlab.plugins.io.layout import EventWord, IoioInfo, ioio_word
from sevlab.plugins.io.modes import Mode, mode_of
from sevlab.plugins.io.records import InterruptLine, MmioAccessed, PortAccessed, SerialInput, Unserved

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.layout import Layout
    from sevlab.core.oracle import Target
    from sevlab.core.payload import Payload
    from sevlab.core.statemachine import StateMachine

REQUIRES: tuple[str, ...] = ()

__all__ = [
    "EVENTS",
    "MATRIX",
    "Bus",
    "Devices",
    "EventWord",
    "Executed",
    "Form",
    "Insn",
    "InterruptLine",
    "IoioInfo",
    "MmioAccessed",
    "Mode",
    "PortAccessed",
    "SerialInput",
    "Undecodable",
    "Unserved",
    "Unsupported",
    "Way",
    "acpi_tables",
    "decode",
    "devices",
    "effective_address",
    "execute",
    "form_of",
    "inject_exception",
    "inject_software",
    "ioio_word",
    "mmio_read",
    "mmio_write",
    "mode_of",
    "next_event",
    "nmi_complete",
    "port_in",
    "port_out",
    "port_out_string",
    "refusal",
    "reinjection",
    "wake",
    "way",
    "write_register",
]


@hookimpl
def sevlab_register(builder: PluginBuilder) -> None:
    state = board.IoState()
    builder.component(state)
    exits.register(builder)
    interrupts.register(builder, state.vms)
    msrs.register(builder)
    system_msrs.register(builder)
    steps.register(builder)
    board.register(builder)


@hookimpl
def sevlab_records() -> tuple[type, ...]:
    return (PortAccessed, MmioAccessed, Unserved, InterruptLine, SerialInput)


@hookimpl
def sevlab_layouts() -> tuple[type[Layout], ...]:
    return (IoioInfo, EventWord, DmaDescriptor, *acpi.LAYOUTS)


@hookimpl
def sevlab_state_machines() -> tuple[StateMachine[Any, Any, Any], ...]:
    return (INITIALISATION,)


@hookimpl
def sevlab_payloads() -> tuple[Payload, ...]:
    return PAYLOADS


@hookimpl
def sevlab_targets() -> tuple[Target, ...]:
    return TARGETS


@hookimpl
def sevlab_demo_chapters() -> tuple[DemoChapter, ...]:
    return (
        DemoChapter(
            "io",
            "I/O: a guest talks to its devices, and which of it survives encryption",
            20,
            "sevlab.plugins.io.demo:chapter",
        ),
    )


@hookimpl
def sevlab_capabilities() -> tuple[Capability, ...]:
    return (Capability("instruction decode", "emulating MMIO", _decodes),)


def _decodes() -> str:
    insn = decode(b"\x88\x07", 64)
    if not isinstance(insn, Insn) or insn.mnemonic != "mov":
        raise ValueError(f"88 07 decodes to {insn}")
    return "mov [rdi],al decodes"
