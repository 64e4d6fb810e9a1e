"""Which device reads the board determines, and which depend on time, input or the captured machine's configuration.

Source: docs/traces.md, measured on captured boots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.plugins.io import devices

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

COM1, COM1_LAST = 0x3F8, 0x3FF
LCR_DLAB = 0x80
PIC_MASKS = (0x21, 0xA1)
RTC_PORTS, PCI_PORTS = range(0x70, 0x72), range(0xCF8, 0xD00)

APIC_UNCERTAIN = frozenset((0x30, 0x90, 0xA0, 0xC0, 0x390, *range(0x100, 0x280, 0x10)))
"""Version, priorities, current count, ISR, TMR, IRR: time, configuration, and the order of interrupts."""

LAPIC, IOAPIC = 0xFEE0_0000, 0xFEC0_0000
IOAPIC_SELECT, IOAPIC_WINDOW = 0x00, 0x10
IOAPIC_ENTRIES = range(0x10, 0x10 + 2 * 24)
"""The redirection entries of 24 pins; how many more there are is the captured machine's configuration."""


def port_certain(machine: Machine, vcpu: Vcpu, port: int, width: int) -> bool:
    """Whether the board's answer is what any such device answers. Learned devices say it themselves."""
    if COM1 <= port <= COM1_LAST:
        return width == 1 and (port != COM1 or bool(devices(machine, vcpu).uart.lcr & LCR_DLAB))
    if port in RTC_PORTS or port in PCI_PORTS:
        return True
    return port in PIC_MASKS and width == 1


def apic_certain(offset: int) -> bool:
    """Whether a read of this register follows from the guest's writes."""
    return offset not in APIC_UNCERTAIN


def mmio_certain(machine: Machine, vcpu: Vcpu, gpa: int) -> bool:
    """The same for an address."""
    if gpa & ~0xFFF == LAPIC:
        return apic_certain(gpa & 0xFF0)
    if gpa & ~0xFFF == IOAPIC:
        offset = gpa & 0xFF
        return offset == IOAPIC_SELECT or (
            offset == IOAPIC_WINDOW and devices(machine, vcpu).ioapic.select in IOAPIC_ENTRIES
        )
    return False
