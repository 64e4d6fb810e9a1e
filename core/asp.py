"""The AMD Secure Processor as a PCI function: identity, register BAR, mailboxes, command dispatch. No commands.

One function carries several interfaces (SEV, TEE, platform access, ...), each a set of mailbox registers with its own
command table. A plugin declares the interfaces and registers commands; here is only the handshake that they share:
address low and high, then the command word, then bit 31 says "done" and the low half is the status.

Source: Linux drivers/crypto/ccp/{sp-pci.c,psp-dev.h,sev-dev.c}; offsets are plugin data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.events import AspStatus
from sevlab.core.state import StateDict, Stateful, new

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

PCI_VENDOR_AMD = 0x1022
REGISTER_BAR = 2
RESPONSE = 1 << 31
INTERRUPT_ON_COMPLETION = 1 << 0
COMMAND_SHIFT = 16
STATUS_MASK = 0xFFFF
ALL_ONES = 0xFFFF_FFFF


class MailboxInterface(NamedTuple):
    """One mailbox of the function.

    Registers are byte offsets into the BAR. `command_mask` is the width of the command field after the shift by 16;
    `unknown_command` and `bad_address` are the statuses of this interface for those two. `interrupt_bit` is the bit of
    INTSTS that says "command complete" (0: the interface only polls).
    """

    name: str
    command_register: int
    address_low_register: int
    address_high_register: int
    command_mask: int
    unknown_command: int
    bad_address: int
    interrupt_bit: int


class AspRegister(NamedTuple):
    """A register of the BAR that is not part of a mailbox; None reads as zero or ignores the write."""

    read: Callable[[Machine], int] | None
    write: Callable[[Machine, int], None] | None


class Command:
    """One command under way, as its handler sees it.

    `spa` is where the command buffer is (0: none), `buffer` its bytes, taken once when the command started. A handler
    that answers in the command buffer sets `reply` to bytes that are written from the buffer's start; `error_stack` is
    the 64-bit value that the firmware leaves in the address registers, None leaves them alone.
    """

    __slots__ = ("buffer", "error_stack", "interface", "number", "reply", "spa")

    def __init__(self, interface: MailboxInterface, number: int, spa: int, buffer: bytes) -> None:
        self.interface = interface
        self.number = number
        self.spa = spa
        self.buffer = buffer
        self.reply: bytes | None = None
        self.error_stack: int | None = None


CommandHandler = Callable[["Machine", Command], int]
"""Runs a command and returns its status. A status that is not success leaves the machine as it was."""


class AspCommandEntry(NamedTuple):
    """What a plugin registers for a command: its name, the bytes of its buffer that are read, its handler."""

    name: str
    buffer_bytes: int
    handler: CommandHandler


class Mailbox(Stateful):
    """The registers of one mailbox; power-on value 0 means ready."""

    command_response: int = 0
    address_low: int = 0
    address_high: int = 0


class Asp(Stateful):
    """State of the function; `present` False makes every register read all ones."""

    device_id: int = 0
    present: bool = True
    interrupt_enable: int = 0
    interrupt_status: int = 0
    interrupts_raised: int = 0
    mailboxes: StateDict[str, Mailbox] = new(StateDict)

    def configuration_word(self, offset: int) -> int:
        """32 bits of PCI configuration space at `offset` (multiple of 4): vendor, device, class, BAR 2."""
        if not self.present:
            return ALL_ONES
        return {0x00: self.device_id << 16 | PCI_VENDOR_AMD, 0x08: 0x1080_0000, 0x18: 0x0000_0004}.get(offset, 0)

    def read(self, machine: Machine, offset: int) -> int:
        """32 bits of the register BAR at byte `offset`; what nobody declared reads zero."""
        if not self.present:
            return ALL_ONES
        register = machine.tables.asp_registers.get(offset)
        return 0 if register is None or register.read is None else register.read(machine) & ALL_ONES

    def write(self, machine: Machine, offset: int, value: int) -> None:
        """Store 32 bits to the register BAR at byte `offset`; what nobody declared ignores it."""
        if not self.present:
            return
        register = machine.tables.asp_registers.get(offset)
        if register is not None and register.write is not None:
            register.write(machine, value & ALL_ONES)

    def complete(self, interface: MailboxInterface, *, interrupt: bool) -> None:
        """Raise the completion interrupt where the driver asked for it and enabled it."""
        if interrupt and interface.interrupt_bit:
            self.interrupt_status |= interface.interrupt_bit
            if self.interrupt_enable & interface.interrupt_bit:
                self.interrupts_raised += 1


def mailbox_registers(interface: MailboxInterface) -> dict[int, AspRegister]:
    """The three registers of a mailbox, ready to be registered."""

    def mailbox(machine: Machine) -> Mailbox:
        return machine.asp.mailboxes[interface.name]

    def write_low(machine: Machine, value: int) -> None:
        mailbox(machine).address_low = value

    def write_high(machine: Machine, value: int) -> None:
        mailbox(machine).address_high = value

    def write_command(machine: Machine, value: int) -> None:
        box = mailbox(machine)
        run_command(
            machine,
            interface,
            value >> COMMAND_SHIFT & interface.command_mask,
            box.address_high << 32 | box.address_low,
            interrupt=bool(value & INTERRUPT_ON_COMPLETION),
        )

    return {
        interface.command_register: AspRegister(lambda machine: mailbox(machine).command_response, write_command),
        interface.address_low_register: AspRegister(lambda machine: mailbox(machine).address_low, write_low),
        interface.address_high_register: AspRegister(lambda machine: mailbox(machine).address_high, write_high),
    }


class Completion(NamedTuple):
    """How a command ended: its status, its buffer afterwards, and the error stack (None: the registers stay)."""

    status: int
    buffer: bytes
    error_stack: int | None


def execute(machine: Machine, interface: MailboxInterface, number: int, spa: int) -> Completion:
    """Run one command without the registers: fetch its buffer once, call its handler, write back what it answers."""
    entry = machine.tables.asp_commands.get((interface.name, number))
    if entry is None:
        return Completion(interface.unknown_command, b"", None)
    buffer = b""
    if entry.buffer_bytes:
        fetched = machine.access.asp_fetch(spa, entry.buffer_bytes)
        if fetched is None:
            return Completion(interface.bad_address, b"", None)
        buffer = fetched
    command = Command(interface, number, spa, buffer)
    status = entry.handler(machine, command)
    if command.reply is not None:
        machine.access.asp_store(spa, command.reply)
        buffer = command.reply + buffer[len(command.reply) :]
    return Completion(status, buffer, command.error_stack)


def run_command(machine: Machine, interface: MailboxInterface, number: int, spa: int, *, interrupt: bool) -> None:
    """Run one command and say done in the registers."""
    done = execute(machine, interface, number, spa)
    box = machine.asp.mailboxes[interface.name]
    if done.error_stack is not None:
        box.address_low = done.error_stack & ALL_ONES
        box.address_high = done.error_stack >> 32 & ALL_ONES
    box.command_response = RESPONSE | number << COMMAND_SHIFT & 0x7FF_0000 | done.status & STATUS_MASK
    machine.asp.complete(interface, interrupt=interrupt)
    machine.emit(AspStatus(number, done.status, done.buffer))
