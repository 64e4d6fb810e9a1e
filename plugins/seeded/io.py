"""Bugs of the emulation of devices and registers: widths, windows, ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.buffers import CheckedBuffer
from sevlab.core.builder import Msr
from sevlab.core.events import Fault
from sevlab.core.svm import Vector
from sevlab.core.units import PAGE_BYTES
from sevlab.plugins.io import devices
from sevlab.plugins.seeded.planting import Bug
from sevlab.plugins.sev_es import NaeCode

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from sevlab.core.builder import Port
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine
    from sevlab.plugins.seeded.planting import Mark, Planter
    from sevlab.plugins.sev_es import Ghcb, Reply, Scratch

TIMER_PORTS = (0x40, 0x41, 0x42, 0x43)
"""The 8254, which is read by the byte."""

X2APIC_FIRST, X2APIC_PAST, X2APIC_WRONG_PAST = 0x800, 0x900, 0xC00
NO_SUCH_REGISTER = Fault(Vector.GP, 0, 0)


def io_size_uninit(plan: Planter, mark: Mark) -> None:
    """A device says yes to a read of a width that it does not serve, and leaves the answer as it found it.

    Source: CVE-2015-2044, XSA-121 (Xen c9e57594e1).
    """
    made: dict[int, Port] = {}  # the ports of one device stay one device

    def make(original: Port) -> Port:
        def read(machine: Machine, vcpu: Vcpu, port: int, width: int) -> int:
            mark.reached()
            if width > original.width:
                if mark.triggers():
                    return int.from_bytes(CheckedBuffer(width).read(0, width), "little")
                parts = (_byte(machine, vcpu, port + n & 0xFFFF, original, read) << n * 8 for n in range(width))
                return sum(parts)
            return original.read(machine, vcpu, port, width)

        def write(machine: Machine, vcpu: Vcpu, port: int, width: int, value: int) -> None:
            for n in range(width):
                part = machine.tables.ports.get(port + n & 0xFFFF)
                if part is not None:
                    own = original.write if part.write is write else part.write
                    own(machine, vcpu, port + n & 0xFFFF, 1, value >> n * 8 & 0xFF)

        return made.setdefault(id(original), original._replace(read=read, write=write, width=4))

    for port in TIMER_PORTS:
        plan.replace("ports", port, make)


def _byte(machine: Machine, vcpu: Vcpu, port: int, original: Port, faulty: Any) -> int:
    """One byte of a wide read, as the correct bus splits it."""
    entry = machine.tables.ports.get(port)
    if entry is None:
        return 0xFF
    read = original.read if entry.read is faulty else entry.read
    return read(machine, vcpu, port, 1) & 0xFF


def rep_mmio_edge(plan: Planter, mark: Mark) -> None:
    """Only the first address of an access is looked up: its end may lie behind the device's window.

    Published for REP MOVS in the emulator; here one long access of an encrypted guest. Source: CVE-2014-8867, XSA-112
    (Xen c5397354b9).
    """

    def make(original: Callable[..., Reply]) -> Callable[..., Reply]:
        def handler(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
            gpa, length = ghcb.sw_exit_info_1, ghcb.sw_exit_info_2
            windows = (w for w in machine.tables.mmio if scratch is not None and w.gpa <= gpa < w.gpa + w.length_bytes)
            window = next(windows, None)
            if window is not None:
                mark.reached()
                past = gpa + length - (window.gpa + window.length_bytes)
                if past > 0 and mark.triggers():
                    tail = CheckedBuffer(min(window.length_bytes, PAGE_BYTES))  # the window's end, in a small buffer
                    tail.read(tail.size - (length - past), length)
            return original(machine, vcpu, ghcb, scratch)

        return handler

    for code in (NaeCode.MMIO_READ, NaeCode.MMIO_WRITE):
        plan.event(code, make)


def x2apic_window(plan: Planter, mark: Mark) -> None:
    """RDMSR of 800h to BFFh reads the x2APIC's page of registers, of which there are 100h.

    Source: CVE-2014-7188, XSA-108 (Xen 61fdda7acf).
    """

    def read(machine: Machine, vcpu: Vcpu | None, number: int) -> int | Fault:
        if vcpu is not None and devices(machine, vcpu).lapics[vcpu.vcpu_id].x2apic:
            mark.reached()
            if mark.triggers():
                return CheckedBuffer(PAGE_BYTES).read_uint((number - X2APIC_FIRST) * 16, 4)
        return NO_SUCH_REGISTER

    for number in range(X2APIC_PAST, X2APIC_WRONG_PAST):
        plan.builder.guest_msrs.add(number, Msr(read, None))


BUGS = (
    Bug("S10", "io-size-uninit", 18, "invariant", io_size_uninit, stateful=True),
    Bug("S11", "rep-mmio-edge", 19, "invariant", rep_mmio_edge),
    Bug("S12", "x2apic-window", 20, "invariant", x2apic_window),
)
"""Those of this file."""
