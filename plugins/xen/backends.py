"""The other ends of a guest's console and xenstore channels, which live in a control domain that is not there.

A guest that notifies one is served at once. Source: Xen tools/console/daemon/io.c (buffer_append, handle_ring_write).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.events import Refused
from sevlab.core.units import MASK32
from sevlab.plugins.xen import events
from sevlab.plugins.xen.frames import fetch, page_of, store
from sevlab.plugins.xen.layout import XenconsInterface
from sevlab.plugins.xen.numbers import Param
from sevlab.plugins.xen.records import ConsoleInput, ConsoleOutput, XenstoreReply, XenstoreRequest
from sevlab.plugins.xen.state import Backend, Domain, EventChannel, backend_channel, xen
from sevlab.plugins.xen.xenstore import ring as xenstore_ring
from sevlab.plugins.xen.xenstore import toolstack

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

FIELDS = XenconsInterface.FIELDS
CONSOLE_KEPT = 4096
"""Bytes of a domain's console output that the model keeps."""
OUT_BYTES, IN_BYTES = FIELDS["output"].length_bytes, FIELDS["input"].length_bytes


def notify(machine: Machine, domain: Domain, channel: EventChannel) -> None:
    """The guest has sent an event to a backend."""
    if channel.backend is Backend.XENSTORE:
        xenstore_ring.serve(machine, domain)
    elif channel.backend is Backend.CONSOLE:
        output = take_output(machine, domain)
        if output:
            machine.emit(ConsoleOutput(domain.domid, output))
            tell(machine, domain)


# Console ----------------------------------------------------------------------------------------------------------


def _page(machine: Machine, domain: Domain) -> int | None:
    gfn = domain.params.get(Param.CONSOLE_PFN)
    return None if gfn is None else page_of(machine, domain, gfn)


def _snapshot(machine: Machine, domain: Domain) -> tuple[int, XenconsInterface] | None:
    """(SPA, contents) of the console ring; None where there is none, and where its indices cannot be: a backend that
    trusts no frontend gives up when they are further apart than the ring is long.
    """
    spa = _page(machine, domain)
    if spa is None:
        return None
    ring = XenconsInterface.from_bytes(fetch(machine, spa, XenconsInterface.SIZE))
    if ring.out_prod - ring.out_cons & MASK32 > OUT_BYTES or ring.in_prod - ring.in_cons & MASK32 > IN_BYTES:
        return None
    return spa, ring


def take_output(machine: Machine, domain: Domain) -> bytes:
    """What the guest wrote since the last time."""
    found = _snapshot(machine, domain)
    if found is None:
        return b""
    spa, ring = found
    waiting, begin = ring.out_prod - ring.out_cons & MASK32, ring.out_cons % OUT_BYTES
    output: bytes = (ring.output[begin:] + ring.output[:begin])[:waiting]
    store(machine, spa + FIELDS["out_cons"].offset, ring.out_prod.to_bytes(4, "little"))
    domain.console_output = (domain.console_output + output)[-CONSOLE_KEPT:]
    return output


def put_input(machine: Machine, domain: Domain, data: bytes) -> bytes:
    """Put bytes into the ring as far as there is room; those that are in it."""
    found = _snapshot(machine, domain)
    if found is None:
        return b""
    spa, ring = found
    piece, begin = data[: IN_BYTES - (ring.in_prod - ring.in_cons & MASK32)], ring.in_prod % IN_BYTES
    first = piece[: IN_BYTES - begin]
    for at, part in ((begin, first), (0, piece[len(first) :])):
        if part:
            store(machine, spa + FIELDS["input"].offset + at, part)
    store(machine, spa + FIELDS["in_prod"].offset, (ring.in_prod + len(piece) & MASK32).to_bytes(4, "little"))
    return piece


def tell(machine: Machine, domain: Domain) -> None:
    """Raise the console's event."""
    channel = backend_channel(domain, Backend.CONSOLE)
    if channel is not None:
        events.set_pending(machine, domain, channel)


# Steps ------------------------------------------------------------------------------------------------------------


def console_input(machine: Machine, step: ConsoleInput) -> None:
    """Somebody types, and the console's backend runs: it takes what is there, puts the input, and notifies."""
    domain = xen(machine).domains.get(step.domid)
    if domain is None:
        machine.emit(Refused(f"there is no domain {step.domid}"))
    elif _snapshot(machine, domain) is None:
        machine.emit(Refused("the domain has no console ring, or its indices are further apart than the ring is long"))
    else:
        output = take_output(machine, domain)
        piece = put_input(machine, domain, step.data)
        machine.emit(ConsoleOutput(step.domid, output))
        if output or piece:
            tell(machine, domain)


def xenstore_request(machine: Machine, step: XenstoreRequest) -> None:
    """The toolstack asks its xenstored."""
    machine.emit(XenstoreReply(*toolstack.request(machine, step.kind, step.payload, step.tx_id)))
