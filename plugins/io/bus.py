"""The buses that the hypervisor's emulator works on.

For a plain guest the hypervisor walks the guest's page tables and reaches memory and devices. For an SEV guest both
are ciphertext: it knows only the guest-physical page that the exit names, and can serve one operand in it.
Source: the cases that hypervisors refuse are those of Xen's SEV series and KVM's svm_check_emulate_instruction.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from sevlab.core.access import AccessKind
from sevlab.core.cpu import FaultUnwind
from sevlab.core.svm import ExitCode
from sevlab.core.units import PAGE_BYTES, PAGE_MASK
from sevlab.plugins.io.devices.registers import ones
from sevlab.plugins.io.records import MmioAccessed, PortAccessed

if TYPE_CHECKING:
    from sevlab.core.builder import MmioWindow
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

MAX_WIDTH = 8
"""Widest access that a device sees; wider ones are split."""


class CannotServe(Exception):  # the way out of an emulation, caught in this plugin
    """The hypervisor cannot do this access in the guest's mode; the argument is the reason."""


# Ports ------------------------------------------------------------------------------------------------------------


def port_in(machine: Machine, vcpu: Vcpu, port: int, width: int) -> int:
    """Read `width` bytes (1, 2, 4) from `port`; nothing there reads all ones; zero-extended."""
    machine.fetches.point()
    entry = machine.tables.ports.get(port)
    if entry is None:
        value = ones(width)
    elif width <= entry.width:
        value = entry.read(machine, vcpu, port, width) & ones(width)
    else:
        value = sum(port_in_byte(machine, vcpu, port + n) << n * 8 for n in range(width))
    machine.emit(PortAccessed(port, width, True, value, 1))
    return value


def port_in_byte(machine: Machine, vcpu: Vcpu, port: int) -> int:
    """One byte of an access that the device does not take whole."""
    entry = machine.tables.ports.get(port & 0xFFFF)
    return 0xFF if entry is None else entry.read(machine, vcpu, port & 0xFFFF, 1) & 0xFF


def port_out(machine: Machine, vcpu: Vcpu, port: int, width: int, value: int) -> None:
    """Write `width` bytes (1, 2, 4) to `port`; nothing there drops them."""
    machine.fetches.point()
    value &= ones(width)
    entry = machine.tables.ports.get(port)
    if entry is not None and width <= entry.width:
        entry.write(machine, vcpu, port, width, value)
    elif entry is not None:
        for n in range(width):
            byte = machine.tables.ports.get(port + n & 0xFFFF)
            if byte is not None:
                byte.write(machine, vcpu, port + n & 0xFFFF, 1, value >> n * 8 & 0xFF)
    machine.emit(PortAccessed(port, width, False, value, 1))


def port_out_string(machine: Machine, vcpu: Vcpu, port: int, width: int, data: bytes) -> None:
    """Write the elements of a REP OUTS; a device that takes strings gets them at once."""
    if not data:
        return
    entry = machine.tables.ports.get(port)
    if entry is None or entry.write_string is None or width > entry.width:
        for start in range(0, len(data), width):
            port_out(machine, vcpu, port, width, int.from_bytes(data[start : start + width], "little"))
        return
    machine.fetches.point()
    entry.write_string(machine, vcpu, port, width, data)
    first = int.from_bytes(data[:width], "little")
    machine.emit(PortAccessed(port, width, False, first, len(data) // width))


# Windows ----------------------------------------------------------------------------------------------------------


def window_at(machine: Machine, gpa: int) -> MmioWindow | None:
    """The device window that `gpa` lies in."""
    windows = machine.tables.mmio
    index = bisect_right(windows, gpa, key=lambda window: window.gpa) - 1
    if index < 0:
        return None
    window = windows[index]
    return window if gpa < window.gpa + window.length_bytes else None


def mmio_read(machine: Machine, vcpu: Vcpu, gpa: int, width: int) -> int:
    """Read `width` bytes from the device at `gpa`; what lies outside the device's window reads all ones."""
    machine.fetches.point()
    window = window_at(machine, gpa)
    if window is None:
        value = ones(width)
    else:
        inside = min(width, window.gpa + window.length_bytes - gpa)
        value = ones(width) >> inside * 8 << inside * 8
        offset = gpa - window.gpa
        for start in range(0, inside, MAX_WIDTH):
            part = min(MAX_WIDTH, inside - start)
            value |= (window.read(machine, vcpu, offset + start, part) & ones(part)) << start * 8
    machine.emit(MmioAccessed(gpa, width, False, value))
    return value


def mmio_write(machine: Machine, vcpu: Vcpu, gpa: int, width: int, value: int) -> None:
    """Write `width` bytes to the device at `gpa`; what lies outside the device's window is dropped."""
    machine.fetches.point()
    window = window_at(machine, gpa)
    if window is not None:
        inside = min(width, window.gpa + window.length_bytes - gpa)
        offset = gpa - window.gpa
        for start in range(0, inside, MAX_WIDTH):
            part = min(MAX_WIDTH, inside - start)
            window.write(machine, vcpu, offset + start, part, value >> start * 8 & ones(part))
    machine.emit(MmioAccessed(gpa, width, True, value & ones(width)))


# Buses of the emulator --------------------------------------------------------------------------------------------


class _PortBus:
    """The port half, the same for every guest."""

    def __init__(self, machine: Machine, vcpu: Vcpu) -> None:
        self.machine = machine
        self.vcpu = vcpu

    def port_in(self, port: int, size: int) -> int:
        return port_in(self.machine, self.vcpu, port, size)

    def port_out(self, port: int, size: int, value: int) -> None:
        port_out(self.machine, self.vcpu, port, size, value)


class PlainBus(_PortBus):
    """Linear addresses through the guest's own page tables, to memory or to a device."""

    def _pieces(self, linear: int, size: int, kind: int) -> list[tuple[int, int, int | None]]:
        """(gpa, byte count, spa or None for a device) of each page's part."""
        access, vcpu = self.machine.access, self.vcpu
        user = AccessKind.USER if vcpu.system.cpl == 3 else AccessKind.READ
        pieces: list[tuple[int, int, int | None]] = []
        done = 0
        while done < size:
            start = linear + done
            count = min(size - done, PAGE_BYTES - (start & PAGE_MASK))
            gpa = access.guest_gpa(vcpu, start, kind | user)
            try:
                spa: int | None = access.guest_physical(vcpu, gpa, kind).spa
            except FaultUnwind as unwind:
                if unwind.fault.vector != ExitCode.NPF:
                    raise
                spa = None
            pieces.append((gpa, count, spa))
            done += count
        return pieces

    def read(self, linear: int, size: int) -> int:
        value = done = 0
        for gpa, count, spa in self._pieces(linear, size, AccessKind.READ):
            if spa is None:
                part = mmio_read(self.machine, self.vcpu, gpa, count)
            else:
                part = int.from_bytes(self.machine.memory.read(spa, count, None), "little")
            value |= part << done * 8
            done += count
        return value

    def write(self, linear: int, size: int, value: int) -> None:
        done = 0
        for gpa, count, spa in self._pieces(linear, size, AccessKind.WRITE):
            part = value >> done * 8 & ones(count)
            if spa is None:
                mmio_write(self.machine, self.vcpu, gpa, count, part)
            else:
                self.machine.memory.write(spa, part.to_bytes(count, "little"), None, self.vcpu.tag)
            done += count

    def probe(self, linear: int, size: int) -> None:
        self._pieces(linear, size, AccessKind.WRITE)

    def bytes_at(self, linear: int, size: int) -> bytes:
        """Memory for a string output, at once; None of it may be a device."""
        pieces = self._pieces(linear, size, AccessKind.READ)
        if any(spa is None for _, _, spa in pieces):
            return self.read(linear, size).to_bytes(size, "little")
        return b"".join(self.machine.memory.read(spa or 0, count, None) for _, count, spa in pieces)


class SevBus(_PortBus):
    """One operand in the page that the nested fault names; everything else of the guest is ciphertext."""

    def __init__(self, machine: Machine, vcpu: Vcpu, fault_gpa: int, linear: int) -> None:
        super().__init__(machine, vcpu)
        self.page_gpa = fault_gpa & -PAGE_BYTES
        self.linear_page = linear & -PAGE_BYTES

    def _gpa(self, linear: int, size: int) -> int:
        if linear & -PAGE_BYTES != self.linear_page:
            raise CannotServe("a second operand lies in encrypted memory")
        if (linear & PAGE_MASK) + size > PAGE_BYTES:
            raise CannotServe("the operand crosses a page, and only one of its pages is known")
        return self.page_gpa | linear & PAGE_MASK

    def read(self, linear: int, size: int) -> int:
        return mmio_read(self.machine, self.vcpu, self._gpa(linear, size), size)

    def write(self, linear: int, size: int, value: int) -> None:
        mmio_write(self.machine, self.vcpu, self._gpa(linear, size), size, value)

    def probe(self, linear: int, size: int) -> None:
        self._gpa(linear, size)
