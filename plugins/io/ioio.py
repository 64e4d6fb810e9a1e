"""IOIO exits: IN, OUT, INS, OUTS as the hypervisor serves them.

A simple access needs only EXITINFO1 and RAX. The operand of a string access is a virtual address: a plain guest's can
be walked; an SEV guest's page tables are ciphertext, so the hypervisor cannot serve it; an SEV-ES guest never brings
it here, its #VC handler copies through the GHCB. Source: spec 24593, 15.10; Xen and KVM as in docs/io.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.cpu import FaultUnwind, skip_instruction, visible_registers
from sevlab.plugins.io.alu import DF
from sevlab.plugins.io.bus import PlainBus, port_in, port_out, port_out_string
from sevlab.plugins.io.execution import read_register, write_register
from sevlab.plugins.io.mmio import reflect
from sevlab.plugins.io.modes import Mode, mode_of
from sevlab.plugins.io.strings import COUNTERS, SOURCES, TARGETS
from sevlab.plugins.io.unserved import unserved

if TYPE_CHECKING:
    from sevlab.core.cpu import Registers, Vcpu
    from sevlab.core.events import CpuExit
    from sevlab.core.machine import Machine

IN, STRING, REP = 1 << 0, 1 << 2, 1 << 3
SEGMENT_ORDER = ("es", "cs", "ss", "ds", "fs", "gs")
MAX_STRING_BYTES = 4096
"""Bytes of one pass; RCX then says what is left, and the guest executes the instruction again."""


def handle(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """Serve an IOIO exit. EXITINFO2 is the next RIP on every processor, whatever it says of NRIP save."""
    info = exit_.exit_info_1
    width = info >> 4 & 7
    if mode_of(vcpu) is Mode.SEV_ES or width not in (1, 2, 4):
        unserved(machine, vcpu, exit_, "an IOIO exit of this form does not reach the hypervisor")
        return
    registers = visible_registers(machine, vcpu)
    next_rip = exit_._replace(next_rip=exit_.exit_info_2 or exit_.next_rip)
    if info & STRING:
        if mode_of(vcpu) is Mode.SEV:
            unserved(machine, vcpu, exit_, "the operand is a virtual address, and the page tables are encrypted")
            return
        try:
            finished = _string(machine, vcpu, registers, info)
        except FaultUnwind as unwind:
            reflect(machine, vcpu, exit_, unwind.fault)
            return
        if finished and not vcpu.stopped:
            skip_instruction(vcpu, next_rip)
        return
    port = info >> 16 & 0xFFFF
    if info & IN:
        value = port_in(machine, vcpu, port, width)
        write_register(registers, {1: "AL", 2: "AX", 4: "EAX"}[width], value)
    else:
        port_out(machine, vcpu, port, width, registers.rax)
    if not vcpu.stopped:
        skip_instruction(vcpu, next_rip)


def _string(machine: Machine, vcpu: Vcpu, registers: Registers, info: int) -> bool:
    """One pass of INS or OUTS; True when the instruction is done."""
    width, port = info >> 4 & 7, info >> 16 & 0xFFFF
    address_size = {1: 16, 2: 32, 4: 64}.get(info >> 7 & 7, 64)
    pointer = (TARGETS if info & IN else SOURCES)[address_size]
    counter = COUNTERS[address_size]
    segment = "es" if info & IN else SEGMENT_ORDER[min(info >> 10 & 7, 5)]
    long_mode = bool(vcpu.system.cs[1] & 1 << 9)
    base = 0 if long_mode and segment in ("es", "cs", "ss", "ds") else getattr(vcpu.system, segment)[3]
    wanted = read_register(registers, counter) if info & REP else 1
    count = min(wanted, MAX_STRING_BYTES // width)
    backwards = bool(registers.rflags & DF)
    bus = PlainBus(machine, vcpu)
    start = read_register(registers, pointer)
    limit = (1 << address_size) - 1
    linear_limit = (1 << 64) - 1 if long_mode else 0xFFFF_FFFF

    def linear(offset: int) -> int:
        return base + (offset & limit) & linear_limit

    def commit(done: int) -> None:
        write_register(registers, pointer, start + (-done if backwards else done) * width)
        if info & REP:
            write_register(registers, counter, wanted - done)

    contiguous = not backwards and start + count * width - 1 <= limit
    if not info & IN and contiguous and count > 1:
        try:
            data = bus.bytes_at(linear(start), count * width)
        except FaultUnwind:
            pass  # some page is missing: the elements before it go out one by one
        else:
            port_out_string(machine, vcpu, port, width, data)
            commit(count)
            return count == wanted
    for index in range(count):
        place = linear(start + (-index if backwards else index) * width)
        try:
            if info & IN:
                bus.probe(place, width)
                bus.write(place, width, port_in(machine, vcpu, port, width))
            else:
                port_out(machine, vcpu, port, width, bus.read(place, width))
        except FaultUnwind:
            commit(index)
            raise
    commit(count)
    return count == wanted
