"""A guest's end of the xenstore ring. Source: Linux drivers/xen/xenbus/xenbus_comms.c (xb_write, xb_read)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.units import MASK32, PAGE_SHIFT
from sevlab.plugins.xen.layout import XenstoreInterface, XsdSockmsg
from sevlab.plugins.xen.numbers import Evtchnop, Nr, Param
from sevlab.plugins.xen.xenstore.wire import XsType, joined, message, text

if TYPE_CHECKING:
    from sevlab.plugins.xen.guest import XenGuest

FIELDS = XenstoreInterface.FIELDS
REQUEST, REPLY, RING_BYTES = FIELDS["req"].offset, FIELDS["rsp"].offset, FIELDS["req"].length_bytes


class XenstoreClient:
    """One request at a time; watch events that come meanwhile are kept in `events`, as (path, token)."""

    def __init__(self, guest: XenGuest) -> None:
        self._guest = guest
        self._ring, self._port = guest.param(Param.STORE_PFN) << PAGE_SHIFT, guest.param(Param.STORE_EVTCHN)
        self._waiting, self._received, self._req_id = b"", b"", 0
        self.events: list[tuple[str, str]] = []

    def ask(self, kind: XsType, *parts: str, value: bytes = b"", tx_id: int = 0) -> tuple[int, bytes]:
        """(type, payload) of the reply to strings and a value; (ERROR, nothing) when the daemon is silent."""
        return self.request(kind, joined(parts) + value, tx_id)

    def request(self, kind: int, payload: bytes, tx_id: int = 0) -> tuple[int, bytes]:
        """The same with any payload."""
        self._req_id += 1
        self._waiting += message(kind, payload, self._req_id, tx_id)
        moved = True
        while moved:
            moved = self._exchange()
            while (found := self._next()) is not None:
                head, body = found
                if head.type != XsType.WATCH_EVENT and head.req_id == self._req_id:
                    return head.type, body
        return XsType.ERROR, b""

    def collect(self) -> list[tuple[str, str]]:
        """The events that have come since the last time."""
        moved = True
        while moved:
            moved = self._exchange()
            while self._next() is not None:
                pass
        came, self.events = self.events, []
        return came

    def _next(self) -> tuple[XsdSockmsg, bytes] | None:
        """The next whole message that was received; an event is noted."""
        if len(self._received) < XsdSockmsg.SIZE:
            return None
        head = XsdSockmsg.from_bytes(self._received[: XsdSockmsg.SIZE])
        end = XsdSockmsg.SIZE + head.len
        if len(self._received) < end:
            return None
        body, self._received = self._received[XsdSockmsg.SIZE : end], self._received[end:]
        if head.type == XsType.WATCH_EVENT:
            path, token, *_ = text(body).split("\0")
            self.events.append((path, token))
        return head, body

    def _exchange(self) -> bool:
        """Write what there is room for, notify, read what is there; whether anything moved."""
        sent = self._write()
        self._guest.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.SEND, port=self._port)
        data = self._read()
        self._received += data
        return bool(sent or data)

    def _index(self, name: str) -> int:
        return self._guest.number(self._ring + FIELDS[name].offset)

    def _move(self, name: str, value: int) -> None:
        self._guest.write(self._ring + FIELDS[name].offset, (value & MASK32).to_bytes(4, "little"))

    def _write(self) -> int:
        produced, begin = self._index("req_prod"), self._index("req_prod") % RING_BYTES
        room = max(0, RING_BYTES - (produced - self._index("req_cons") & MASK32))
        piece, self._waiting = self._waiting[:room], self._waiting[room:]
        for at, part in ((begin, piece[: RING_BYTES - begin]), (0, piece[RING_BYTES - begin :])):
            if part:
                self._guest.write(self._ring + REQUEST + at, part)
        self._move("req_prod", produced + len(piece))
        return len(piece)

    def _read(self) -> bytes:
        consumed, produced = self._index("rsp_cons"), self._index("rsp_prod")
        whole, begin = self._guest.read(self._ring + REPLY, RING_BYTES), consumed % RING_BYTES
        self._move("rsp_cons", produced)
        return (whole[begin:] + whole[:begin])[: min(produced - consumed & MASK32, RING_BYTES)]
