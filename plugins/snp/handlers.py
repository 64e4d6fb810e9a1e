"""What the plugin registers with a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.plugins.snp import records, registers, rmp_guest, rmp_host
from sevlab.plugins.snp.rmp_check import RmpCheck
from sevlab.plugins.snp.states import SnpState

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder


def register(builder: PluginBuilder) -> None:
    """Register SNP with a machine."""
    builder.component(SnpState())
    registers.register(builder)
    check = RmpCheck()
    builder.at_boot(check.attach)
    builder.slot("access_check", check)
    builder.steps.add(records.RmpUpdate, rmp_host.rmpupdate_step)
    builder.steps.add(records.Psmash, rmp_host.psmash_step)
    builder.steps.add(records.RmpRead, rmp_host.rmpread_step)
    builder.steps.add(records.Pvalidate, rmp_guest.pvalidate_step)
    builder.steps.add(records.RmpAdjust, rmp_guest.rmpadjust_step)
    builder.steps.add(records.RmpQuery, rmp_guest.rmpquery_step)
