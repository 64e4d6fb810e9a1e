"""Devices whose content belongs to the captured machine: the clock's memory and PCI configuration space.

The first read of a byte is taken from the log. From then on the model knows it, follows the guest's writes, and
answers itself. Source: Motorola MC146818A datasheet; PCI Local Bus Specification 3.0, 3.2.2.3, 6.1 and 6.2.5.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.builder import Port
from sevlab.core.events import Supplied
from sevlab.plugins.captured.state import Captured, captured

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

RTC_INDEX, RTC_DATA = 0x70, 0x71
RTC_VOLATILE = frozenset((0, 2, 4, 6, 7, 8, 9, 0x0C, 0x32))
"""The clock, and the status that a read clears."""
RTC_STATUS_A, UIP = 0x0A, 0x80

PCI_ADDRESS, PCI_DATA = 0xCF8, 0xCFC
PCI_ENABLE = 1 << 31
COMMAND, STATUS, BARS, ROM_BAR, DEVICE_SPECIFIC = 0x04, 0x06, range(0x10, 0x28), range(0x30, 0x34), 0x40
READ_ONLY = frozenset((0, 1, 2, 3, 8, 9, 10, 11, 14, 0x2C, 0x2D, 0x2E, 0x2F, 0x34, 0x3D, 0x3E, 0x3F))
TYPE_64, TYPE_MASK = 0x4, 0x6


def register(builder: PluginBuilder) -> None:
    """Take the place of the board's clock memory and configuration space."""
    clock = Port(rtc_read, rtc_write, 1)
    for port in (RTC_INDEX, RTC_DATA):
        builder.ports.replace(port, lambda _: clock)
    configuration = Port(pci_read, pci_write)
    for port in range(PCI_ADDRESS, PCI_DATA + 4):
        builder.ports.replace(port, lambda _: configuration)
    for port in FOREIGN_PORTS:
        builder.ports.replace(port, lambda _: FOREIGN)


def _take(machine: Machine, log: Captured, width: int) -> int:
    machine.emit(Supplied("value"))
    return (log.answer() or 0) & (1 << width * 8) - 1


def foreign_read(machine: Machine, vcpu: Vcpu, port: int, width: int) -> int:
    """A port where the captured machine has a device of its own."""
    return (captured(machine).answer() or 0) & (1 << width * 8) - 1  # that it was taken is said by the exit's handler


def foreign_write(machine: Machine, vcpu: Vcpu, port: int, width: int, value: int) -> None:
    """Nothing that the model would know of."""


FOREIGN = Port(foreign_read, foreign_write)
FOREIGN_PORTS = (0xF4, *range(0x510, 0x51C), *range(0x600, 0x60C))
"""Exit port, firmware configuration and power management: the board's own would end the guest or write its memory."""


def rtc_read(machine: Machine, vcpu: Vcpu, port: int, width: int) -> int:
    """A byte of the clock; the index port reads all ones."""
    if port == RTC_INDEX:
        return 0xFF
    log = captured(machine)
    index = log.rtc_index
    known = log.rtc.get(index)
    if known is None:
        known = _take(machine, log, 1)
        if index not in RTC_VOLATILE:
            log.rtc[index] = known & ~UIP if index == RTC_STATUS_A else known
        return known
    if index == RTC_STATUS_A:
        return known | (log.answer() or 0) & UIP  # whether the clock is being updated is a matter of time
    return known


def rtc_write(machine: Machine, vcpu: Vcpu, port: int, width: int, value: int) -> None:
    """The index, or the byte that it names."""
    log = captured(machine)
    if port == RTC_INDEX:
        log.rtc_index = value & 0x7F
    elif log.rtc_index not in RTC_VOLATILE:
        log.rtc[log.rtc_index] = value & (0x7F if log.rtc_index == RTC_STATUS_A else 0xFF)


def pci_read(machine: Machine, vcpu: Vcpu, port: int, width: int) -> int:
    """The address register, or the bytes that it names."""
    log = captured(machine)
    if port < PCI_DATA:
        if port != PCI_ADDRESS or width != 4:
            return _take(machine, log, width)
        if log.pci_present < 0:
            value = _take(machine, log, 4)
            log.pci_present = int(value == log.pci_address)
            return value
        return log.pci_address if log.pci_present else 0xFFFF_FFFF
    if not log.pci_address & PCI_ENABLE:
        return (1 << width * 8) - 1
    first = log.pci_address >> 8 << 8 & 0xFF_FF00 | log.pci_address & 0xFC | port & 3
    known = [log.pci.get(first + n) for n in range(width)]
    if None not in known:
        expected = sum((byte or 0) << n * 8 for n, byte in enumerate(known))
        if log.pci_present > 0:
            return expected
        value = _take(machine, log, width)
        if log.pci_present < 0 and value != (1 << width * 8) - 1:
            log.pci_present = int(value == expected)  # a register that reads the same twice: there is such a bus
        return value
    value = _take(machine, log, width)
    for n in range(width):
        log.pci[first + n] = value >> n * 8 & 0xFF
    if log.pci_sizing.get(first & ~3) and width == 4:
        log.pci_sizes[first] = value
    return value


def pci_write(machine: Machine, vcpu: Vcpu, port: int, width: int, value: int) -> None:
    """The address register, or the bytes that it names."""
    log = captured(machine)
    if port < PCI_DATA:
        if port == PCI_ADDRESS and width == 4:
            log.pci_address = value
        return
    if not log.pci_address & PCI_ENABLE:
        return
    offset = log.pci_address & 0xFC | port & 3
    first = log.pci_address >> 8 << 8 & 0xFF_FF00 | offset
    if offset in BARS or offset in ROM_BAR:
        _write_bar(log, first, width, value)
        return
    for n in range(width):
        at = offset + n
        if at in READ_ONLY or at in (STATUS, STATUS + 1) or first + n not in log.pci:
            continue
        log.pci[first + n] = value >> n * 8 & 0xFF


def _write_bar(log: Captured, first: int, width: int, value: int) -> None:
    """A base address: which bits stick is known once the guest has sized the register."""
    bar = first & ~3
    log.pci_sizing[bar] = width == 4 and value | 0x7FF == 0xFFFF_FFFF
    size = log.pci_sizes.get(bar)
    if size is None or width != 4:
        for n in range(4):
            log.pci.pop(bar + n, None)
        return
    upper_half = bar - 4 in log.pci and bar & 0xFF in BARS and log.pci.get(bar - 4, 0) & (TYPE_MASK | 1) == TYPE_64
    kind = 0 if upper_half else (3 if size & 1 else 1 if bar & 0xFF in ROM_BAR else 0xF)
    settled = value & size & ~kind | (value & size & 1 if bar & 0xFF in ROM_BAR else size & kind)
    for n in range(4):
        log.pci[bar + n] = settled >> n * 8 & 0xFF
