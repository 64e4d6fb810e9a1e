"""Ring-buffer mode: two queues of commands in memory, and the three mailbox registers with other meanings.

CmdResp is the host's control word, AddrHi the host's tails, AddrLo the firmware's heads. Each write of the control
word lets the firmware work until both queues are empty or paused. Linux does not use it.
Source: AMD-ASPFW sev_uapp/src/{sev_ring_buffer,main}.c.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from sevlab.core.asp import ALL_ONES, RESPONSE, AspRegister, Mailbox, MailboxInterface, execute
from sevlab.core.events import AspStatus
from sevlab.core.layout import Layout, bits, flag, u16, u32, u64
from sevlab.core.units import PAGE_BYTES, is_aligned
from sevlab.plugins.sev import transfers
from sevlab.plugins.sev.buffers import RingBuffer
from sevlab.plugins.sev.command import Request
from sevlab.plugins.sev.context import Ring, sev_state
from sevlab.plugins.sev.numbers import Status

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.machine import Machine

_SOURCE = "sev_ring_buffer.h"
ENTRY_BYTES = 16
ENTRIES = PAGE_BYTES // ENTRY_BYTES


class RingControl(Layout, size=4):
    """CmdResp in ring-buffer mode; only the host writes it."""

    low_empty_interrupt = flag(0, u32, 0, source=_SOURCE)
    high_empty_interrupt = flag(0, u32, 1, source=_SOURCE)
    resume_low = flag(0, u32, 8, source=_SOURCE)
    resume_high = flag(0, u32, 9, source=_SOURCE)
    clear_interrupts = flag(0, u32, 29, source=_SOURCE)
    active = flag(0, u32, 30, source=_SOURCE)
    host_control = flag(0, u32, 31, source=_SOURCE)


class RingTail(Layout, size=4):
    """AddrHi in ring-buffer mode; only the host writes it."""

    low = bits(0, u32, 7, 0, source=_SOURCE)
    high = bits(0, u32, 23, 16, source=_SOURCE)


class RingHead(Layout, size=4):
    """AddrLo in ring-buffer mode; only the firmware writes it."""

    low = bits(0, u32, 7, 0, source=_SOURCE)
    low_running = flag(0, u32, 11, source=_SOURCE)
    high = bits(0, u32, 23, 16, source=_SOURCE)
    high_running = flag(0, u32, 27, source=_SOURCE)
    all_empty = flag(0, u32, 28, source=_SOURCE)
    command_done = flag(0, u32, 29, source=_SOURCE)
    queue_paused = flag(0, u32, 30, source=_SOURCE)
    queue_free = flag(0, u32, 31, source=_SOURCE)


class RingCommand(Layout, size=ENTRY_BYTES):
    """An entry of a queue of commands."""

    command = u16(0x0, source=_SOURCE)
    interrupt_on_completion = flag(0x2, u16, 0, source=_SOURCE)
    continue_on_error = flag(0x2, u16, 1, source=_SOURCE)
    software_data = u32(0x4, source=_SOURCE)
    buffer_spa = u64(0x8, source=_SOURCE)


class RingStatus(Layout, size=ENTRY_BYTES):
    """An entry of a queue of statuses."""

    status = u16(0x0, source=_SOURCE)
    error_stack = u64(0x8, source=_SOURCE)


class Queue(IntEnum):
    """The two queues, the more urgent first."""

    HIGH = 0
    LOW = 1


def ring_buffer(machine: Machine, request: Request[RingBuffer]) -> Status:
    """Enter ring-buffer mode with the next command.

    Source: AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_ring_buffer (order of checks).
    """
    ring, buffer = sev_state(machine).ring, request.buffer
    if ring.enabled or buffer.low_pages != 1 or buffer.high_pages > 1:
        return Status.INVALID_PARAM
    pages = [buffer.low_commands_spa, buffer.low_statuses_spa]
    outputs = [buffer.low_statuses_spa]
    if buffer.high_pages:
        pages += [buffer.high_commands_spa, buffer.high_statuses_spa]
        outputs.append(buffer.high_statuses_spa)
    if not all(is_aligned(spa, PAGE_BYTES) and transfers.valid_range(machine, spa, PAGE_BYTES) for spa in pages):
        return Status.INVALID_ADDRESS
    for spa in outputs:
        status = transfers.output_status(machine, spa, PAGE_BYTES)
        if status:
            return status
    ring.enabled = True
    ring.commands_spa = (buffer.high_commands_spa * buffer.high_pages, buffer.low_commands_spa)
    ring.statuses_spa = (buffer.high_statuses_spa * buffer.high_pages, buffer.low_statuses_spa)
    ring.thresholds = (buffer.high_threshold * buffer.high_pages, buffer.low_threshold)
    ring.interrupt_on_empty = bool(buffer.interrupt_on_empty)
    ring.tail = 0
    ring.head = _word(RingHead.build(low_running=1, high_running=buffer.high_pages))
    return Status.SUCCESS


def _word(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _bytes(word: int) -> bytes:
    return word.to_bytes(4, "little")


def register(builder: PluginBuilder, interface: MailboxInterface) -> None:
    """Give the mailbox's registers their second meaning."""

    def command_register(plain: AspRegister) -> AspRegister:
        def read(machine: Machine) -> int:
            ring = sev_state(machine).ring
            return ring.control if ring.active else _read(plain, machine)

        def write(machine: Machine, value: int) -> None:
            if sev_state(machine).ring.enabled:
                work(machine, interface, value)
            else:
                _write(plain, machine, value)

        return AspRegister(read, write)

    def tail_register(plain: AspRegister) -> AspRegister:
        def read(machine: Machine) -> int:
            ring = sev_state(machine).ring
            return ring.tail if ring.enabled else _read(plain, machine)

        def write(machine: Machine, value: int) -> None:
            ring = sev_state(machine).ring
            if ring.enabled:
                ring.tail = value
            else:
                _write(plain, machine, value)

        return AspRegister(read, write)

    def head_register(plain: AspRegister) -> AspRegister:
        def read(machine: Machine) -> int:
            ring = sev_state(machine).ring
            return ring.head if ring.enabled else _read(plain, machine)

        def write(machine: Machine, value: int) -> None:
            if not sev_state(machine).ring.enabled:
                _write(plain, machine, value)

        return AspRegister(read, write)

    builder.asp_registers.replace(interface.command_register, command_register)
    builder.asp_registers.replace(interface.address_high_register, tail_register)
    builder.asp_registers.replace(interface.address_low_register, head_register)


def _read(register_: AspRegister, machine: Machine) -> int:
    return 0 if register_.read is None else register_.read(machine)


def _write(register_: AspRegister, machine: Machine, value: int) -> None:
    if register_.write is not None:
        register_.write(machine, value)


def work(machine: Machine, interface: MailboxInterface, control_word: int) -> None:
    """The host wrote the control word: leave the mode, or work off the queues."""
    ring = sev_state(machine).ring
    control = RingControl.from_bytes(_bytes(control_word))
    if not (control.active and control.host_control):
        _leave(machine, interface)
        return
    ring.active = True
    ring.control = control_word
    head = RingHead.from_bytes(_bytes(ring.head))
    if control.clear_interrupts:
        head = head.replace(all_empty=0, command_done=0, queue_paused=0, queue_free=0)
    head = head.replace(
        low_running=head.low_running | control.resume_low,
        high_running=head.high_running | (control.resume_high if ring.commands_spa[Queue.HIGH] else 0),
    )
    ring.head = _word(head.to_bytes())
    interrupt = False
    while (queue := _next_queue(ring, control)) is not None:
        interrupt |= _run_entry(machine, interface, queue)
        if not ring.enabled:
            break
    if ring.enabled and ring.interrupt_on_empty:
        _set(ring, all_empty=1)
        interrupt = True
    machine.asp.complete(interface, interrupt=interrupt)


def _leave(machine: Machine, interface: MailboxInterface) -> None:
    """A word without both mode bits ends the mode; whatever command it holds is not run."""
    ring = sev_state(machine).ring
    ring.enabled = ring.active = False
    box: Mailbox = machine.asp.mailboxes[interface.name]
    box.command_response = RESPONSE | Status.RING_BUFFER_EXIT
    machine.asp.complete(interface, interrupt=True)
    machine.emit(AspStatus(0, Status.RING_BUFFER_EXIT, b""))


def _set(ring: Ring, **fields: int) -> None:
    ring.head = _word(RingHead.from_bytes(_bytes(ring.head)).replace(**fields).to_bytes())


def _places(ring: Ring) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(head, tail, running) of the high and of the low queue."""
    head, tail = RingHead.from_bytes(_bytes(ring.head)), RingTail.from_bytes(_bytes(ring.tail & ALL_ONES))
    return (head.high, tail.high, head.high_running), (head.low, tail.low, head.low_running)


def _next_queue(ring: Ring, control: RingControl) -> Queue | None:
    """The queue to serve, the high one first; a queue whose resume bit is still set waits for it to be cleared.

    On the way a queue with fewer entries than its threshold tells the host, if that wants to know.
    """
    resuming = (control.resume_high, control.resume_low)
    wants = (control.high_empty_interrupt, control.low_empty_interrupt)
    for queue, (head, tail, running) in zip(Queue, _places(ring), strict=True):
        if not running or resuming[queue]:
            continue
        if (tail - head) % ENTRIES < ring.thresholds[queue] and wants[queue]:
            _set(ring, queue_free=1)
        if head != tail:
            return queue
    return None


def _run_entry(machine: Machine, interface: MailboxInterface, queue: Queue) -> bool:
    """Run the command at the head of a queue and store its status; whether the host is interrupted."""
    ring = sev_state(machine).ring
    index = _places(ring)[queue][0]
    statuses_spa = ring.statuses_spa[queue]
    fetched = machine.access.asp_fetch(ring.commands_spa[queue] + index * ENTRY_BYTES, ENTRY_BYTES)
    assert fetched is not None  # RING_BUFFER has checked the page
    entry = RingCommand.from_bytes(fetched)
    done = execute(machine, interface, entry.command, entry.buffer_spa)
    machine.emit(AspStatus(entry.command, done.status, done.buffer))
    stored = RingStatus.build(status=done.status, error_stack=done.error_stack or 0)
    machine.access.asp_store(statuses_spa + index * ENTRY_BYTES, stored)
    if not ring.enabled:
        return True
    following = (index + 1) % ENTRIES
    _set(ring, **({"high": following} if queue is Queue.HIGH else {"low": following}))
    interrupt = bool(RingHead.from_bytes(_bytes(ring.head)).queue_free)
    if done.status and not entry.continue_on_error:
        _set(ring, queue_paused=1, **({"high_running": 0} if queue is Queue.HIGH else {"low_running": 0}))
        interrupt = True
    if entry.interrupt_on_completion:
        _set(ring, command_done=1)
        interrupt = True
    return interrupt
