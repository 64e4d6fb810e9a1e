"""What most handlers do first: find the guest, look at its state, and move an automaton on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sevlab.plugins.sev.command import Request
from sevlab.plugins.sev.context import Gctx, SevState, sev_state
from sevlab.plugins.sev.numbers import Command, Status
from sevlab.plugins.sev.states import GUEST, PLATFORM

if TYPE_CHECKING:
    from sevlab.core.machine import Machine


def live_guest(machine: Machine, handle: int) -> Gctx | None:
    """The guest of a handle; None: INVALID_GUEST."""
    return sev_state(machine).guests.get(handle)


def allowed(guest: Gctx, command: Command) -> bool:
    """Whether the guest's state allows the command; else INVALID_GUEST_STATE."""
    return GUEST.allows(guest.state, command)


def guest_of(machine: Machine, request: Request[Any]) -> Gctx | Status:
    """The guest that a command names, in a state that allows it."""
    guest = live_guest(machine, request.buffer.handle)
    if guest is None:
        return Status.INVALID_GUEST
    return guest if allowed(guest, request.command) else Status.INVALID_GUEST_STATE


def active_guest_of(machine: Machine, request: Request[Any], *, vmsa: bool) -> Gctx | Status:
    """As `guest_of`, of a command that touches its memory; `vmsa`: it must be an SEV-ES guest."""
    guest = guest_of(machine, request)
    if isinstance(guest, Status):
        return guest
    if vmsa and not guest.es:
        return Status.UNSUPPORTED
    return guest if guest.asid else Status.INACTIVE


def move_guest(guest: Gctx, command: Command) -> None:
    """The guest's transition of an accepted command."""
    target = GUEST.next(guest.state, command)
    assert target is not None  # the handler has asked `allowed`
    guest.state = target


def move_platform(sev: SevState, command: Command) -> None:
    """The platform's transition of an accepted command."""
    target = PLATFORM.next(sev.state, command)
    assert target is not None  # the dispatcher has asked
    sev.state = target


def aligned16(number: int) -> bool:
    """Whether an address or length is a multiple of an AES block."""
    return not number & 0xF
