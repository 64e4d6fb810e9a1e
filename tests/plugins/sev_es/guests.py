"""Machines with encrypted guests, for the tests of this folder and of the conversation."""

from __future__ import annotations

from sevlab.core.config import GuestConfig
from sevlab.core.testing import make_machine
from sevlab.plugins.sev import Policy, launch_guest
from sevlab.plugins.sev_es import Ghcb, initial_vmsa, set_up_vcpus

GHCB_GPA = 0x5000
ALL = ("io", "sme", "sev", "sev_es")


def encrypted_machine(*more, vcpus=1, plugins=ALL, memory_bytes=1 << 20, given=None, **options):
    """A machine with one SEV-ES guest that runs, launched by the whole command sequence; marked for `reset`."""
    machine = make_machine(
        *plugins,
        *more,
        guests=(GuestConfig(memory_bytes=memory_bytes, vcpus=vcpus),),
        options={"sev_es": options},
        given=given,
    )
    launch_guest(machine, 0, policy=Policy.ES, vmsas=[initial_vmsa(vcpu_signature=0xA0_0F11)] * vcpus)
    set_up_vcpus(machine, 0)
    for vcpu in machine.vcpus.values():
        machine.hypervisor.enter(machine, vcpu)
    machine._records.clear()
    machine.mark()
    return machine


def page(code, info_1=0, info_2=0, *, version=2, usage=0, **fields):
    """A GHCB page with these fields marked valid."""
    return Ghcb.build(
        sw_exit_code=code,
        sw_exit_info_1=info_1,
        sw_exit_info_2=info_2,
        protocol_version=version,
        ghcb_usage=usage,
        **fields,
    )
