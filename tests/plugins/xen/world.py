"""Machines with Xen, and guests that call it with raw registers."""

from __future__ import annotations

from sevlab.core.config import GuestConfig
from sevlab.core.events import CpuExit
from sevlab.core.svm import ExitCode
from sevlab.core.testing import make_machine
from sevlab.plugins.xen import Hypercalled, XenGuest
from sevlab.plugins.xen.operations import signed

BOUNCE = 0x10000
INFO = 0x20000
FRAMES = 0x21000
PAGE = 0x30000
ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8")
ARGUMENTS_32 = ("rbx", "rcx", "rdx", "rsi", "rdi")
VMMCALL = b"\x0f\x01\xd9"


def machine_of(*, guests=2, vcpus=1, memory_bytes=16 << 20, start="long", plugins=(), **options):
    return make_machine(
        *plugins,
        "io",
        "xen",
        guests=tuple(GuestConfig(name=f"guest{n}", vcpus=vcpus, memory_bytes=memory_bytes) for n in range(guests)),
        options={"xen": {"start": start, **options}},
    )


def guest_of(machine, vm=0, **keywords):
    return XenGuest(machine, machine.hypervisor.vms[vm].vcpu_ids[0], bounce_gpa=BOUNCE, **keywords)


def registers_of(machine, vcpu=0, **values):
    regs = machine.vcpus[vcpu].regs
    for name, value in values.items():
        setattr(regs, name, value)
    return regs


def vmmcall(machine, vcpu=0):
    """The guest executes VMMCALL as its registers are; the outcome."""
    return machine.apply(CpuExit(vcpu, ExitCode.VMMCALL, 0, 0, VMMCALL, 0))


def call(machine, number, *args, vcpu=0, names=ARGUMENTS):
    """A hypercall by registers; its result as a signed number, of 64 bits."""
    registers_of(machine, vcpu, rax=number, **dict(zip(names, args, strict=False)))
    vmmcall(machine, vcpu)
    return signed(machine.vcpus[vcpu].regs.rax, 64)


def called(outcome):
    return outcome.first(Hypercalled)
