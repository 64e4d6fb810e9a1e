"""Ports and MMIO windows as a SEV-ES guest reaches them: through the machine's frozen tables, whoever owns a device."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sevlab.core.builder import MmioWindow
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

MAX_WIDTH = 8
"""Widest access that a device sees; longer ones are split."""


def port_in(machine: Machine, vcpu: Vcpu, port: int, width: int) -> int:
    """`width` bytes from `port`, zero-extended; where nothing is, all ones."""
    entry = machine.tables.ports.get(port)
    mask = (1 << width * 8) - 1
    if entry is None:
        return mask
    if width <= entry.width:
        return entry.read(machine, vcpu, port, width) & mask
    value = 0
    for n in range(width):
        byte = machine.tables.ports.get(port + n & 0xFFFF)
        part = 0xFF if byte is None else byte.read(machine, vcpu, port + n & 0xFFFF, 1) & 0xFF
        value |= part << n * 8
    return value


def port_out(machine: Machine, vcpu: Vcpu, port: int, width: int, value: int) -> None:
    """Write `width` bytes to `port`; where nothing is, they are lost."""
    entry = machine.tables.ports.get(port)
    value &= (1 << width * 8) - 1
    if entry is None:
        return
    if width <= entry.width:
        entry.write(machine, vcpu, port, width, value)
        return
    for n in range(width):
        byte = machine.tables.ports.get(port + n & 0xFFFF)
        if byte is not None:
            byte.write(machine, vcpu, port + n & 0xFFFF, 1, value >> n * 8 & 0xFF)


def port_out_string(machine: Machine, vcpu: Vcpu, port: int, width: int, data: bytes) -> None:
    """Write each element of `data` to `port`; a device that takes strings gets them at once."""
    entry = machine.tables.ports.get(port)
    if entry is not None and entry.write_string is not None and width <= entry.width:
        entry.write_string(machine, vcpu, port, width, data)
        return
    for start in range(0, len(data), width):
        port_out(machine, vcpu, port, width, int.from_bytes(data[start : start + width], "little"))


def window_at(machine: Machine, gpa: int) -> MmioWindow | None:
    """The device window that `gpa` lies in."""
    windows = machine.tables.mmio
    index = bisect_right(windows, gpa, key=lambda window: window.gpa) - 1
    if index < 0 or gpa >= windows[index].gpa + windows[index].length_bytes:
        return None
    return windows[index]


def _pieces(gpa: int, length_bytes: int) -> list[tuple[int, int]]:
    """(GPA, width) of naturally aligned pieces of 1, 2, 4 or 8 bytes."""
    pieces = []
    end = gpa + length_bytes
    while gpa < end:
        width = MAX_WIDTH
        while gpa % width or gpa + width > end:
            width >>= 1
        pieces.append((gpa, width))
        gpa += width
    return pieces


def mmio_read(machine: Machine, vcpu: Vcpu, gpa: int, length_bytes: int) -> bytes:
    """`length_bytes` bytes at device address `gpa`; where nothing is, all ones."""
    out = bytearray()
    for start, width in _pieces(gpa, length_bytes):
        window = window_at(machine, start)
        inside = window is not None and start + width <= window.gpa + window.length_bytes
        if window is None or not inside:
            out += b"\xff" * width
        else:
            value = window.read(machine, vcpu, start - window.gpa, width)
            out += (value & (1 << width * 8) - 1).to_bytes(width, "little")
    return bytes(out)


def mmio_write(machine: Machine, vcpu: Vcpu, gpa: int, data: bytes) -> None:
    """Store `data` at device address `gpa`; where nothing is, it is lost."""
    done = 0
    for start, width in _pieces(gpa, len(data)):
        window = window_at(machine, start)
        if window is not None and start + width <= window.gpa + window.length_bytes:
            value = int.from_bytes(data[done : done + width], "little")
            window.write(machine, vcpu, start - window.gpa, width, value)
        done += width
