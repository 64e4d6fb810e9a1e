"""DBG_DECRYPT and DBG_ENCRYPT: the hypervisor reads and writes guest memory, where the policy lets it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.memory import TAG_PUBLIC
from sevlab.plugins.sev import transfers
from sevlab.plugins.sev.buffers import Debug
from sevlab.plugins.sev.command import Request
from sevlab.plugins.sev.context import Gctx
from sevlab.plugins.sev.handlers.common import aligned16, live_guest
from sevlab.plugins.sev.numbers import Policy, Status

if TYPE_CHECKING:
    from sevlab.core.machine import Machine


def dbg_decrypt(machine: Machine, request: Request[Debug]) -> Status:
    """Plaintext of guest memory at `source_spa` to `destination_spa`.

    Source: 55766, DBG_DECRYPT; AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_dbg_decrypt (order of checks).
    """
    guest = _guest(machine, request.buffer)
    if isinstance(guest, Status):
        return guest
    buffer = request.buffer
    if not transfers.valid_range(machine, buffer.destination_spa, buffer.length):
        return Status.INVALID_ADDRESS
    data = transfers.read_guest(machine, guest, buffer.source_spa, buffer.length)
    if data is None:
        return Status.INVALID_ADDRESS
    transfers.write(machine, buffer.destination_spa, data, tag=TAG_PUBLIC)
    return Status.SUCCESS


def dbg_encrypt(machine: Machine, request: Request[Debug]) -> Status:
    """Bytes at `source_spa` into guest memory at `destination_spa`. Source: as DBG_DECRYPT."""
    guest = _guest(machine, request.buffer)
    if isinstance(guest, Status):
        return guest
    buffer = request.buffer
    data = transfers.read(machine, buffer.source_spa, buffer.length)
    if data is None or not transfers.valid_range(machine, buffer.destination_spa, buffer.length):
        return Status.INVALID_ADDRESS
    transfers.write_guest(machine, guest, buffer.destination_spa, data)
    return Status.SUCCESS


def _guest(machine: Machine, buffer: Debug) -> Gctx | Status:
    """The checks of both: alignment and length before the guest. What a length of 0 answers is UNVERIFIED."""
    if not aligned16(buffer.source_spa | buffer.destination_spa):
        return Status.INVALID_ADDRESS
    if not aligned16(buffer.length):
        return Status.INVALID_LENGTH
    guest = live_guest(machine, buffer.handle)
    if guest is None:
        return Status.INVALID_GUEST
    if guest.policy & Policy.NODBG:
        return Status.POLICY_FAILURE
    status = transfers.output_status(machine, buffer.destination_spa, buffer.length)
    if status:
        return status
    if not guest.asid:
        return Status.INACTIVE
    return guest if buffer.length else Status.INVALID_LENGTH
