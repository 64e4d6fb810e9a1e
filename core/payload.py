"""What the bytes of a record's field are, as data: fuzzing, state feedback and readers of traces work on it.

A record carries a message: an SEV command and its buffer, a GHCB page, a value of the GHCB MSR. The plugin that
declares the message says here which one a record carries, how its bytes are laid out, and how a record comes to
carry it - so that nobody else needs to know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sevlab.core.layout import Layout
from sevlab.core.vocabulary import Record

if TYPE_CHECKING:
    from sevlab.core.machine import Machine


class Message(NamedTuple):
    """One message of a boundary.

    `number` and `name` as in the document; `layout` of its bytes (None: it has none). A record carries it when it has
    the values of `record`, and its bytes those of `fields`, which are also an example that is taken; `needs` names
    the other fields that are looked at. `units` says what a number in a field is: the name of a resource ("port",
    "msr", "leaf", "mmio"), or the layout of its 8 bytes. `examples` are more values of fields, to go over `fields`: the
    limits that the document names, and the first values past them; None: the field is not marked valid.
    """

    number: int
    name: str
    layout: type[Layout] | None = None
    record: Mapping[str, Any] = {}
    fields: Mapping[str, Any] = {}
    needs: tuple[str, ...] = ()
    units: Mapping[str, str | type[Layout]] = {}
    examples: tuple[Mapping[str, Any], ...] = ()


class Payload(NamedTuple):
    """Which messages the records of `kind` carry in `field`: bytes, or a number that is laid out (little-endian).

    `message_of` gives the number of a record's message, None for a record that carries none of these; `layout` is that
    of a message that nobody declares. `place_of` says where in memory (SPA) the bytes lie while they are read, for
    races. `answer` is the kind and the field of the outcome that carries them back, laid out in the same way.
    """

    kind: str
    field: str
    message_of: Callable[[Record], int | None]
    messages: tuple[Message, ...]
    layout: type[Layout] | None = None
    place_of: Callable[[Machine, Record], int | None] | None = None
    answer: tuple[str, str] | None = None

    def message(self, record: Record) -> Message | None:
        """The declared message that `record` carries."""
        number = self.message_of(record)
        return next((message for message in self.messages if message.number == number), None)

    def layout_of(self, record: Record) -> type[Layout] | None:
        """The layout of the bytes in `record`, None when they have none."""
        if self.message_of(record) is None:
            return None
        message = self.message(record)
        return self.layout if message is None else message.layout


def payload_bytes(payload: Payload, record: Record) -> bytes:
    """The bytes of the payload's field in `record`; a number as 8 bytes."""
    value = getattr(record, payload.field)
    return value if isinstance(value, bytes) else int(value).to_bytes(8, "little")
