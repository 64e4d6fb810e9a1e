"""Composing the plugin: its options, its state, and everything it registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.config import Option
from sevlab.core.svm import ExitCode
from sevlab.plugins.sev import LENDER, register_commands, sev_state
from sevlab.plugins.sev_es import HvFeature, sev_es_state
from sevlab.plugins.snp import (
    ghcb_events,
    guest_agent,
    guest_cpuid,
    guest_hv,
    legacy_rules,
    records,
    registers,
    rmp_guest,
    rmp_host,
    svsm,
    vmrun,
    vtom,
)
from sevlab.plugins.snp.command_table import SNP, SNP_COMMANDS
from sevlab.plugins.snp.driver import PageLender, SnpDriver
from sevlab.plugins.snp.hypervisor import SnpHypervisor, snp_hypervisor
from sevlab.plugins.snp.rmp_check import RmpCheck
from sevlab.plugins.snp.states import SnpState, snp_state
from sevlab.plugins.snp.tcb import Tcb

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.machine import Machine

OPTIONS = (
    Option(
        name="report_version",
        default=0,
        choices=(0, 2, 3, 4, 5),
        doc="version of attestation reports, and with it how new the firmware is; 0: 3, on Turin 5",
    ),
    Option(
        name="psc_batch", default=0, low=0, high=253, doc="entries of a page state change that one exit does; 0: all"
    ),
    Option(
        name="mitigations",
        default=0,
        low=0,
        high=(1 << 64) - 1,
        doc="mitigation bits that firmware of report version 5 supports",
    ),
    Option(name="smt", default=True, doc="simultaneous multithreading is on"),
)

CURRENT_LEVELS = {
    "milan": Tcb(bootloader=4, tee=0, snp=24, microcode=219),
    "genoa": Tcb(bootloader=10, tee=0, snp=23, microcode=84),
    "turin": Tcb(bootloader=1, tee=1, snp=4, microcode=75, fmc=1),
}
"""Patch levels of the modelled firmware; the numbers are of the size that published reports have."""


def register(builder: PluginBuilder) -> None:
    """Register SNP with a machine."""
    part, options = builder.config.part, builder.options
    state = SnpState()
    builder.component(state)
    vtom.register(builder, state)
    builder.component(SnpDriver(), "snp.driver")
    builder.component(PageLender(), LENDER)
    registers.register(builder)
    register_commands(builder, SNP, SNP_COMMANDS)
    legacy_rules.register(builder)
    builder.component(SnpHypervisor(), "snp.hypervisor")
    ghcb_events.register(builder)
    vmrun.register(builder)
    guest_agent.register(builder)
    guest_hv.register(builder)
    builder.vc_handlers.replace(ExitCode.CPUID, guest_cpuid.make_cpuid)
    svsm.register(builder)
    check = RmpCheck()
    builder.at_boot(check.attach)
    builder.slot("access_check", check.check)
    builder.steps.add(records.RmpUpdate, rmp_host.rmpupdate_step)
    builder.steps.add(records.Psmash, rmp_host.psmash_step)
    builder.steps.add(records.RmpRead, rmp_host.rmpread_step)
    builder.steps.add(records.Pvalidate, rmp_guest.pvalidate_step)
    builder.steps.add(records.RmpAdjust, rmp_guest.rmpadjust_step)
    builder.steps.add(records.RmpQuery, rmp_guest.rmpquery_step)

    def load_firmware(machine: Machine) -> None:
        """The firmware that runs is committed, and reports say so."""
        platform, sev = snp_state(machine).platform, sev_state(machine)
        level = CURRENT_LEVELS.get(part.name, CURRENT_LEVELS["milan"]).raw()
        platform.current_tcb = platform.committed_tcb = platform.reported_tcb = level
        platform.committed_version = (sev.api_major, sev.api_minor, sev.build)
        platform.report_version = int(options["report_version"]) or (5 if part.name == "turin" else 3)
        platform.mitigations_supported = int(options["mitigations"])
        platform.smt = bool(options["smt"])
        snp_hypervisor(machine).psc_batch = int(options["psc_batch"])
        sev_es_state(machine).features |= HvFeature.SNP  # whoever runs SNP guests offers it

    builder.at_boot(load_firmware)
