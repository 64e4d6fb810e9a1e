"""The buses that the hypervisor's emulator works on.

For a plain guest the hypervisor walks the guest's page tables and reaches memory and devices. For an SEV guest both
are ciphertext: it knows only the guest-physical page that the exit names, and can serve one operand in it.
Source: the cases that hypervisors refuse are those of Xen's SEV series and KVM's svm_check_emulate_instruction.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from sevlab.core.access import CPL_USER, AccessKind
from sevlab.core.cpu import FaultUnwind
from sevlab.core.svm import ExitCode, NpfError
from sevlab.core.units import MASK64, PAGE_BYTES, PAGE_MASK
from sevlab.plugins.io.devices.registers import ones
from sevlab.plugins.io.records import MmioAccessed, PortAccessed

if TYPE_CHECKING:
    from sevlab.core.access import Place
    from sevlab.core.builder import MmioWindow, Port
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

READ, WRITE, USER = int(AccessKind.READ), int(AccessKind.WRITE), int(AccessKind.USER)
NPF_PRESENT = int(NpfError.P)
MAX_WIDTH = 8
"""Widest access that a device sees; wider ones are split."""


class CannotServe(Exception):  # the way out of an emulation, caught in this plugin
    """The hypervisor cannot do this access in the guest's mode; the argument is the reason."""


# Ports ------------------------------------------------------------------------------------------------------------


def _whole(machine: Machine, entry: Port, port: int, width: int) -> bool:
    """Whether the device takes the access as one: it is wide enough, and all the ports are its own."""
    return width <= entry.width and (width == 1 or machine.tables.ports.get(port + width - 1) is entry)


def port_in(machine: Machine, vcpu: Vcpu, port: int, width: int) -> int:
    """Read `width` bytes (1, 2, 4) from `port`; nothing there reads all ones; zero-extended."""
    machine.fetches.point()
    entry = machine.tables.ports.get(port)
    if entry is not None and _whole(machine, entry, port, width):
        value = entry.read(machine, vcpu, port, width) & ones(width)
    else:
        value = sum(_byte_in(machine, vcpu, port + n & 0xFFFF) << n * 8 for n in range(width))
    machine.emit(PortAccessed(port, width, True, value, 1))
    return value


def _byte_in(machine: Machine, vcpu: Vcpu, port: int) -> int:
    """One byte of an access that no device takes whole."""
    entry = machine.tables.ports.get(port)
    return 0xFF if entry is None else entry.read(machine, vcpu, port, 1) & 0xFF


def port_out(machine: Machine, vcpu: Vcpu, port: int, width: int, value: int) -> None:
    """Write `width` bytes (1, 2, 4) to `port`; nothing there drops them."""
    machine.fetches.point()
    value &= ones(width)
    _store(machine, vcpu, port, width, value)
    machine.emit(PortAccessed(port, width, False, value, 1))


def _store(machine: Machine, vcpu: Vcpu, port: int, width: int, value: int) -> None:
    entry = machine.tables.ports.get(port)
    if entry is not None and _whole(machine, entry, port, width):
        entry.write(machine, vcpu, port, width, value)
        return
    for n in range(width):
        byte = machine.tables.ports.get(port + n & 0xFFFF)
        if byte is not None:
            byte.write(machine, vcpu, port + n & 0xFFFF, 1, value >> n * 8 & 0xFF)


def port_out_string(machine: Machine, vcpu: Vcpu, port: int, width: int, data: bytes) -> None:
    """Write the elements of a REP OUTS, one record for all; a device that takes strings gets them at once."""
    if not data:
        return
    machine.fetches.point()
    entry = machine.tables.ports.get(port)
    if entry is not None and entry.write_string is not None and _whole(machine, entry, port, width):
        entry.write_string(machine, vcpu, port, width, data)
    elif entry is not None or width > 1:
        for start in range(0, len(data), width):
            _store(machine, vcpu, port, width, int.from_bytes(data[start : start + width], "little"))
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


def map_back(machine: Machine, vcpu: Vcpu, gpa: int, error_code: int) -> bool:
    """Map a page of the VM's memory that its nested tables lack; False if that is not what the fault is about."""
    vm = machine.vm_of(vcpu)
    if gpa >= vm.memory_bytes or error_code & NPF_PRESENT:
        return False
    page = gpa & -PAGE_BYTES
    machine.access.nested_tables(vm).map(page, vm.memory_spa + page, PAGE_BYTES)
    machine.access.forget()
    return True


Piece = tuple[int, int, "Place | None"]
"""GPA and byte count of one page's part of an operand, and where it is in memory; None: a device."""


class PlainBus(_PortBus):
    """Linear addresses through the guest's own page tables, to memory or to a device.

    `device_page` is the page that a nested fault has shown to be absent: no need to walk the nested tables for it.
    """

    def __init__(self, machine: Machine, vcpu: Vcpu, device_page: int = -1) -> None:
        super().__init__(machine, vcpu)
        self.device_page = device_page

    def _place(self, gpa: int, kind: int) -> Place | None:
        if gpa & -PAGE_BYTES == self.device_page:
            return None
        access, vcpu = self.machine.access, self.vcpu
        try:
            return access.guest_physical(vcpu, gpa, kind)
        except FaultUnwind as unwind:
            fault = unwind.fault
            if fault.vector != ExitCode.NPF:
                raise
            if map_back(self.machine, vcpu, gpa, fault.error_code):
                return access.guest_physical(vcpu, gpa, kind)
            return None

    def _pieces(self, linear: int, size: int, kind: int) -> list[Piece]:
        kind |= USER if self.vcpu.system.cpl == CPL_USER else 0
        pieces: list[Piece] = []
        done = 0
        while done < size:
            start = linear + done & MASK64
            count = min(size - done, PAGE_BYTES - (start & PAGE_MASK))
            gpa = self.machine.access.guest_gpa(self.vcpu, start, kind)
            pieces.append((gpa, count, self._place(gpa, kind)))
            done += count
        return pieces

    def read(self, linear: int, size: int) -> int:
        value = done = 0
        for gpa, count, place in self._pieces(linear, size, READ):
            if place is None:
                part = mmio_read(self.machine, self.vcpu, gpa, count)
            else:
                part = int.from_bytes(self.machine.memory.read(place.spa, count, place.key), "little")
            value |= part << done * 8
            done += count
        return value

    def write(self, linear: int, size: int, value: int) -> None:
        done = 0
        for gpa, count, place in self._pieces(linear, size, WRITE):
            part = value >> done * 8 & ones(count)
            if place is None:
                mmio_write(self.machine, self.vcpu, gpa, count, part)
            else:
                data = part.to_bytes(count, "little")
                self.machine.memory.write(place.spa, data, place.key, self.vcpu.tag)
            done += count

    def probe(self, linear: int, size: int) -> None:
        self._pieces(linear, size, WRITE)

    def bytes_at(self, linear: int, size: int) -> bytes:
        """`size` bytes for a string output, at once."""
        return self.read(linear, size).to_bytes(size, "little")


class SevBus(_PortBus):
    """One operand in the page that the nested fault names; everything else of the guest is ciphertext.

    The first access of the instruction is the one that faulted: its linear address has the low 12 bits of the GPA.
    Source: Linux arch/x86/kvm/x86.c, emulator_read_write_onepage (the same test before the GPA is used).
    """

    def __init__(self, machine: Machine, vcpu: Vcpu, fault_gpa: int) -> None:
        super().__init__(machine, vcpu)
        self.fault_gpa = fault_gpa
        self.linear_page: int | None = None

    def _gpa(self, linear: int, size: int) -> int:
        if self.linear_page is None:
            if (linear ^ self.fault_gpa) & PAGE_MASK and (linear & PAGE_MASK) + size <= PAGE_BYTES:
                raise CannotServe("the fault is not at the operand's address")
            self.linear_page = linear & -PAGE_BYTES
        if linear & -PAGE_BYTES != self.linear_page:
            raise CannotServe("a second operand lies in encrypted memory")
        if (linear & PAGE_MASK) + size > PAGE_BYTES:
            raise CannotServe("the operand crosses a page, and only one of its pages is known")
        return self.fault_gpa & -PAGE_BYTES | linear & PAGE_MASK

    def read(self, linear: int, size: int) -> int:
        return mmio_read(self.machine, self.vcpu, self._gpa(linear, size), size)

    def write(self, linear: int, size: int, value: int) -> None:
        mmio_write(self.machine, self.vcpu, self._gpa(linear, size), size, value)

    def probe(self, linear: int, size: int) -> None:
        self._gpa(linear, size)
