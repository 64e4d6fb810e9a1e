"""Composing the plugin: its options, its state, and everything it registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.config import Option
from sevlab.core.state import StateDict
from sevlab.plugins.sev import command, host, mailbox
from sevlab.plugins.sev.context import Ccx, SevState, sev_state
from sevlab.plugins.sev.driver import Driver
from sevlab.plugins.sev.identity import CHIP_KEY_BYTES
from sevlab.plugins.sev.legacy import LEGACY, LEGACY_COMMANDS

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.machine import Machine

OPTIONS = (
    Option(
        name="min_asid",
        default=0,
        low=0,
        high=1007,
        doc="least ASID of a guest without SEV-ES (CPUID Fn8000_001F EDX); 0: as firmware usually sets it",
    ),
    Option(name="ccxs", default=2, low=1, high=32, doc="core complexes"),
    Option(name="cores_per_ccx", default=4, low=1, high=32, doc="cores of each complex; APIC ids count them"),
    Option(name="sockets", default=1, low=1, high=2, doc="chips with an identity of their own"),
)

FEW_ASIDS = 15
USUAL_MIN_ASID, MIN_ASID_OF_FEW = 100, 5
"""SEV-ES guests are usually given 99 ASIDs, and 4 where there are only 15. Source: public boot logs. UNVERIFIED."""


def register(builder: PluginBuilder) -> None:
    """Register SEV with a machine."""
    options = {name: int(value) for name, value in builder.options.items()}
    part = builder.config.part
    usual = MIN_ASID_OF_FEW if part.max_asid <= FEW_ASIDS else USUAL_MIN_ASID
    min_asid = options["min_asid"] or usual
    sev = SevState(
        cores_per_ccx=options["cores_per_ccx"],
        max_asid=part.max_asid,
        min_asid=min_asid,
        ccxs=StateDict({number: Ccx() for number in range(options["ccxs"])}),
    )
    builder.component(sev)
    builder.component(Driver(), "sev.driver")
    mailbox.register(builder)
    command.register(builder, LEGACY, LEGACY_COMMANDS)
    host.register(builder, max_asid=part.max_asid, min_asid=min_asid)

    def fuse(machine: Machine) -> None:
        """The chip's secrets, made with the chip."""
        state = sev_state(machine)
        state.chip_key = machine.entropy.take("sev.chip", CHIP_KEY_BYTES)
        if options["sockets"] > 1:
            state.second_chip_key = machine.entropy.take("sev.second-chip", CHIP_KEY_BYTES)

    builder.at_boot(fuse)
