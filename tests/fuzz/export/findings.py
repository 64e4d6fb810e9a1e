"""Findings to export: recordings of a model with a fault, for the tests of this folder."""

from __future__ import annotations

from types import ModuleType

from sevlab.core.config import GuestConfig
from sevlab.core.errors import InvariantViolation
from sevlab.core.hookspecs import hookimpl
from sevlab.core.oracle import Canary, OracleSink
from sevlab.core.svm import ExitCode
from sevlab.core.testing import make_machine
from sevlab.plugins.sev import Policy, launch_guest
from sevlab.plugins.sev_es import Ghcb, Vmgexit, initial_vmsa, set_up_vcpus
from sevlab.traces.record import Recorder

from tests.plugins.sev_es.guests import ALL, GHCB_GPA, page

CPUID_PAGE = page(ExitCode.CPUID, rax=0x8000_001F, rcx=0, xcr0=1)


def odd_page():
    """A GHCB page that no build gives: a value that is not marked valid, a mark without a value, reserved bytes."""
    image = bytearray(page(ExitCode.IOIO, 0x3F8_0011, 0, sw_scratch=GHCB_GPA + 0x840, rax=0))
    image[Ghcb.FIELDS["rdx"].offset] = 0x77
    image[0x3F0 + 1] |= 0x80
    image[0x800:0x806] = b"abc\0\0d"
    image[0x20] = 5
    return bytes(image)


def break_cpuid(event):
    """The fault: leaf 8000001Fh is answered out of bounds."""

    def faulty(machine, vcpu, ghcb, scratch):
        if ghcb.rax == 0x8000_001F:
            raise InvariantViolation("buffer.bounds", 'read past the end of "leaves" */ \\')
        return event.handler(machine, vcpu, ghcb, scratch)

    return event._replace(handler=faulty)


def faulty_plugin():
    """A plugin that seeds the fault, and says so by its canary."""

    @hookimpl
    def sevlab_register(builder):
        builder.nae_events.replace(ExitCode.CPUID, break_cpuid)

    @hookimpl
    def sevlab_canaries():
        return (Canary("T01 leaves", "A fault of this test.", "invariant"),)

    module = ModuleType("faulty", "A fault.")
    module.REQUIRES = ("sev_es",)
    module.sevlab_register, module.sevlab_canaries = sevlab_register, sevlab_canaries
    return module


def record_finding(path, given):
    """A recording of a machine that is composed with `given`; the last step shows the fault, if it is there."""
    machine = make_machine(*ALL, guests=(GuestConfig(memory_bytes=1 << 20),), given=given)
    machine.sink = OracleSink()
    with Recorder(machine, path, overwrite=True) as recorder:
        launch_guest(machine, 0, policy=Policy.ES, vmsas=[initial_vmsa(vcpu_signature=0xA0_0F11)])
        set_up_vcpus(machine, 0)
        machine.hypervisor.enter(machine, machine.vcpus[0])
        machine._records.clear()
        machine.apply(Vmgexit(0, 0x002, b""))
        machine.apply(Vmgexit(0, GHCB_GPA, odd_page()))
        machine.apply(Vmgexit(0, GHCB_GPA, CPUID_PAGE[:0x400]))
        machine.apply(Vmgexit(0, GHCB_GPA, CPUID_PAGE))
        recorder.end()
    return path
