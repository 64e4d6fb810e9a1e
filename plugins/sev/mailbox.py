"""The Secure Processor's register BAR: which interfaces a part has and where their registers are."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.asp import AspRegister, MailboxInterface
from sevlab.plugins.sev import ring
from sevlab.plugins.sev.numbers import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from sevlab.core.builder import PluginBuilder
    from sevlab.core.machine import Machine

SEV_COMPLETE = 1 << 1
"""Bit of the interrupt status: a SEV command is done. Source: Linux drivers/crypto/ccp/sev-dev.h."""

OLD_BLOCK, NEW_BLOCK = 0x10500, 0x10900
"""Where the C2PMSG registers begin; register n is four bytes at 4 n. Source: Linux drivers/crypto/ccp/sp-pci.c."""

COMMAND_FIELD = 0xFF
"""The driver's field is 11 bits wide (Linux include/linux/psp-sev.h), the firmware looks at the low 8 of them.

Source: AMD-ASPFW sev_uapp, SEV_CMD_ID_MASK."""


class Feature:
    """Bits of the capability register. Source: Linux drivers/crypto/ccp/psp-dev.h."""

    SEV = 1 << 0
    TEE = 1 << 1
    DBC_EXTENDED = 1 << 2
    SECURITY_REPORTING = 1 << 7
    FUSED = 1 << 8


class Variant(NamedTuple):
    """What one PCI function has. Offsets are C2PMSG numbers of a block, or bytes where absolute.

    Source: Linux drivers/crypto/ccp/sp-pci.c, tables of the versions.
    """

    sev_block: int
    interrupt_enable: int
    interrupt_status: int
    feature: int
    bootloader_info: int
    psp_mailbox: int = 0
    """Byte offset of the PSP's own mailbox (TEE rings, extended commands); 0: none."""
    platform_access: int = 0
    doorbell: int = 0
    tee_ring: int = 0


def _c2pmsg(block: int, number: int) -> int:
    return block + 4 * number


VARIANTS = {
    0x1456: Variant(OLD_BLOCK, 0x10610, 0x10614, 0x105FC, 0x105EC),
    0x1486: Variant(NEW_BLOCK, 0x10690, 0x10694, 0x109FC, 0x109EC, platform_access=0x10570, doorbell=0x10A24),
    0x14CA: Variant(NEW_BLOCK, 0x10690, 0x10694, 0x109FC, 0x109EC, psp_mailbox=0x10544, tee_ring=0x10550),
    0x17D8: Variant(NEW_BLOCK, 0x10510, 0x10514, 0x109FC, 0x109EC, psp_mailbox=0x10944, tee_ring=0x10950),
}
"""By PCI device id."""

DOORBELL_COMMAND = 0x1C
"""Bytes from the doorbell's button to its command register."""


def sev_interface(variant: Variant) -> MailboxInterface:
    """The mailbox of the SEV commands: C2PMSG 32, 56, 57."""
    return MailboxInterface(
        "sev",
        _c2pmsg(variant.sev_block, 32),
        _c2pmsg(variant.sev_block, 56),
        _c2pmsg(variant.sev_block, 57),
        COMMAND_FIELD,
        Status.INVALID_COMMAND,
        Status.INVALID_ADDRESS,
        SEV_COMPLETE,
    )


PSP_UNKNOWN_COMMAND = 0x01
"""What an interface answers that nobody implements: any status but zero is a failure. UNVERIFIED."""


def register(builder: PluginBuilder) -> None:
    """Put the part's registers into the BAR."""
    variant = VARIANTS[builder.config.part.asp_device]
    interface = sev_interface(variant)
    builder.mailbox(interface)
    ring.register(builder, interface)
    features = Feature.SEV | Feature.SECURITY_REPORTING | Feature.FUSED
    for name, first in (("psp", variant.psp_mailbox), ("platform_access", variant.platform_access)):
        if first:
            builder.mailbox(
                MailboxInterface(name, first, first + 4, first + 8, 0xFF, PSP_UNKNOWN_COMMAND, PSP_UNKNOWN_COMMAND, 0)
            )
    if variant.psp_mailbox:
        features |= Feature.TEE
    constants = {variant.feature: features, variant.bootloader_info: 0}
    for unused in (variant.doorbell, variant.doorbell + DOORBELL_COMMAND if variant.doorbell else 0):
        constants[unused] = 0
    for unused in (variant.tee_ring, variant.tee_ring + 4 if variant.tee_ring else 0):
        constants[unused] = 0
    constants.pop(0)
    for offset, value in constants.items():
        builder.asp_registers.add(offset, AspRegister(_constant(value), None))
    builder.asp_registers.add(variant.interrupt_enable, AspRegister(_read_enable, _write_enable))
    builder.asp_registers.add(variant.interrupt_status, AspRegister(_read_status, _acknowledge))


def _constant(value: int) -> Callable[[Machine], int]:
    return lambda _machine: value


def _read_enable(machine: Machine) -> int:
    return machine.asp.interrupt_enable


def _write_enable(machine: Machine, value: int) -> None:
    machine.asp.interrupt_enable = value


def _read_status(machine: Machine) -> int:
    return machine.asp.interrupt_status


def _acknowledge(machine: Machine, value: int) -> None:
    """Write one to clear."""
    machine.asp.interrupt_status &= ~value
