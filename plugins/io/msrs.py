"""MSRs that a guest's board has: the APIC base, the x2APIC registers, the TSC deadline.

Source: spec 24593 (APM volume 2), 16.11; x2APIC register n of the memory-mapped form is MSR 800h + n / 16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.builder import Msr
from sevlab.core.events import Fault
from sevlab.core.svm import Vector
from sevlab.plugins.io.devices import lapic
from sevlab.plugins.io.devices.board import devices, read_lapic, write_lapic
from sevlab.plugins.io.devices.messages import send_ipi

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

GP = Fault(Vector.GP, 0, 0)
READABLE = frozenset(
    (
        lapic.ID,
        lapic.VERSION,
        lapic.TPR,
        lapic.PPR,
        lapic.LDR,
        lapic.SVR,
        lapic.ESR,
        lapic.ICR_LOW,
        lapic.TIMER_INITIAL,
        lapic.TIMER_CURRENT,
        lapic.TIMER_DIVIDE,
        *range(lapic.ISR, lapic.IRR + 0x80, 0x10),
        *range(lapic.LVT_TIMER, lapic.LVT_LAST + 1, 0x10),
    )
)
WRITABLE = frozenset(
    (
        lapic.TPR,
        lapic.EOI,
        lapic.SVR,
        lapic.ESR,
        lapic.ICR_LOW,
        lapic.TIMER_INITIAL,
        lapic.TIMER_DIVIDE,
        lapic.SELF_IPI,
        *range(lapic.LVT_TIMER, lapic.LVT_LAST + 1, 0x10),
    )
)


def register(builder: PluginBuilder) -> None:
    """Register the board's MSRs."""
    builder.guest_msrs.add(lapic.APIC_BASE_MSR, Msr(read_base, write_base))
    builder.guest_msrs.add(lapic.TSC_DEADLINE_MSR, Msr(read_deadline, write_deadline))
    for number in range(lapic.X2APIC_MSR, lapic.X2APIC_MSR_LAST + 1):
        builder.guest_msrs.add(number, Msr(read_x2apic, write_x2apic))


def _apic(machine: Machine, vcpu: Vcpu | None) -> lapic.Lapic | None:
    return None if vcpu is None else devices(machine, vcpu).lapics[vcpu.vcpu_id]


def read_base(machine: Machine, vcpu: Vcpu | None, _msr: int) -> int | Fault:
    """APIC_BASE."""
    apic = _apic(machine, vcpu)
    return GP if apic is None else apic.base


def write_base(machine: Machine, vcpu: Vcpu | None, _msr: int, value: int) -> Fault | None:
    """APIC_BASE: x2APIC needs the APIC enabled, and only switching it off leaves x2APIC. The window stays put.

    Source: spec 24593, 16.9 (figure 16-32, transitions between the modes).
    """
    apic = _apic(machine, vcpu)
    if apic is None or value >> 48:
        return GP
    enabled, x2apic = bool(value & lapic.BASE_ENABLE), bool(value & lapic.BASE_X2APIC)
    if (x2apic and not enabled) or (apic.x2apic and enabled and not x2apic):
        return GP
    apic.base = value & ~lapic.BASE_BSP | apic.base & lapic.BASE_BSP
    return None


def read_deadline(machine: Machine, vcpu: Vcpu | None, _msr: int) -> int | Fault:
    """TSC_DEADLINE; zero when not armed."""
    apic = _apic(machine, vcpu)
    return GP if apic is None else apic.deadline


def write_deadline(machine: Machine, vcpu: Vcpu | None, _msr: int, value: int) -> Fault | None:
    """TSC_DEADLINE: armed only in deadline mode, zero disarms."""
    apic = _apic(machine, vcpu)
    if apic is None:
        return GP
    if apic.register(lapic.LVT_TIMER) >> 17 & 3 == lapic.TIMER_DEADLINE:
        apic.deadline = value
    return None


def read_x2apic(machine: Machine, vcpu: Vcpu | None, number: int) -> int | Fault:
    """An x2APIC register; #GP outside x2APIC mode and for registers that do not exist."""
    apic = _apic(machine, vcpu)
    offset = (number - lapic.X2APIC_MSR) * 16
    if vcpu is None or apic is None or not apic.x2apic or offset not in READABLE:
        return GP
    return apic.icr if offset == lapic.ICR_LOW else read_lapic(machine, vcpu, offset)


def write_x2apic(machine: Machine, vcpu: Vcpu | None, number: int, value: int) -> Fault | None:
    """An x2APIC register; #GP for reserved bits, read-only and missing registers."""
    apic = _apic(machine, vcpu)
    offset = (number - lapic.X2APIC_MSR) * 16
    if vcpu is None or apic is None or not apic.x2apic or offset not in WRITABLE:
        return GP
    if offset == lapic.ICR_LOW:
        apic.icr = value
        send_ipi(machine, devices(machine, vcpu), apic)
        return None
    if value >> 32 or (offset in (lapic.EOI, lapic.ESR) and value):
        return GP
    if offset == lapic.SELF_IPI:
        apic.accept(value & 0xFF)
        return None
    write_lapic(machine, vcpu, offset, value)
    return None
