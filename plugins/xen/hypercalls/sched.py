"""sched_op and set_timer_op. Source: Xen xen/common/sched/core.c."""

from __future__ import annotations

from typing import Any

from sevlab.plugins import io
from sevlab.plugins.xen import clock, events
from sevlab.plugins.xen.arguments import Poll, Poll32, RemoteShutdown, Shape, Shutdown, Watchdog
from sevlab.plugins.xen.call import Abi, Call
from sevlab.plugins.xen.frames import store, test_bit
from sevlab.plugins.xen.hypercalls.event_channel import valid
from sevlab.plugins.xen.numbers import Errno, Schedop
from sevlab.plugins.xen.operations import Operation, run_operation, signed
from sevlab.plugins.xen.state import xen

MAX_POLLED_PORTS = 128
WATCHDOGS = 2
"""Watchdog timers of a domain. Source: xen/include/xen/sched.h, NR_DOMAIN_WATCHDOG_TIMERS."""
SECOND = 1_000_000_000
FALLBACK = 100_000_000
"""A timer more than 2^50 ns ahead, or before the epoch, fires after 100 ms: a workaround for old guests."""


def yield_(call: Call, _argument: Any) -> int:
    """Let others run: there is nothing to wait for here."""
    return 0


def block(call: Call, _argument: Any) -> int:
    """Sleep until an event; with one pending already, no sleep."""
    if call.me.info_spa:
        store(call.machine, call.me.info_spa + 1, b"\0")
    call.vcpu.halted = True
    io.wake(call.machine, call.vcpu)
    return 0


def shutdown(call: Call, a: Any) -> int:
    """End the domain."""
    clock.shut_down(call.machine, call.domain, a.reason & 0xFF)
    return 0


def shutdown_code(call: Call, a: Any) -> int:
    """Say why the domain will end; only the first counts."""
    if call.domain.shutdown_code is None:
        call.domain.shutdown_code = a.reason & 0xFF
    return 0


def poll(call: Call, a: Any) -> int:
    """Sleep until one of some ports is pending, or a time has come; pending ones are not acknowledged."""
    if a.nr_ports > MAX_POLLED_PORTS:
        return -Errno.EINVAL
    if call.me.info_spa and test_bit(call.machine, call.me.info_spa, 0):
        return 0
    ports = []
    for index in range(a.nr_ports):
        data = call.copy_in(a.ports + index * 4 & call.mask, 4)
        if data is None:
            return -Errno.EFAULT
        port = int.from_bytes(data, "little")
        result = _poll_port(call, port)
        if result:
            return min(result, 0)
        ports.append(port)
    _sleep(call, tuple(ports), a.timeout)
    return 0


def _poll_port(call: Call, port: int) -> int:
    """1 when the port is pending, 0 when not, a negated `Errno` when it is none."""
    channel = call.domain.channels.get(port)
    if not valid(call.domain, port) or channel is None or channel.xen_consumer:
        return -Errno.EINVAL
    return int(events.is_pending(call.machine, call.domain, port))


def _sleep(call: Call, ports: tuple[int, ...], until: int) -> None:
    call.me.polling = ports if len(ports) == 1 else ()  # with several, any event wakes it
    call.me.poll_until = until
    call.vcpu.halted = True


def fast_poll(call: Call, a: Any) -> int:
    """The same for one port in a register."""
    if call.me.info_spa and test_bit(call.machine, call.me.info_spa, 0):
        return 0
    result = _poll_port(call, a.ports & 0xFFFF_FFFF)
    if result:
        return min(result, 0)
    _sleep(call, (a.ports & 0xFFFF_FFFF,), a.timeout)
    return 0


def remote_shutdown(call: Call, a: Any) -> int:
    """End another domain."""
    domain = xen(call.machine).domains.get(a.domain_id)
    if domain is None:
        return -Errno.ESRCH
    if not call.domain.is_control:
        return -Errno.EPERM
    clock.shut_down(call.machine, domain, a.reason & 0xFF)
    return 0


def watchdog(call: Call, a: Any) -> int:
    """Set, renew (id from 1) or stop (timeout 0) a watchdog; setting returns the id."""
    dogs = call.domain.watchdogs
    if a.id > WATCHDOGS:
        return -Errno.EINVAL
    due = clock.now(call.machine) + a.timeout * SECOND
    if a.id == 0:
        free = next((slot for slot in range(WATCHDOGS) if slot not in dogs), None)
        if free is None:
            return -Errno.ENOSPC
        dogs[free] = due
        return free + 1
    slot = a.id - 1
    if slot not in dogs:
        return -Errno.EINVAL
    if a.timeout == 0:
        del dogs[slot]
    else:
        dogs[slot] = due
    return 0


def pin_override(call: Call, _handle: Any) -> int:
    """For the hardware domain, which has one processor to pin to."""
    return 0 if call.domain.is_control else -Errno.EPERM


OPERATIONS: dict[int, Operation] = {
    Schedop.YIELD: Operation(yield_, fast=()),
    Schedop.BLOCK: Operation(block, fast=()),
    Schedop.SHUTDOWN: Operation(shutdown, Shutdown, (), (("reason", 2),)),
    Schedop.POLL: Operation(poll, Shape(Poll, Poll32)),
    Schedop.REMOTE_SHUTDOWN: Operation(remote_shutdown, RemoteShutdown),
    Schedop.SHUTDOWN_CODE: Operation(shutdown_code, Shutdown, (), (("reason", 2),)),
    Schedop.WATCHDOG: Operation(watchdog, Watchdog, (), (("id", 2), ("timeout", 3))),
    Schedop.PIN_OVERRIDE: Operation(pin_override, fast=()),
}
FAST_OPERATIONS: dict[int, Operation] = {
    **OPERATIONS,
    Schedop.POLL: Operation(fast_poll, Poll, (), (("timeout", 2), ("ports", 3))),
}


def sched_op(call: Call) -> int:
    """Hypercall sched_op of cmd, ptr."""
    command, handle = call.args
    return run_operation(call, FAST_OPERATIONS if call.abi is Abi.FAST else OPERATIONS, command, handle)


def set_timer_op(call: Call) -> int:
    """Hypercall set_timer_op of timeout: absolute nanoseconds, in two halves from 32-bit callers; 0 stops the timer."""
    timeout = signed(call.args[0], 64)
    moment = clock.now(call.machine)
    if timeout == 0:
        call.me.singleshot = 0
    elif timeout < 0 or (timeout - moment > 0 and (timeout - moment) >> 50 & 0xFFFF_FFFF):
        call.me.singleshot = moment + FALLBACK
    else:
        call.me.singleshot = timeout
    return 0
