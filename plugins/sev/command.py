"""One declaration per mailbox command: everything that follows from it is derived here.

A `MailboxCommand` names the number, the layout of its command buffer, which fields the firmware writes back, and the
handler. From it come the entry in the machine's dispatch table (with the checks that all commands share: early
checks, platform state, reserved bits), the mutations of its buffer for fuzzing, its row in the documentation, and what
`sevlab show command` prints. A `Family` is a set of commands with one automaton: the legacy commands are one, SNP's
another on the same mailbox.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from sevlab.core.asp import AspCommandEntry
from sevlab.core.layout import FieldInfo, FieldValue, Kind, Layout
from sevlab.core.payload import Message, Payload
from sevlab.plugins.sev.numbers import Command, Status

if TYPE_CHECKING:
    from sevlab.core import asp
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.machine import Machine
    from sevlab.core.statemachine import StateMachine
    from sevlab.core.vocabulary import Record

B = TypeVar("B", bound=Layout)

ERROR_CODE_BITS = 10
"""Width of one reason in the 64-bit error stack. Source: AMD-ASPFW sev_uapp/src/main.c, sev_error."""


class Request(Generic[B]):
    """One command under way: `buffer` is the snapshot of its command buffer at `spa`, taken once."""

    __slots__ = ("buffer", "changes", "command", "spa")

    def __init__(self, command: Command, spa: int, buffer: B) -> None:
        self.command = command
        self.spa = spa
        self.buffer = buffer
        self.changes: dict[str, FieldValue] = {}

    def answer(self, **fields: FieldValue) -> None:
        """Change these fields of the command buffer when the command has succeeded (or asks for a length)."""
        self.changes |= fields


Handler = Callable[["Machine", Request[Any]], Status]
"""Runs one command; a status that is not SUCCESS leaves the machine as it was, except where the docstring says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MailboxCommand:
    """Declaration of one command.

    `outputs`: fields of the command buffer that the firmware writes; with `length_query` also when it answers
    INVALID_LENGTH. `firmware_page`: while SNP is initialised the buffer must lie in a page of the firmware, which goes
    back to the host afterwards. `early`: a check that precedes the platform state's. `reserved`: the status for
    reserved fields that are not zero, None where the firmware does not look, or looks later (the handler calls
    `reserved_set`).
    """

    command: Command
    handler: Handler
    buffer: type[Layout] | None = None
    outputs: tuple[str, ...] = ()
    firmware_page: bool = False
    length_query: bool = False
    early: Callable[[Any], Status] | None = None
    reserved: Status | None = None

    @property
    def buffer_bytes(self) -> int:
        """Length of the command buffer, 0 for none."""
        return 0 if self.buffer is None else self.buffer.SIZE

    @property
    def summary(self) -> str:
        """First paragraph of the handler's documentation, without the source."""
        return " ".join((self.handler.__doc__ or "").split("\n\n")[0].partition("Source:")[0].split())


class Family(NamedTuple):
    """Commands that share a mailbox and an automaton; `state` reads the automaton's state of a machine."""

    interface: str
    automaton: StateMachine[Any, Command, Status]
    state: Callable[[Machine], IntEnum]


class NoBuffer(Layout, size=1):
    """Stands for the command buffer of a command without one."""


_NO_BUFFER = NoBuffer.from_bytes(b"\0")


def reserved_set(layout: type[Layout], buffer: Layout) -> bool:
    """Whether a reserved field of the command buffer is not zero."""
    return any(_reserved_value(info, getattr(buffer, info.name)) for info in layout.FIELDS.values() if info.reserved)


def _reserved_value(info: FieldInfo, value: Any) -> bool:
    return any(value) if info.kind is Kind.BYTES else bool(value & info.reserved)


def register(builder: PluginBuilder, family: Family, commands: Iterable[MailboxCommand]) -> None:
    """Put the commands of a family into the machine's dispatch table."""
    for declared in commands:
        builder.asp_commands.add((family.interface, int(declared.command)), entry(family, declared))


def entry(family: Family, declared: MailboxCommand) -> AspCommandEntry:
    """The dispatch entry of one command: early check, platform state, reserved bits, handler, in this order."""
    number, layout, handler, early = declared.command, declared.buffer, declared.handler, declared.early
    allows, state_of, reject = family.automaton.allows, family.state, family.automaton.reject
    reserved, length_query = declared.reserved, declared.length_query

    def check(machine: Machine, buffer: Layout) -> Status:
        status = early(buffer) if early is not None else Status.SUCCESS
        if status:
            return status
        if not allows(state_of(machine), number):
            return reject
        if reserved is not None and layout is not None and reserved_set(layout, buffer):
            return reserved
        return Status.SUCCESS

    def run(machine: Machine, command: asp.Command) -> int:
        buffer = _NO_BUFFER if layout is None else layout.from_bytes(command.buffer)
        request: Request[Any] = Request(number, command.spa, buffer)
        status = check(machine, buffer) or handler(machine, request)
        if request.changes and (not status or (length_query and status == Status.INVALID_LENGTH)):
            command.reply = buffer.patch(command.buffer, **request.changes)
        command.error_stack = error_stack(status)
        return status

    return AspCommandEntry(number.name, declared.buffer_bytes, run)


def _place(_machine: Machine, record: Record) -> int | None:
    """Where a command buffer lies."""
    return getattr(record, "spa", 0) or None


def mailbox_payload(family: Family, commands: Iterable[MailboxCommand]) -> Payload:
    """What the step `asp.command` and its outcome carry for the commands of a family."""
    numbers = frozenset(int(declared.command) for declared in commands)

    def message_of(record: Record) -> int | None:
        interface, number = getattr(record, "interface", None), getattr(record, "command", None)
        return number if interface == family.interface and number in numbers else None

    messages = tuple(
        Message(
            int(declared.command),
            declared.command.name,
            declared.buffer,
            {"interface": family.interface, "command": int(declared.command)},
            needs=() if declared.buffer is None else tuple(declared.buffer.FIELDS),
        )
        for declared in commands
    )
    return Payload("asp.command", "buffer", message_of, messages, place_of=_place, answer=("asp-status", "buffer"))


def error_stack(status: Status) -> int:
    """What the firmware leaves in the address registers: a stack of 10-bit reasons, 0 after success.

    The registers change with every command, so that no driver may rely on them. Which reasons an error pushes is the
    firmware's own affair; here it is the status alone. UNVERIFIED. Source: AMD-ASPFW sev_uapp/src/main.c.
    """
    return status & ((1 << ERROR_CODE_BITS) - 1)


def markdown_table(family: Family, commands: Iterable[MailboxCommand]) -> str:
    """The commands for documentation: number, buffer, states, what it does."""
    lines = ["| Id | Command | Buffer | Written back | Platform states | |", "| --- | --- | --- | --- | --- | --- |"]
    for declared in commands:
        states = [state.name for state in family.automaton.states if family.automaton.allows(state, declared.command)]
        buffer = f"{declared.buffer.__name__} ({declared.buffer_bytes:#x})" if declared.buffer is not None else "none"
        where = "any" if len(states) == len(family.automaton.states) else ", ".join(states)
        outputs = ", ".join(f"`{name}`" for name in declared.outputs)
        lines.append(
            f"| {declared.command:#04x} | `{declared.command.name}` | {buffer} | {outputs} | {where} |"
            f" {declared.summary} |"
        )
    return "\n".join(lines)
