"""A guest under SEV-ES in which a plain guest's exit is executed: what takes its place is seen, not guessed."""

from __future__ import annotations

from sevlab.core.config import GuestConfig, MachineConfig
from sevlab.core.events import Schedule
from sevlab.core.machine import Machine
from sevlab.core.porting import Porting
from sevlab.plugins.sev import Policy, launch_guest
from sevlab.plugins.sev_es.profiles import initial_vmsa
from sevlab.plugins.sev_es.records import GuestSetup
from sevlab.plugins.sev_es.startup import set_up_vcpus

GHCB_GPA, GUEST_BYTES = 0x5000, 1 << 20
LONG_MODE_CS, LONG_MODE_EFER = (8, 0x29B, 0xFFFF_FFFF, 0), 0x1501


def subject() -> Machine:
    """A machine with one SEV-ES guest in 64-bit code whose GHCB is set up, ready for `SetRegisters` and `CpuExit`."""
    machine = bare_subject()
    machine.apply(GuestSetup(0, GHCB_GPA))
    return machine


def bare_subject() -> Machine:
    """The same before the guest has a GHCB."""
    config = MachineConfig(
        plugins=("io", "sme", "sev", "sev_es"),
        guests=(GuestConfig(memory_bytes=GUEST_BYTES),),
        options={"sev_es": {"guest": "linux"}},
    )
    machine = Machine(config)
    launch_guest(machine, 0, policy=Policy.ES, vmsas=[initial_vmsa()])
    set_up_vcpus(machine, 0)
    machine.apply(Schedule())
    system = machine.vcpus[0].system
    system.cs, system.efer = LONG_MODE_CS, LONG_MODE_EFER
    return machine


PORTING = (
    Porting("sev-es", subject=subject),
    Porting("snp", subject=subject),
    Porting("sev-es-early", subject=bare_subject),
)
"""What the hook `sevlab_porting` gives; the exits of an SNP guest go the same way."""
