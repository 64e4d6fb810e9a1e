"""Interrupt messages: who gets what an APIC or the I/O APIC sends, and what it does there.

Source: spec 24593 (APM volume 2), 16.5 (interprocessor interrupts), 16.6 (local vector table, message types), 16.11
(x2APIC destinations); Intel 82093AA datasheet, redirection entries (the same delivery modes).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.cpu import CONTROL_SEV_ES, Registers, SystemRegisters
from sevlab.core.state import capture, restore
from sevlab.plugins.io.devices import lapic

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine
    from sevlab.plugins.io.devices.board import Devices

FIXED, LOWEST, NMI, INIT, STARTUP = 0, 1, 4, 5, 6
SHORTHAND_SELF, SHORTHAND_ALL, SHORTHAND_OTHERS = 1, 2, 3
LOGICAL, ASSERT, LEVEL = 1 << 11, 1 << 14, 1 << 15
BROADCAST, BROADCAST_X2APIC = 0xFF, 0xFFFF_FFFF
FLAT_MODEL = 0xF
"""DFR 31:28 of the flat model; 0 is the cluster model."""


class Message(NamedTuple):
    """One message; `wide` is a destination of 32 bits, as x2APIC sends it."""

    vector: int
    mode: int
    destination: int
    logical: bool
    level: bool = False
    wide: bool = False


def reaches(apic: lapic.Lapic, message: Message) -> bool:
    """Whether the destination names this APIC."""
    destination = message.destination
    if destination == (BROADCAST_X2APIC if message.wide else BROADCAST):
        return True
    if not message.logical:
        return destination == apic.apic_id
    logical_id = apic.read(lapic.LDR, 0)
    if apic.x2apic:
        cluster = destination >> 16 if message.wide else 0
        return logical_id >> 16 == cluster and bool(logical_id & destination & 0xFFFF)
    logical_id >>= 24
    if apic.register(lapic.DFR) >> 28 == FLAT_MODEL:
        return bool(logical_id & destination)
    return logical_id >> 4 == destination >> 4 and bool(logical_id & destination & 0xF)


def deliver(machine: Machine, board: Devices, message: Message) -> None:
    """Bring a message to every APIC that it names; lowest priority goes to one of them."""
    _give(machine, [(vcpu_id, apic) for vcpu_id, apic in board.lapics.items() if reaches(apic, message)], message)


def _give(machine: Machine, chosen: list[tuple[int, lapic.Lapic]], message: Message) -> None:
    if message.mode == LOWEST and chosen:
        enabled = [one for one in chosen if one[1].enabled] or chosen
        chosen = [min(enabled, key=lambda one: (one[1].priority >> 4, one[1].apic_id))]
    for vcpu_id, apic in chosen:
        _receive(machine, machine.vcpus[vcpu_id], apic, message)


def send_ipi(machine: Machine, board: Devices, sender: lapic.Lapic) -> None:
    """Carry out the interrupt command of `sender`."""
    icr = sender.icr
    mode = icr >> 8 & 7
    if mode == INIT and icr & LEVEL and not icr & ASSERT:
        return  # INIT de-assert: only arbitration identifiers of old buses cared
    destination = icr >> 32 if sender.x2apic else icr >> 56
    message = Message(icr & 0xFF, mode, destination, bool(icr & LOGICAL), wide=sender.x2apic)
    if mode in (FIXED, LOWEST) and message.vector < lapic.FIRST_VECTOR:
        sender.errors |= lapic.ESR_SEND_ILLEGAL
        return
    shorthand = icr >> 18 & 3
    if not shorthand:
        deliver(machine, board, message)
        return
    everybody = list(board.lapics.items())
    if shorthand == SHORTHAND_SELF:
        everybody = [one for one in everybody if one[1] is sender]
    elif shorthand == SHORTHAND_OTHERS:
        everybody = [one for one in everybody if one[1] is not sender]
    _give(machine, everybody, message)


def _receive(machine: Machine, vcpu: Vcpu, apic: lapic.Lapic, message: Message) -> None:
    if message.mode in (FIXED, LOWEST):
        apic.accept(message.vector, level=message.level)
    elif message.mode == NMI:
        apic.nmi_pending = True
    elif message.mode == INIT:
        _init(vcpu, apic)
    elif message.mode == STARTUP and apic.waits_for_startup:
        apic.waits_for_startup = False
        start = machine.slots.start_vcpu
        if start is not None and start(machine, vcpu, message.vector):
            return  # a hypervisor cannot set the registers of an encrypted guest
        vcpu.halted = False
        if not vcpu.vmcb.encryption_control & CONTROL_SEV_ES:
            vcpu.regs.rip = 0
            vcpu.system.cs = (message.vector << 8, 0x9B, 0xFFFF, message.vector << 12)


def _init(vcpu: Vcpu, apic: lapic.Lapic) -> None:
    """INIT: the processor starts anew and, unless it is the boot processor, waits for a startup message.

    The host cannot reset the registers of an encrypted guest: it only stops running it. Source: spec 24593, 14.1.2.
    """
    apic.reset()
    apic.waits_for_startup = not apic.base & lapic.BASE_BSP
    vcpu.halted = apic.waits_for_startup
    if vcpu.vmcb.encryption_control & CONTROL_SEV_ES:
        return
    kept = vcpu.system.xmm, vcpu.system.xcr0, vcpu.system.cr0 & CACHE_BITS
    restore(vcpu.regs, capture(Registers(rip=0xFFF0)))
    restore(vcpu.system, capture(SystemRegisters(xmm=kept[0], xcr0=kept[1])))
    vcpu.system.cr0 = vcpu.system.cr0 & ~CACHE_BITS | kept[2]


CACHE_BITS = 3 << 29
"""CR0.CD and CR0.NW, which INIT keeps."""
