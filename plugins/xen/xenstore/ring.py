"""The daemon's end of a domain's ring.

A page of the guest's: the daemon reads each index once, checks it, and copies. A page that the guest has made private
holds ciphertext for it, whose indices are further apart than the ring is long: it reports that in the page and serves
the ring no more.
Source: Xen docs/misc/xenstore-ring.txt; tools/xenstored/domain.c (readchn, writechn, domain_can_read), core.c
(handle_input, handle_output, ignore_connection).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.units import MASK32
from sevlab.plugins.xen import events
from sevlab.plugins.xen.frames import fetch, page_of, store
from sevlab.plugins.xen.layout import XenstoreInterface, XsdSockmsg
from sevlab.plugins.xen.numbers import Param
from sevlab.plugins.xen.state import Backend, Domain, backend_channel, xen
from sevlab.plugins.xen.xenstore.requests import process
from sevlab.plugins.xen.xenstore.wire import FEATURES, MAX_OUTSTANDING, PAYLOAD_MAX, XsError

if TYPE_CHECKING:
    from sevlab.core.machine import Machine
    from sevlab.plugins.xen.xenstore.store import Connection

RING_BYTES = 1024
HEAD_BYTES = XsdSockmsg.SIZE
FIELDS = XenstoreInterface.FIELDS
REQUEST, REPLY = FIELDS["req"].offset, FIELDS["rsp"].offset


def page_spa(machine: Machine, domain: Domain) -> int | None:
    """The ring's page, where the guest has it."""
    gfn = domain.params.get(Param.STORE_PFN)
    return None if gfn is None else page_of(machine, domain, gfn)


def open_ring(machine: Machine, spa: int) -> None:
    """Tell the guest what the daemon can do."""
    store(machine, spa + FIELDS["server_features"].offset, FEATURES.to_bytes(4, "little"))


def serve(machine: Machine, domain: Domain) -> None:
    """Take what the domain has asked, answer, and give everybody their events as far as there is room."""
    _serve(machine, domain)
    deliver(machine)


def deliver(machine: Machine) -> None:
    """Send what waits, wherever there is room."""
    state = xen(machine)
    for domid, connection in state.xenstore.connections.items():
        if connection.outgoing and domid in state.domains:
            _serve(machine, state.domains[domid])


def close(machine: Machine, domain: Domain, error: XsError) -> None:
    """Serve a ring no more, and say why. Watches and transactions are forgotten."""
    connection = xen(machine).xenstore.connections[domain.domid]
    spa = page_spa(machine, domain)
    if spa is not None:
        store(machine, spa + FIELDS["error"].offset, int(error).to_bytes(4, "little"))
    connection.ignored = True
    connection.incoming, connection.outgoing, connection.watches = b"", (), ()
    connection.transactions.clear()


def _serve(machine: Machine, domain: Domain) -> None:
    connection = xen(machine).xenstore.connections.get(domain.domid)
    spa = page_spa(machine, domain)
    if connection is None or spa is None:
        return
    moved = False
    while not connection.ignored and (
        _take(machine, domain, connection, spa) or _put(machine, domain, connection, spa)
    ):
        moved = True
    channel = backend_channel(domain, Backend.XENSTORE)
    if moved and channel is not None:
        events.set_pending(machine, domain, channel)


def _index(machine: Machine, spa: int, name: str) -> int:
    return int.from_bytes(fetch(machine, spa + FIELDS[name].offset, 4), "little")


def _move(machine: Machine, spa: int, name: str, value: int) -> bool:
    return store(machine, spa + FIELDS[name].offset, (value & MASK32).to_bytes(4, "little"))


def _take(machine: Machine, domain: Domain, connection: Connection, spa: int) -> bool:
    """Read towards the end of one message, and carry it out when it is whole; False when nothing was read."""
    if not connection.privileged and sum(not waiting.event for waiting in connection.outgoing) >= MAX_OUTSTANDING:
        return False
    consumed, produced = _index(machine, spa, "req_cons"), _index(machine, spa, "req_prod")
    available = produced - consumed & MASK32
    if available > RING_BYTES:
        close(machine, domain, XsError.RINGIDX)
        return False
    count = min(_wanted(connection.incoming), available)
    if not count:
        return False
    if not _move(machine, spa, "req_cons", consumed + count):
        return False
    connection.incoming += _read(machine, spa + REQUEST, consumed, count)
    if len(connection.incoming) >= HEAD_BYTES:
        length = XsdSockmsg.from_bytes(connection.incoming[:HEAD_BYTES]).len
        if length > PAYLOAD_MAX:
            close(machine, domain, XsError.PROTO)
        elif len(connection.incoming) == HEAD_BYTES + length:
            data, connection.incoming = connection.incoming, b""
            state = xen(machine)
            process(state.xenstore, connection, state.domains, data)
    return True


def _wanted(incoming: bytes) -> int:
    """Bytes to the end of the head, or of the message."""
    if len(incoming) < HEAD_BYTES:
        return HEAD_BYTES - len(incoming)
    return HEAD_BYTES + XsdSockmsg.from_bytes(incoming[:HEAD_BYTES]).len - len(incoming)


def _read(machine: Machine, spa: int, start: int, count: int) -> bytes:
    begin = start % RING_BYTES
    inside = min(count, RING_BYTES - begin)
    return fetch(machine, spa + begin, inside) + (fetch(machine, spa, count - inside) if count > inside else b"")


def _put(machine: Machine, domain: Domain, connection: Connection, spa: int) -> bool:
    """Write as much of the first message as there is room for; False when there is none."""
    if not connection.outgoing:
        return False
    consumed, produced = _index(machine, spa, "rsp_cons"), _index(machine, spa, "rsp_prod")
    waiting = produced - consumed & MASK32
    if waiting > RING_BYTES:
        close(machine, domain, XsError.RINGIDX)
        return False
    first, *rest = connection.outgoing
    piece = first.left[: RING_BYTES - waiting]
    if not piece:
        return False
    begin = produced % RING_BYTES
    inside = RING_BYTES - begin
    if not store(machine, spa + REPLY + begin, piece[:inside]):
        return False
    if len(piece) > inside:
        store(machine, spa + REPLY, piece[inside:])
    _move(machine, spa, "rsp_prod", produced + len(piece))
    left = first._replace(left=first.left[len(piece) :])
    connection.outgoing = (left, *rest) if left.left else tuple(rest)
    return True
